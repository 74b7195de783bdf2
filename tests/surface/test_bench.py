"""`kvloom bench`: what it measures, prints, draws and refuses."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import kvloom
import tiny
from kvloom.bench import Growth, SpeedReport, measure_speed
from kvloom.bench.bandwidth import weight_bytes_a_step
from kvloom.cli import kvloom as command

SHORT = ("--prompt-tokens", "24", "--max-new-tokens", "3", "--longest", "40", "--runs", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_model("qwen2").save_pretrained(folder)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, ["bench", *map(str, arguments)], env={"COLUMNS": "80"})


def test_the_tables_name_every_work_and_every_length(folder: Path) -> None:
    result = run("--model", folder, *SHORT)
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    works = ("prefill of 24", "greedy after 24", "4 beams after 24", "4 prompts of 6 to 24")
    for words in (*works, "one more token after", "memory reads at", "through the transformers attention interface"):
        assert words in text
    assert all(len(line) <= 80 for line in result.stdout.splitlines()[2:])


def test_json_holds_the_works_the_growth_and_the_picture_is_written(folder: Path, tmp_path: Path) -> None:
    plot = tmp_path / "growth.png"
    result = run("--model", folder, *SHORT, "--json", "--plot", plot)
    report = json.loads(result.stdout)
    assert [own["tokens"] for own in report["growth"]] == [32, 40]
    assert [own["bandwidth_share"] is None for own in report["works"]] == [True, False, False, False]
    assert all(own["seconds"] > 0 and own["cache_bytes"] > 0 for own in report["works"])
    header = plot.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:]) == (1600, 1000)


def test_beams_hold_less_than_so_many_prompts_apart() -> None:
    lm = kvloom.attach(tiny.tiny_model("llama"))
    report = measure_speed(lm, prompt_tokens=64, new_tokens=3, num_beams=8, batch=8, longest=32, runs=1)
    beams, batch = report.works[2:]
    assert beams.cache_bytes < batch.cache_bytes
    assert beams.tokens_per_second == pytest.approx(8 / beams.seconds)


def test_a_total_is_the_sum_over_its_tokens() -> None:
    growth = (
        Growth(10, cached_seconds=1.0, uncached_seconds=2.0),
        Growth(30, cached_seconds=1.0, uncached_seconds=6.0),
    )
    report = SpeedReport("float32", "cpu", "", 1, None, 1.0, growth, ())
    assert report.totals() == ([0.0, 10.0, 30.0], [0.0, 20.0, 100.0])
    assert [own.times_faster for own in growth] == [2.0, 6.0]


def test_a_step_reads_tied_embeddings_once_and_untied_ones_not_at_all() -> None:
    tied = tiny.tiny_model("qwen2", tie_word_embeddings=True)
    untied = tiny.tiny_model("qwen2", tie_word_embeddings=False)
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    assert weight_bytes_a_step(tied) == sum(own.nbytes for own in tied.parameters())
    looked_up = untied.get_input_embeddings().weight.nbytes
    assert weight_bytes_a_step(untied) == sum(own.nbytes for own in untied.parameters()) - looked_up
    assert weight_bytes_a_step(tiny.tiny_model("mixtral")) is None


def test_a_model_without_a_cache_is_measured_too() -> None:
    logits = torch.randn(7, 7)
    lm = kvloom.attach(lambda ids: logits[ids], vocab_size=7)
    report = measure_speed(lm, prompt_tokens=8, new_tokens=2, num_beams=2, batch=2, longest=32, runs=1)
    assert report.weight_bytes is None and all(own.cache_bytes == 0 for own in report.works)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt-tokens", "5000"), "and the model's context is"),
        (("--longest", "7"), "--longest"),
        (("--max-new-tokens", "1"), "--max-new-tokens"),
        (("--plot", "growth.jpg"), "must end with .png"),
        (("--runs", "0"), "--runs"),
    ],
)
def test_wrong_lengths_and_files_end_in_one_line(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    result = run("--model", folder, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr and result.stderr.count("\n") == 1
