"""What people see on stderr: progress while they wait, notes, errors, a summary. Stdout stays the output's."""

from __future__ import annotations

import io
import os
import shutil
import stat
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table


def is_terminal(stream: object) -> bool:
    """Whether somebody is looking at a stream."""
    return bool(getattr(stream, "isatty", lambda: False)())


def is_file(stream: TextIO) -> bool:
    """Whether a stream goes into a file, where nobody sees it yet."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


def write_what_can_be_written() -> None:
    """Characters that the terminal's encoding lacks become question marks, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def stderr_console() -> Console:
    """A console for stderr as it is now."""
    from kvloom.cli.output.console import PlainConsole

    return PlainConsole(file=sys.stderr, highlight=False)


def stdout_console() -> Console:
    """A console for stdout as it is now."""
    from kvloom.cli.output.console import PlainConsole

    return PlainConsole(file=sys.stdout, highlight=False)


def titled_console(title: str, *facts: str) -> Console:
    """A console for stdout, on which stand a title and under it a line for each fact."""
    from rich.text import Text

    console = stdout_console()
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(Text("\n".join(facts), style="dim"), soft_wrap=True)
    return console


def complain(message: str) -> None:
    """An error: one line, wrapped only where somebody reads it in a terminal."""
    _say("kvloom", message, "red")


def note(message: str) -> None:
    """Something worth knowing that is no error."""
    _say("note", message, "yellow")


def end_line() -> None:
    """Let what the shell writes next begin on a line of its own."""
    if is_terminal(sys.stdout):
        click.echo(err=True)


def _say(label: str, message: str, colour: str) -> None:
    if is_terminal(sys.stderr):
        width = min(shutil.get_terminal_size().columns, 100)
        indent = " " * (len(label) + 2)
        lines = textwrap.wrap(message, width, initial_indent=indent, subsequent_indent="  ", break_on_hyphens=False)
        message = "\n".join(lines).lstrip()
    click.echo(f"{click.style(f'{label}:', fg=colour, bold=True)} {message}", err=True)


@contextmanager
def waiting(what: str, *, quiet: bool) -> Iterator[None]:
    """A spinner on stderr while something takes long; nothing where stderr is no terminal."""
    if quiet or not is_terminal(sys.stderr):
        yield
        return
    with stderr_console().status(what, spinner="dots"):
        yield


def progress_bar() -> Progress:
    """A bar that vanishes when it is done."""
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24, style="bright_black", complete_style="cyan", finished_style="cyan"),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
        TextColumn("[dim]{task.fields[extra]}"),
        console=stderr_console(),
        transient=True,
    )


@contextmanager
def counting_runs(what: str, *, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for work that tells what runs next, how many runs are done, and how many there are."""
    if quiet or not is_terminal(sys.stderr):
        yield None
        return
    with progress_bar() as progress:
        task = progress.add_task(what, total=1, unit="runs", extra="")

        def show_run(name: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, extra=name)

        yield show_run


def plain_table(*headings: str) -> Table:
    """A table without a frame; words stand left in the first column, figures right in the others."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table
