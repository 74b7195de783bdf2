"""Wrong use of the command: one clear line on stderr, nothing on stdout, exit status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvloom.cli import kvloom as command
from kvloom.cli.options.values import ByteSize

GENERATE = ["generate", "Once upon a time"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["generat", "x"], "unknown command `generat`. Did you mean `generate`?"),
        (["check"], "unknown command `check`. See `kvloom --help`."),
        ([*GENERATE, "--num-beem", "3"], "unknown option `--num-beem`. Did you mean `--num-beams`?"),
        ([*GENERATE, "--max_new_tokens", "3"], "unknown option `--max_new_tokens`. Did you mean `--max-new-tokens`?"),
        ([*GENERATE, "--temprature=1"], "unknown option `--temprature`. Did you mean `--temperature`?"),
        ([*GENERATE, "--xyz"], "unknown option `--xyz`. See `kvloom generate --help`."),
        (["verify", "--sed", "1"], "unknown option `--sed`. Did you mean `--seed`?"),
        ([*GENERATE, "more"], "got unexpected extra argument (more)"),
        ([*GENERATE, "--num-beams", "two"], "invalid value for '--num-beams': 'two' is not a valid integer."),
        ([*GENERATE, "--num-beams", "0"], "invalid value for '--num-beams': 0 is not in the range x>=1."),
        ([*GENERATE, "--num-beams"], "option '--num-beams' requires an argument."),
        ([*GENERATE, "--budget", "lots"], "'lots' is not a size such as 512MiB, 2GiB or 65536."),
        ([*GENERATE, "--eos-token-id", "end"], "'end' is neither a token id nor `none`."),
        ([*GENERATE, "--early-stopping", "maybe"], "'maybe' is not one of 'false', 'true', 'never'."),
        (["generate", "--logprobs", "Once"], "'Once' is not a number. Without one, write the option after the prompt."),
        (["generate", ""], "the prompt is empty. Pass some text, or token ids with --token-ids."),
        (["generate"], "the prompt is empty."),
        (["generate", "-"], "the prompt is empty."),
        (["generate", "1 two", "--token-ids"], "`two` is not a token id, and with --token-ids the prompt is integers."),
        (["generate", " , ", "--token-ids"], "the prompt holds no token ids."),
        ([*GENERATE, "--model", "/no/such/folder"], "there is no model folder `/no/such/folder`."),
    ],
)
def test_wrong_use_is_one_line_and_exit_status_two(arguments: list[str], line: str) -> None:
    shown = CliRunner().invoke(command, arguments, input="")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr.startswith("kvloom: ") and shown.stderr.count("\n") == 1
    assert line in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--temperature", "-1"],
            "`--temperature` must be a number above 0, but is -1.0. For greedy decoding leave it",
        ),
        (["--top-p", "1.5"], "`--top-p` must be a number above 0 and at most 1, but is 1.5."),
        (
            ["--num-beams", "2", "--num-return-sequences", "3"],
            "`--num-return-sequences 3` exceeds `--num-beams 2`. Raise `--num-beams`.",
        ),
        (["--num-return-sequences", "3"], "greedy decoding has one. Set `--do-sample` or `--num-beams`."),
        (
            ["--max-new-tokens", "600"],
            "5 prompt tokens and 600 new ones exceed the model's context of 512. Lower --max-new-tokens to 507",
        ),
        (["--budget", "60KiB", "--num-beams", "8"], "and 8 sequences needs"),
        (["--budget", "60KiB", "--max-new-tokens", "200"], "the pool has 3 ("),
        (["--budget", "10"], "`--budget 10` is below one block"),
        (["--dtype", "int7"], "`--dtype int7` is not a floating-point dtype that models run in. Pass float64"),
        (["--device", "abacus"], "`--device abacus` is not a device of PyTorch"),
        (["--logprobs", "513"], "`--logprobs 513` exceeds the vocabulary of 512 tokens."),
        (["--eos-token-id", "512"], "`--eos-token-id` names token 512; the vocabulary has ids 0 to 511."),
        (["--seed", "-1", "--do-sample"], "`--seed` must be an integer from 0"),
    ],
)
def test_what_the_library_refuses_is_told_in_words_of_the_command(
    stories260k: Path, arguments: list[str], line: str
) -> None:
    shown = CliRunner().invoke(command, [*GENERATE, "--model", str(stories260k), *arguments])
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr.startswith("kvloom: ") and shown.stderr.count("\n") == 1
    assert line in shown.stderr
    assert "_" not in shown.stderr, "no name of the library is left"


@pytest.mark.parametrize("ids", ["1 512", "-1"])
def test_ids_outside_the_vocabulary_are_refused(stories260k: Path, ids: str) -> None:
    arguments = ["generate", "--token-ids", "--model", str(stories260k), "--", ids]
    shown = CliRunner().invoke(command, arguments)
    assert shown.exit_code == 2
    assert f"token id {ids.split()[-1]} is outside the vocabulary; valid ids are 0 to 511." in shown.stderr


def test_a_prompt_longer_than_the_context_is_refused(stories260k: Path) -> None:
    arguments = ["generate", "-", "--model", str(stories260k)]
    shown = CliRunner().invoke(command, arguments, input="a very long story " * 200)
    assert shown.exit_code == 2
    assert "the model's context of 512 leaves no room for a new one. Shorten the prompt." in shown.stderr


def test_a_prompt_that_is_no_text_is_refused() -> None:
    shown = CliRunner().invoke(command, ["generate", "-"], input=b"\xff\xfe")
    assert shown.exit_code == 2 and "not UTF-8 text" in shown.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a\udcff"],
        ["score", "a", "-c", "\udcff"],
        ["explain", "a b \udcff"],
        ["generate", "a", "--stop", "\udcff"],
    ],
)
def test_an_argument_that_is_no_text_is_refused(arguments: list[str]) -> None:
    shown = CliRunner().invoke(command, arguments)
    assert shown.exit_code == 2
    assert shown.stderr.startswith("kvloom: ") and "not UTF-8 text" in shown.stderr


PLAIN_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""One in which Python reads and writes ASCII."""


def test_in_a_locale_without_chinese_it_is_read_all_the_same_and_nothing_breaks() -> None:
    def said(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[bytes]:
        line = [sys.executable, "-m", "kvloom", *arguments]
        return subprocess.run(line, env={**os.environ, **environment}, capture_output=True, timeout=120)

    arguments = ("generate", "从前", "--max-new-tokens", "2", "--json", "-q")
    plain, utf8 = said(PLAIN_LOCALE, *arguments), said({"PYTHONUTF8": "1"}, *arguments)
    texts = [[json.loads(own.stdout)[name] for name in ("prompt", "prompt_token_ids")] for own in (plain, utf8)]
    assert texts[0] == texts[1] and texts[0][0] == "从前"
    shown = said(PLAIN_LOCALE, "score", "从前", "-c", "有")
    assert (shown.returncode, shown.stderr.count(b"Traceback")) == (0, 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["plan"], ["generate", "a", "--max-new-tokens", "1", "-q"]])
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "kvloom", *arguments]
        shown = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (shown.returncode, shown.stderr) == (1, "kvloom: No space left on device.\n")


@pytest.mark.parametrize("arguments", [["plan"], ["plan", "--json"], ["score", "a", "-c", " b", "-q"]])
def test_a_reader_that_leaves_early_ends_it_quietly(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "-m", "kvloom", *arguments]
    shown = subprocess.run(line, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (shown.returncode, shown.stderr) == (141, "")


def test_without_a_command_the_help_stands_on_stderr() -> None:
    shown = CliRunner().invoke(command, [])
    assert shown.exit_code == 2
    assert "Usage:" in shown.stderr and "generate" in shown.stderr


def test_every_option_has_help() -> None:
    for name, own in command.commands.items():
        for parameter in own.params:
            assert parameter.param_type_name == "argument" or getattr(parameter, "help", None), (name, parameter)
        assert CliRunner().invoke(command, [name, "--help"]).exit_code == 0


def test_the_version_is_told() -> None:
    assert CliRunner().invoke(command, ["--version"]).stdout.startswith("kvloom 0.")


@pytest.mark.parametrize(
    ("text", "size"),
    [("65536", 65536), ("1KiB", 1024), ("1.5 MiB", 3 << 19), ("2g", 2 << 30), ("3GB", 3_000_000_000), ("7b", 7)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert ByteSize().convert(text, None, None) == size
