"""Checkpoints that are missing, damaged or wrong: one clear error from `load`, one clear line from the command."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import kvloom
from kvloom.cli import kvloom as command
from kvloom.errors import CorruptCheckpoint, ModelError, ModelNotFound, TokenizerMismatch, UnsupportedModel

WEIGHTS = "model.safetensors"

Damage = Callable[[Path], None]


@pytest.fixture
def folder(stories260k: Path, tmp_path: Path) -> Path:
    """A copy of a real checkpoint, to be damaged."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in stories260k.iterdir():
        shutil.copyfile(file, copy / file.name)
    return copy


def weights_cut_to(share: float) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / WEIGHTS
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])

    return damage


def overwritten(name: str, content: bytes, *, at: int | None = None) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / name
        before = file.read_bytes()
        file.write_bytes(content if at is None else before[:at] + content + before[at + len(content) :])

    return damage


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def config_with(**fields: object) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return damage


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def tokenizer_with_an_id_too_many(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    added = {"content": "<new>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append({"id": 512, "special": True, **added})
    file.write_text(json.dumps(tokenizer))


DAMAGES: list[tuple[str, Damage, type[ModelError], str]] = [
    ("weights cut in the header's length", overwritten(WEIGHTS, b"\x10\x00"), CorruptCheckpoint, WEIGHTS),
    ("weights of no bytes", weights_cut_to(0), CorruptCheckpoint, WEIGHTS),
    ("weights cut in the header", weights_cut_to(0.001), CorruptCheckpoint, WEIGHTS),
    ("weights cut in the middle", weights_cut_to(0.5), CorruptCheckpoint, "damaged or incomplete"),
    ("weights short of their last bytes", weights_cut_to(0.9999), CorruptCheckpoint, "damaged or incomplete"),
    ("a header that is no JSON", overwritten(WEIGHTS, b"{{{{", at=8), CorruptCheckpoint, WEIGHTS),
    ("a header of absurd length", overwritten(WEIGHTS, b"\xff" * 8, at=0), CorruptCheckpoint, WEIGHTS),
    ("no weights", without(WEIGHTS), CorruptCheckpoint, "no complete set of weights"),
    ("a tensor that is missing", without_a_tensor, CorruptCheckpoint, "layers.2.mlp.up_proj"),
    ("a config of another shape", config_with(intermediate_size=200), CorruptCheckpoint, "mlp"),
    ("more layers than weights", config_with(num_hidden_layers=7), CorruptCheckpoint, "layers.5"),
    ("no config", without("config.json"), ModelNotFound, "no config.json"),
    ("a config cut short", overwritten("config.json", b'{"model_type": "lla'), CorruptCheckpoint, "config.json"),
    ("a config that is binary", overwritten("config.json", b"\xff\xfe\x00"), CorruptCheckpoint, "config.json"),
    ("a config that is a list", overwritten("config.json", b"[1, 2]"), CorruptCheckpoint, "config.json"),
    ("a config of no model type", overwritten("config.json", b"{}"), UnsupportedModel, "config"),
    ("an unknown model type", config_with(model_type="abacus"), UnsupportedModel, "abacus"),
    ("a field of a wrong type", config_with(hidden_size="large"), UnsupportedModel, "hidden_size"),
    ("a tokenizer cut short", overwritten("tokenizer.json", b'{"version": "1'), CorruptCheckpoint, "tokenizer"),
    ("a tokenizer that does not fit", tokenizer_with_an_id_too_many, TokenizerMismatch, "ids up to 512.*ends at 511"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "error", "named"), [own[1:] for own in DAMAGES], ids=[own[0] for own in DAMAGES])
def test_a_damaged_checkpoint_is_refused_and_what_is_wrong_is_named(
    folder: Path, damage: Damage, error: type[ModelError], named: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=named) as refused:
        kvloom.load(folder)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 400

    shown = CliRunner().invoke(command, ["generate", "Once", "--model", str(folder)])
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr == f"kvloom: {message}\n"


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "~/no/such/model"])
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelNotFound, match="no model folder"):
        kvloom.load(name)


def test_a_file_is_no_model_folder(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="is a file"):
        kvloom.load(folder / WEIGHTS)


def test_a_hub_id_that_cannot_be_had_is_refused_without_the_network() -> None:
    with pytest.raises(ModelNotFound, match="neither a folder nor a model that can be fetched"):
        kvloom.load("nobody/nothing")


def test_a_tokenizer_that_does_not_fit_is_refused_by_attach(stories260k: Path, qwen2_tokenizer: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories260k).eval()
    with pytest.raises(TokenizerMismatch, match=r"ends at 511.*tokenizer that belongs to the model"):
        kvloom.attach(model, AutoTokenizer.from_pretrained(qwen2_tokenizer))


def test_a_checkpoint_without_a_tokenizer_decodes_token_ids_and_refuses_text(gpt2_capp: Path) -> None:
    lm = kvloom.load(gpt2_capp)
    assert lm.tokenizer is None
    with pytest.raises(kvloom.InvalidRequest, match="no tokenizer"):
        lm.generate("text")
    assert lm.generate([1, 2, 40], max_new_tokens=2).token_ids


def test_weights_without_a_place_are_mentioned(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kvloom.load(folder)
    config_with(num_hidden_layers=4)(folder)
    with pytest.warns(UserWarning, match="no place for"):
        kvloom.load(folder)


def test_a_damaged_generation_config_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text("xx")
    with pytest.raises(CorruptCheckpoint, match="generation_config"):
        kvloom.load(folder)
