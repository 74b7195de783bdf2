"""`kvloom` on encoder-decoder models: text to text, plans, proofs; and what is for causal models says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kvloom
import tiny
from kvloom.cli import kvloom as command
from kvloom.errors import UnsupportedModel

WORDS = ["<pad>", "</s>", "<start>", *(f"w{number}" for number in range(128))]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 folder with a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("t5")
    tiny.tiny_model("t5").save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<pad>", "bos_token": "<start>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_text_is_decoded_from_text(t5: Path) -> None:
    result = run("generate", "--model", t5, "w5 w6 w7 w90", "--max-new-tokens", 6)
    assert result.exit_code == 0, result.output
    lm = kvloom.load(t5)
    assert lm.binding.name == "transformers cache interface"
    expected = lm.generate("w5 w6 w7 w90", max_new_tokens=6, use_cache=False)
    assert result.stdout == expected.text and expected.text.count("w") == 6
    assert "source  4 tokens, read by the encoder" in " ".join(result.stderr.split("\n"))


def test_beams_json_and_options_work(t5: Path) -> None:
    result = run("generate", "--model", t5, "w5 w6", "--num-beams", 3, "--max-new-tokens", 5, "--json", "--logprobs", 2)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    expected = kvloom.load(t5).beam_search("w5 w6", num_beams=3, max_new_tokens=5)[0]
    assert found["generations"][0]["token_ids"] == expected.token_ids
    assert found["usage"]["source_tokens"] == 2 and found["usage"]["computed_source_tokens"] == 2


def test_a_plan_shows_what_cross_attention_takes(t5: Path) -> None:
    result = run("plan", t5, "--source-tokens", 100, "--num-beams", 4, "--max-new-tokens", 20)
    assert result.exit_code == 0, result.output
    assert "1 source of 100 tokens, 1 prompt of 1 token" in result.stdout
    row = next(line for line in result.stdout.splitlines() if "cross-attention" in line)
    assert row.split()[1:] == ["3", "12.0", "KiB", "7", "84.0", "KiB", "336.0", "KiB"]
    refused = run("plan", "--source-tokens", 100)
    assert refused.exit_code == 2 and "this model has no encoder" in refused.stderr


def test_the_model_is_verified(t5: Path) -> None:
    result = run("verify", "--model", t5, "--max-new-tokens", 3, "--prompt", "w5 w6 w7", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["ok"] and report["source_tokens"] == [3]


def test_continuations_are_scored_behind_a_source(t5: Path) -> None:
    result = run("score", "--model", t5, "w5 w6", "-c", "w9 w10", "-c", "w11", "--json")
    assert result.exit_code == 0, result.output
    scores = kvloom.load(t5).score(["w9 w10", "w11"], prompt="w5 w6", use_cache=False)
    assert [own.token_ids for own in scores] == [[12, 13], [14]]
    by_text = {own.text: own.logprob for own in scores}
    for found in json.loads(result.stdout)["scores"]:
        assert found["logprob"] == pytest.approx(by_text[found["text"]], abs=1e-4)


def test_what_is_for_causal_models_says_so(t5: Path) -> None:
    for arguments, message in [
        (["chat", "--model", t5], "decodes from one source each time"),
        (["bench", "--model", t5], "only causal models are measured"),
        (["explain", "--model", t5, "w5 w6 w7 w8"], "attention cannot be looked at"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), (arguments, result.output)


def test_a_model_that_reads_features_is_for_python(tmp_path: Path) -> None:
    tiny.tiny_model("whisper").save_pretrained(tmp_path)
    result = run("generate", "--model", tmp_path, "--token-ids", "5 6")
    assert result.exit_code == 2 and "reads features, not text" in result.stderr
    lm = kvloom.load(tmp_path)
    assert lm.binding.encoder.reads_features and lm.verify(max_new_tokens=2).ok
    from kvloom.explain.observe import observe

    with pytest.raises(UnsupportedModel, match="attention of causal models"):
        observe(lm, [5, 6, 7])
