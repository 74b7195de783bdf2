"""`kvloom plan`: what it prints, draws and refuses."""

from __future__ import annotations

import json
import re
import struct
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import kvloom
import tiny
from kvloom.cli import kvloom as command

REQUEST = ("--prompt-tokens", "100", "--max-new-tokens", "20", "--num-beams", "4", "--batch", "2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config of two layer groups and nothing else."""
    folder = tmp_path / "model"
    tiny.tiny_config("gemma2").save_pretrained(folder)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, ["plan", *map(str, arguments)], env={"COLUMNS": "80"})


def refusal(*arguments: object) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_the_tables_fit_80_columns_and_name_every_size(folder: Path) -> None:
    result = run(folder, *REQUEST, "--budget", "1MiB")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines[1:]) and "…" not in result.stdout
    plan = kvloom.plan(folder, prompt_tokens=100, max_new_tokens=20, num_beams=4, batch=2, budget_bytes=1 << 20)
    text = " ".join(result.stdout.split())
    assert "4 layers, 2 KV heads of 16, float32, context of 256 tokens" in text
    assert "2 prompts of 100 tokens, 4 beams each, up to 20 new tokens each" in text
    for group, size in zip(plan.groups, ("2 8.0 KiB", "2 8.0 KiB"), strict=True):
        assert re.search(rf"{group.reach} {size} {group.blocks} \S+ KiB \S+ KiB", text)
    for words in ("weights", "keys and values", "activations and logits", "Python, PyTorch", "peak", "each apart"):
        assert words in text
    assert f"budget 1.0 MiB: {plan.pool_blocks} blocks" in text
    assert "fits yes" in text


def test_json_holds_the_same_numbers_in_bytes(folder: Path) -> None:
    result = run(folder, *REQUEST, "--budget", "1MiB", "--json")
    plan = kvloom.plan(folder, prompt_tokens=100, max_new_tokens=20, num_beams=4, batch=2, budget_bytes=1 << 20)
    shown = json.loads(result.stdout)
    measured = {"baseline_bytes", "load_peak_bytes", "attach_peak_bytes"}
    expected = json.loads(json.dumps(plan.to_dict()))
    assert {name: own for name, own in shown.items() if name not in measured | {"kvloom"}} == {
        name: own for name, own in expected.items() if name not in measured
    }
    assert shown["cache_bytes"] == sum(group["blocks"] * group["bytes_per_block"] for group in shown["groups"])
    assert [point["prompt_tokens"] for point in shown["curve"]] == sorted({p["prompt_tokens"] for p in shown["curve"]})
    at_request = next(point for point in shown["curve"] if point["prompt_tokens"] == 100)
    assert (at_request["shared_bytes"], at_request["apart_bytes"]) == (shown["cache_bytes"], shown["apart_bytes"])


def test_without_a_model_the_demonstration_model_is_planned_on_the_budget_of_this_machine() -> None:
    result = run()
    assert result.exit_code == 0 and result.stdout.startswith("demonstration model\n")
    assert "the default here" in result.stdout


@pytest.mark.parametrize(
    ("budget", "verdict"),
    [
        ("400KiB", "fits 1 of 2 prompts at once, the others wait"),
        ("100KiB", "fits no: raise the budget to 311,296 bytes (304.0 KiB), or shorten the request"),
    ],
)
def test_a_budget_that_does_not_hold_all_is_said(folder: Path, budget: str, verdict: str) -> None:
    assert verdict in " ".join(run(folder, *REQUEST, "--budget", budget).stdout.split())


@pytest.mark.parametrize(
    "options", [(), ("--budget", "600KiB"), ("--num-beams", "1"), ("--num-beams", 1, "--batch", 1)]
)
def test_the_plot_is_a_png(folder: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.png"
    assert run(folder, *REQUEST, *options, "--plot", file).exit_code == 0
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1_600, 1_000)


def test_without_matplotlib_the_plot_is_refused_with_the_remedy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'kvloom[plot]'" in refusal(folder, "--plot", tmp_path / "plan.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-beam", "2"], "unknown option `--num-beam`. Did you mean `--num-beams`?"),
        (["--prompt-tokens", "-1"], "-1"),
        (["--batch", "0"], "0"),
        (["--budget", "2KiB"], "`--budget 2,048` is below one block"),
        (["--budget", "many"], "'many' is not a size"),
        (["--num-beams", "2", "--num-return-sequences", "3"], "`--num-return-sequences 3` exceeds `--num-beams 2`"),
        (["--codec", "int4"], "`--codec int4` does not exist. Pass 'native' or 'int8'"),
        (["--retention", "sinks"], "'sinks' is not one of 'sink-window'"),
        (["--prompt-tokens", "300"], "the model's context of 256 leaves no room"),
        (["--dtype", "int8"], "`--dtype int8` is not a floating-point dtype"),
        (["--plot", "plan.svg"], "must end with .png"),
        (["--plot", "/no/such/folder/plan.png"], "there is no folder `/no/such/folder`"),
    ],
)
def test_wrong_use_is_one_line(folder: Path, options: list[str], message: str) -> None:
    assert message in refusal(folder, *options)


def test_a_folder_without_a_config_is_one_line(tmp_path: Path) -> None:
    assert "holds no config.json" in refusal(tmp_path)


def test_an_encoder_decoder_config_is_planned_with_its_source(tmp_path: Path) -> None:
    tiny.tiny_config("t5").save_pretrained(tmp_path)
    result = run(tmp_path, "--prompt-tokens", "4", "--max-new-tokens", "8", "--source-tokens", "20", "--num-beams", "4")
    assert result.exit_code == 0, result.stderr
    assert "cross-attention" in result.stdout
