"""`kvloom chat`."""

from __future__ import annotations

import difflib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.generate.show import print_piece
from kvloom.cli.group import Command
from kvloom.cli.options.params import (
    imply_sampling,
    load_model,
    model_name,
    model_options,
    model_settings,
    option,
    quiet_option,
    sampling_options,
)
from kvloom.cli.options.prompts import as_text
from kvloom.cli.options.retention import read_retention, retention_options
from kvloom.cli.options.values import Count
from kvloom.cli.output.terminal import complain, end_line, is_terminal, note
from kvloom.errors import InvalidRequest, KVLoomError
from kvloom.units import counted

if TYPE_CHECKING:
    from kvloom.conversation import Conversation

MAIN = "main"
HELP = """\
/image FILE    show an image with what you say next; may be repeated
/undo          take back the last turn
/fork NAME     branch off here, and go on in the branch
/switch NAME   go on in another branch; without a name: list them
/save FILE     write the conversation, and its keys and values beside it
/load FILE     go on from a saved conversation
/help          this list
/quit          end, as does Ctrl-D
//text         say "/text"
Ctrl-C stops an answer; what was said so far stays."""


@click.command(cls=Command)
@option("--system", metavar="TEXT", section="Conversation", help="A system message. Needs a chat template.")
@option(
    "--max-new-tokens",
    metavar="N",
    type=Count(min=1),
    default=512,
    show_default=True,
    section="Conversation",
    help="The most tokens of an answer; less where the model's context ends.",
)
@option(
    "--image",
    "images",
    metavar="PATH",
    multiple=True,
    section="Conversation",
    help="Show an image-text model this image with the first turn; /image shows one later. May be repeated.",
)
@quiet_option("Conversation", no="notes, no line about each turn")
@sampling_options
@retention_options
@model_options
def chat(system: str | None, images: tuple[str, ...], quiet: bool, **options: Any) -> None:
    """Talk with a model.

    Each line is a turn. The model's chat template wraps it; without one the model goes on from the text as it stands. A
    turn computes its new tokens only, and says so. Lines that begin with / are commands: /help lists them.

    \b
    kvloom chat --model Qwen/Qwen2.5-0.5B-Instruct --system "Answer briefly."
    """
    settings = model_settings(options)
    retention = read_retention(options)
    given = {name: value for name, value in options.items() if value is not None}
    imply_sampling(given)
    lm = load_model(quiet=quiet, retention=retention, **settings)
    from kvloom.conversation import Conversation

    conversation = Conversation(lm, system and as_text(system, what="`--system`"), given)
    if not quiet:
        plain = "" if conversation.has_template else " It has no chat template: it goes on from your text as it stands."
        note(f"talking with {model_name(settings['model'])}; /help lists the commands.{plain}")
    talking = _Chat(conversation, quiet=quiet)
    for path in images:
        talking.show(path)
    talking.run()


class _Chat:
    """The branches of a conversation, and what is typed."""

    def __init__(self, conversation: Conversation, *, quiet: bool) -> None:
        self._branches = {MAIN: conversation}
        self._branch = MAIN
        self._quiet = quiet
        self._shown: list[str] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "image": self._image,
            "undo": self._undo,
            "fork": self._fork,
            "switch": self._switch,
            "save": self._save,
            "load": self._load,
            "help": lambda _: click.echo(HELP, err=True),
        }

    @property
    def _now(self) -> Conversation:
        return self._branches[self._branch]

    def show(self, path: str) -> None:
        """Show an image with the next turn."""
        self._shown.append(self._now.readable_image(path))

    def run(self) -> None:
        """Take lines until there are no more."""
        while (line := self._read()) is not None:
            if line.strip() == "/quit":
                return
            try:
                self._take(line)
            except KVLoomError as error:
                complain(str(error))

    def _read(self) -> str | None:
        """A line; None at the end of input."""
        if not is_terminal(sys.stdin):
            line = sys.stdin.readline()
            return line.removesuffix("\n") if line else None
        import readline  # noqa: F401 - input() edits lines, and remembers them, once it is imported

        sys.stdout.flush()
        while True:
            try:
                return input("> " if self._branch == MAIN else f"{self._branch}> ")
            except EOFError:
                click.echo(err=True)
                return None
            except KeyboardInterrupt:
                click.echo("\n/quit or Ctrl-D ends.", err=True)

    def _take(self, line: str) -> None:
        """A command, or a turn."""
        line = as_text(line, what="the line")
        if not line.strip():
            return
        if line.startswith("/") and not line.startswith("//"):
            name, _, argument = line[1:].partition(" ")
            command = self._commands.get(name)
            if command is None:
                close = difflib.get_close_matches(name, self._commands, n=1)
                hint = f"Did you mean `/{close[0]}`?" if close else "/help lists the commands."
                raise InvalidRequest(f"unknown command `/{name}`. {hint}")
            command(argument.strip())
            return
        self._say(line.removeprefix("/") if line.startswith("//") else line)

    def _say(self, text: str) -> None:
        """One turn; Ctrl-C ends the answer after the token that is being computed."""
        start = time.perf_counter()
        shown = ""
        with _interruptible() as stopped:
            for piece in self._now.say(text, images=self._shown, stop=stopped):
                print_piece(piece)
                shown += piece
        self._shown = []
        if not shown.endswith("\n"):
            click.echo()
        if stopped() and is_terminal(sys.stderr):
            note("stopped.")
        self._tell(time.perf_counter() - start)

    def _tell(self, seconds: float) -> None:
        last = self._now.last
        if self._quiet or last is None:
            return
        usage = last.usage
        facts = (
            f"{usage.computed_prompt_tokens:,} tokens computed, {usage.cached_prompt_tokens:,} from the cache, "
            f"{usage.new_tokens:,} new, {seconds:.1f} s"
        )
        click.echo(click.style(facts, dim=True), err=True)

    def _image(self, name: str) -> None:
        if not name:
            raise InvalidRequest("/image needs the name of a file: /image FILE.")
        self.show(name)
        note(f"{counted(len(self._shown), 'image')} will be shown with what you say next.")

    def _undo(self, _: str) -> None:
        turn = self._now.undo()
        note(f"took back {turn.said!r}; {self._now.tokens:,} tokens are left.")

    def _fork(self, name: str) -> None:
        if not name or name in self._branches:
            there = f"there is a branch `{name}` already" if name else "a branch needs a name"
            raise InvalidRequest(f"{there}: /fork NAME, with a name of its own.")
        self._branches[name] = self._now.fork()
        self._branch = name
        note(f"in `{name}` now; /switch {MAIN} goes back." if len(self._branches) == 2 else f"in `{name}` now.")

    def _switch(self, name: str) -> None:
        if not name:
            for own, conversation in self._branches.items():
                here = "*" if own == self._branch else " "
                click.echo(f"{here} {own}: {_turns(conversation)}, {conversation.tokens:,} tokens", err=True)
            return
        if name not in self._branches:
            raise InvalidRequest(f"there is no branch `{name}`. Switch to one of {', '.join(self._branches)}.")
        self._branch = name
        note(f"in `{name}` now: {_turns(self._now)}.")

    def _save(self, name: str) -> None:
        file = _file(name, "/save")
        try:
            self._now.save(file)
        except OSError as error:
            raise InvalidRequest(f"`{file}` cannot be written: {error.strerror}. Name another file.") from error
        note(f"saved {_turns(self._now)} in {file}.")

    def _load(self, name: str) -> None:
        reason = self._now.load(_file(name, "/load"))
        note(f"{_turns(self._now)}, {self._now.tokens:,} tokens from the cache.")
        if reason is not None:
            note(f"keys and values are computed anew with the next turn: {reason}")


def _turns(conversation: Conversation) -> str:
    return counted(len(conversation.turns), "turn")


def _file(name: str, command: str) -> Path:
    if not name:
        raise InvalidRequest(f"{command} needs the name of a file: {command} FILE.")
    return Path(name).expanduser()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C is noted and the second interrupts; hands out whether there was one."""
    asked = False

    def note_it(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, note_it)
    try:
        yield lambda: asked
    except KeyboardInterrupt:
        end_line()
    finally:
        signal.signal(signal.SIGINT, before)
