"""`kvloom bench --quality`: what it prints, draws and refuses."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvloom.bench.quality import Answer, Outcome, QualityReport, Setting
from kvloom.bench.quality.settings import POLICIES, all_settings
from kvloom.cli import kvloom as command
from kvloom.cli.bench.quality_plot import draw

SHORT = (
    "--prompt-tokens", "96", "--max-new-tokens", "3", "--passages", "1", "--recall-texts", "1",
    "--retention", "recent", "--retention", "last-query", "--keep", "0.5", "--threads", "1",
)  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, ["bench", *map(str, arguments)], env={"COLUMNS": "80"})


def refusal(*arguments: object) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_the_table_names_every_setting_and_every_figure_within_80_columns() -> None:
    result = run("--quality", *SHORT)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines) and "…" not in result.stdout
    text = " ".join(result.stdout.split())
    for words in ("contexts of 96 tokens", "3 positions of 1 passage,", "of 2 questions answered", "int8 keep KL"):
        assert words in text
    for codec in ("native", "int8"):
        table = text.partition(f" {codec} keep KL top-1 NLL recall bytes step")[2]
        assert table.index("full 100%") < table.index("recent 50%") < table.index("last-query 50%")
    assert "full 100% 0.000 100% +0.000" in text
    assert "Controls, which know nothing: recent." in text


def test_json_holds_every_outcome_and_every_answer_and_the_picture_is_written(tmp_path: Path) -> None:
    plot = tmp_path / "quality.png"
    result = run("--quality", *SHORT, "--codec", "native", "--json", "--plot", plot)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [(own["policy"], own["keep"], own["codec"]) for own in report["outcomes"]] == [
        ("full", 1.0, "native"),
        ("recent", 0.5, "native"),
        ("last-query", 0.5, "native"),
    ]
    full, recent, _ = report["outcomes"]
    assert (full["kl"], full["agreement"]) == (0.0, 1.0) and recent["kl"] > 0
    assert recent["cache_bytes"] < full["cache_bytes"] and recent["step_seconds"] > 0
    assert [set(own) for own in full["answers"]] == [{"depth", "right"}] * 2
    header = plot.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:]) == (1600, 1000)


@pytest.mark.parametrize("recalls", [True, False])
def test_every_policy_and_codec_can_be_drawn_whether_or_not_anything_is_recalled(tmp_path: Path, recalls: bool) -> None:
    pytest.importorskip("matplotlib")
    outcomes = [
        Outcome(
            setting=own,
            kl=1.0 - own.keep,
            agreement=own.keep,
            nll_change=0.1,
            answers=(Answer(0.5, recalls),),
            recalled=int(recalls),
            recallable=int(recalls),
            cache_bytes=int(1e6 * own.keep * (1 if own.codec == "native" else 0.55)),
            step_seconds=0.01,
        )
        for own in all_settings(POLICIES, (0.5, 0.25), ("native", "int8"))
    ]
    facts = {"dtype": "float32", "device": "cpu", "threads": 1, "context_tokens": 64, "passages": 1, "positions": 2}
    report = QualityReport(**facts, recall_texts=1, seed=0, nll=3.0, outcomes=tuple(outcomes))
    draw(report, "some model", tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_a_model_of_ones_own_and_a_text_of_ones_own_are_measured(stories260k: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once there was a cat. It sat on a mat. Then a dog came by, and they played all day. " * 40)
    result = run("--quality", *SHORT, "--prompt-tokens", 250, "--model", stories260k, "--text", text, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["positions"] == 3


def test_what_a_model_cannot_honour_is_said_and_the_rest_is_measured() -> None:
    setting = Setting("recent", 0.5, "native")
    full = Outcome(Setting("full", 1.0, "native"), 0.0, 1.0, 0.0, (), 0, 0, 100, 0.01)
    facts = {"dtype": "float32", "device": "cpu", "threads": 1, "context_tokens": 64, "passages": 1, "positions": 2}
    report = QualityReport(
        **facts, recall_texts=1, seed=0, nll=3.0, outcomes=(full,), refused=((setting, "it has nothing to do."),)
    )
    assert report.to_dict()["refused"] == [
        {"policy": "recent", "keep": 0.5, "codec": "native", "reason": "it has nothing to do."}
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--quality", "--num-beams", "2"), "`--num-beams` is for measuring speed. Leave out `--quality`"),
        (("--keep", "0.5"), "`--keep` is for measuring quality. Add `--quality`."),
        (("--quality", "--retention", "recnt"), "Did you mean `recent`?"),
        (("--quality", "--keep", "1.5"), "must be between 0 and 1"),
        (("--quality", "--text", "/no/such/file"), "cannot be read"),
        (("--quality", "--prompt-tokens", "5000"), "exceed the model's context of 1,024"),
        (("--quality", "--plot", "quality.jpg"), "must end with .png"),
    ],
)
def test_wrong_use_ends_in_one_line(arguments: tuple[str, ...], words: str) -> None:
    assert words in refusal(*arguments)
