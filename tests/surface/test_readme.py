"""Every command and every Python block of the README runs, and prints what the README shows.

How to write the README, so that it is tested:

- ```` ```bash ````: each line is a command and must succeed. A ```` ```text ```` block right after it is the
  standard output of them all.
- ```` ```console ````: lines that begin with `$ ` are commands; the lines under each are its standard output.
  No lines: it only has to succeed. `$ echo $?` with a status under it says how the command before it ends;
  if that is not 0, the lines under that command are its standard error.
- ```` ```python ````: all Python blocks run in order in one namespace, as if pasted one after the other. A
  ```` ```text ```` block right after one is what that block prints.
- A line `...` in expected output stands for any lines, or none. All other lines match exactly.
- `<!-- not run: reason -->` right before a block: for what needs a network or a GPU. Options of `kvloom`
  commands are still looked up in `--help`, and Python still has to compile.

`kvloom` and `python FILE` run; of `make`, `pip install`, `git clone`, `cd` and the like only the existence of
what they name is checked. A command that is none of these fails the test: teach it here, or take it out.
All run in one temporary folder, first the commands from top to bottom, then the Python, so that a later one
finds the files of an earlier one. Standard input is empty.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"

# ---- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` is where its fence stands in the file, from 1."""

    language: str
    body: str
    line: int
    not_run: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class Command:
    """One shell command, with what the README says of it."""

    text: str
    line: int
    output: str | None = None
    status: int = 0
    not_run: str | None = None


FENCE = re.compile(r"^(?P<ticks>```+)(?P<language>[\w-]*)[^\n]*\n(?P<body>.*?)^(?P=ticks)[ \t]*$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^\n]+?) -->\s*\Z")


def blocks_of(markdown: str) -> list[Block]:
    """The fenced blocks of a page; a `text` block right after another becomes that one's `output`."""
    blocks: list[Block] = []
    end = 0
    for match in FENCE.finditer(markdown):
        between = markdown[end : match.start()]
        adjacent = bool(blocks) and not between.strip()
        end = match.end()
        if match["language"] == "text" and adjacent and blocks[-1].language in ("bash", "python"):
            before = blocks.pop()
            blocks.append(Block(before.language, before.body, before.line, before.not_run, match["body"]))
            continue
        skip = NOT_RUN.search(between)
        line = markdown.count("\n", 0, match.start()) + 1
        blocks.append(Block(match["language"], match["body"], line, skip["reason"] if skip else None))
    return blocks


def commands_of(blocks: list[Block]) -> list[Command]:
    """The shell commands of `bash` and `console` blocks, in order."""
    commands: list[Command] = []
    for block in blocks:
        if block.language == "bash":
            commands += _bash_commands(block)
        elif block.language == "console":
            commands += _console_commands(block)
    return commands


def _bash_commands(block: Block) -> list[Command]:
    lines = [
        (block.line + 1 + number, line)
        for number, line in _logical_lines(block.body)
        if line and not line.startswith("#")
    ]
    if block.output is None:
        return [Command(line, number, not_run=block.not_run) for number, line in lines]
    script = "\n".join(line for _, line in lines)
    return [Command(script, block.line + 1, block.output, not_run=block.not_run)]


def _console_commands(block: Block) -> list[Command]:
    commands: list[Command] = []
    for part in re.finditer(r"^\$ (?P<text>(?:.*\\\n)*.*)\n?(?P<output>(?:(?!\$ ).*\n?)*)", block.body, re.M):
        text = re.sub(r"\\\n\s*", "", part["text"]).strip()
        if text == "echo $?":
            before = commands.pop()
            status = int(part["output"])
            commands.append(Command(before.text, before.line, before.output, status, before.not_run))
            continue
        line = block.line + 1 + block.body.count("\n", 0, part.start())
        output = part["output"] if part["output"].strip() else None
        commands.append(Command(text, line, output, not_run=block.not_run))
    return commands


def _logical_lines(body: str) -> list[tuple[int, str]]:
    """Lines with their numbers from 0, `\\` at the end joined with what follows."""
    lines: list[tuple[int, str]] = []
    joining = False
    for number, line in enumerate(body.splitlines()):
        text = line.removesuffix("\\").strip()
        if joining:
            lines[-1] = (lines[-1][0], f"{lines[-1][1]} {text}")
        else:
            lines.append((number, text))
        joining = line.endswith("\\")
    return lines


def matches(expected: str, actual: str) -> bool:
    """Whether `actual` is `expected`, where a line `...` stands for any lines, or none."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(line.rstrip()) + "\n"
        for line in expected.strip("\n").splitlines()
    )
    tidy = "".join(line.rstrip() + "\n" for line in actual.strip("\n").splitlines())
    return re.fullmatch(pattern, tidy) is not None


# ---- running -----------------------------------------------------------------------------------------------

RUN = {"kvloom", "python", "python3", "echo", "printf", "cat", "ls"}
ONLY_LOOKED_AT = {"make", "pip", "git", "cd", "source", ".", "export"}

PAGE = README.read_text(encoding="utf-8") if README.exists() else ""
BLOCKS = blocks_of(PAGE)


def _shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _check_existence(words: list[str]) -> None:
    """That what a command names exists: a target, an extra, an option."""
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
        named = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        assert set(named) <= targets, f"the Makefile has no target {set(named) - targets}"
    if "pip" in words:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for extra in re.findall(r"(?:kvloom|\.)\[([\w,-]+)\]", " ".join(words)):
            for name in extra.split(","):
                assert re.search(rf"^{name} = \[", project, re.M), f"pyproject.toml has no extra {name}"
    if words[0] == "kvloom":
        shown = _shell(shlex.join([*words[:2], "--help"]), ROOT)
        assert shown.returncode == 0, shown.stderr
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert option in shown.stdout, f"`{shlex.join(words[:2])} --help` does not know {option}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def test_there_is_a_readme() -> None:
    assert README.exists()
    assert BLOCKS, "the README shows nothing to run"


@pytest.mark.parametrize("command", [pytest.param(c, id=f"line {c.line}: {c.text[:60]}") for c in commands_of(BLOCKS)])
def test_a_command_of_the_readme_does_what_the_readme_shows(command: Command, folder: Path) -> None:
    lines = [shlex.split(line, comments=True) for line in command.text.splitlines()]
    for words in lines:
        assert words[0] in RUN or _only_looked_at(words), (
            f"README line {command.line}: no rule for `{words[0]}`; see the top of {Path(__file__).name}"
        )
    if command.not_run or any(_only_looked_at(words) for words in lines):
        for words in lines:
            _check_existence(words)
        return
    ran = _shell(_run_from_anywhere(command.text), folder)
    assert ran.returncode == command.status, f"{command.text}\n{ran.stdout}\n{ran.stderr}"
    if command.output is not None:
        shown = ran.stderr if command.status else ran.stdout
        assert matches(command.output, shown), _difference(command.line, command.output, shown)


def _only_looked_at(words: list[str]) -> bool:
    return words[0] in ONLY_LOOKED_AT or words[1:3] in (["-m", "pip"], ["-m", "venv"])


def _difference(line: int, expected: str, actual: str) -> str:
    return f"README line {line} shows\n{expected}\nbut got\n{actual}"


def _run_from_anywhere(script: str) -> str:
    """The README is read in the checkout; scripts that it names there run in another folder."""
    return re.sub(r"[\w./-]+\.py\b", lambda m: str(ROOT / m[0]) if (ROOT / m[0]).exists() else m[0], script)


def test_the_python_blocks_of_the_readme_print_what_the_readme_shows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCKS:
        if block.language != "python":
            continue
        # Empty lines before the code make tracebacks name the line of the README.
        code = compile("\n" * block.line + block.body, str(README), "exec")
        if block.not_run:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.output is not None:
            shown = printed.getvalue()
            assert matches(block.output, shown), _difference(block.line, block.output, shown)


# ---- the rules above hold ----------------------------------------------------------------------------------


def test_a_console_block_is_commands_with_their_output() -> None:
    page = "```console\n$ kvloom a \\\n    --b\nfirst\nsecond\n$ kvloom c\n```\n"
    assert commands_of(blocks_of(page)) == [
        Command("kvloom a --b", line=2, output="first\nsecond\n"),
        Command("kvloom c", line=6),
    ]


def test_the_status_shown_after_a_command_is_what_it_must_end_with() -> None:
    page = "```console\n$ kvloom a --typo\nerror: ...\n$ echo $?\n2\n```\n"
    assert commands_of(blocks_of(page)) == [Command("kvloom a --typo", 2, "error: ...\n", status=2)]


def test_a_bash_block_is_one_command_a_line_unless_its_output_is_shown() -> None:
    page = "```bash\n# a comment\nkvloom a \\\n  --b\nkvloom c\n```\n"
    assert [(c.text, c.line) for c in commands_of(blocks_of(page))] == [("kvloom a --b", 3), ("kvloom c", 5)]
    (shown,) = commands_of(blocks_of(page + "\n```text\nout\n```\n"))
    assert (shown.text, shown.output) == ("kvloom a --b\nkvloom c", "out\n")


def test_output_belongs_to_the_block_right_before_it_and_to_no_other() -> None:
    near, far, _ = blocks_of("```python\na\n```\n\n```text\n1\n```\n```python\nb\n```\nprose\n```text\n2\n```\n")
    assert near.output == "1\n"
    assert far.output is None


def test_a_block_is_not_run_only_with_a_reason() -> None:
    with_reason, without = blocks_of("<!-- not run: no GPU -->\n```bash\na\n```\n<!-- not run -->\n```bash\nb\n```\n")
    assert with_reason.not_run == "no GPU"
    assert without.not_run is None


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\nb\n", "a\nc\n", False),
        ("a\nb\n", "a\n", False),
        ("a\n...\nz\n", "a\nb\nc\nz\n", True),
        ("a\n...\nz\n", "a\nz\n", True),
        ("a\n...\n", "b\n", False),
        ("once...\n", "once upon\n", False),
        ("a.c\n", "abc\n", False),
        ("a  \n", "a\n\n", True),
    ],
)
def test_only_a_line_of_three_dots_stands_for_any_lines(expected: str, actual: str, same: bool) -> None:
    assert matches(expected, actual) is same


def test_a_target_that_the_makefile_lacks_is_noticed() -> None:
    _check_existence(["make", "demo"])
    with pytest.raises(AssertionError, match="no target"):
        _check_existence(["make", "coffee"])


def test_an_extra_that_the_project_lacks_is_noticed() -> None:
    _check_existence(["pip", "install", "-e", ".[dev]"])
    with pytest.raises(AssertionError, match="no extra"):
        _check_existence(["pip", "install", "kvloom[coffee]"])
