"""How the command ends: one clear line for an error, "did you mean" for a typo, quiet on Ctrl-C and closed pipes."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from click.exceptions import Exit, NoArgsIsHelpError

from kvloom.cli.output.terminal import complain, end_line, write_what_can_be_written
from kvloom.errors import KVLoomError

WRONG_USE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
FAILED = 1


class Loom(click.Group):
    """The group of commands, and the end of each."""

    def main(self, *arguments: Any, **extra: Any) -> Any:
        """Run a command and leave with its exit status."""
        write_what_can_be_written()
        try:
            status = super().main(*arguments, **{**extra, "standalone_mode": False})
        except NoArgsIsHelpError as help_page:
            click.echo(help_page.format_message(), err=True)
            sys.exit(WRONG_USE)
        except click.Abort:
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            complain(_one_line(error))
            sys.exit(WRONG_USE)
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command; whatever it raises on purpose becomes a line and an exit status."""
        with _ended_well(ctx):
            result = super().invoke(ctx)
            sys.stdout.flush()
        return result

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command, or say which was probably meant."""
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            hint = _did_you_mean(args[0], self.list_commands(ctx), ctx)
            raise click.UsageError(f"unknown command `{args[0]}`.{hint}")
        return super().resolve_command(ctx, args)


class Option(click.Option):
    """An option that stands under a heading of the help page."""

    def __init__(self, *arguments: Any, section: str = "Other options", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.section = section


class Command(click.Command):
    """A command whose help page lists the options under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section, in the order of definition."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(parameter, "section", "Other options"), []).append(record)
        # click adds --help itself; it comes last.
        for title, records in sorted(sections.items(), key=lambda item: item[0] == "Other options"):
            with formatter.section(title):
                formatter.write_dl(records, col_max=27)


@contextmanager
def _ended_well(ctx: click.Context) -> Iterator[None]:
    try:
        yield
    except KVLoomError as error:
        complain(in_words_of_the_command(str(error), ctx))
        raise Exit(WRONG_USE) from error
    except KeyboardInterrupt as interrupt:
        end_line()
        raise Exit(INTERRUPTED) from interrupt
    except BrokenPipeError as closed:
        _discard_output()
        raise Exit(BROKEN_PIPE) from closed
    except OSError as error:
        # A full disk, a file that may not be written: the user's to mend, and no trace of ours helps with that.
        _discard_output()
        complain(_reason(error))
        raise Exit(FAILED) from error


def _reason(error: OSError) -> str:
    what = f" `{error.filename}`" if error.filename else ""
    return f"{error.strerror or error}{what and ':'}{what}."


def _discard_output() -> None:
    """Nobody reads any more; without this the interpreter would complain when it flushes at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        return


def _one_line(error: click.ClickException) -> str:
    if isinstance(error, click.NoSuchOption):
        ctx = error.ctx
        known = [] if ctx is None else [name for own in ctx.command.get_params(ctx) for name in _names(own)]
        return f"unknown option `{error.option_name}`.{_did_you_mean(error.option_name, known, ctx)}"
    message = " ".join(error.format_message().split())
    return message[:1].lower() + message[1:]


def _names(parameter: click.Parameter) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts] if isinstance(parameter, click.Option) else []


def _did_you_mean(name: str, known: Sequence[str], ctx: click.Context | None) -> str:
    close = [other for other in known if name.strip("-") and other.startswith(name)]
    # Without their dashes, which would make any two short options look alike.
    bare = {other.lstrip("-"): other for other in known}
    close += [bare[own] for own in difflib.get_close_matches(name.replace("_", "-").lstrip("-"), bare, n=1)]
    if close:
        return f" Did you mean `{close[0]}`?"
    return f" See `{'kvloom' if ctx is None else ctx.command_path} --help`."


# ---- the library's words in those of the command -----------------------------------------------------------------


def in_words_of_the_command(message: str, ctx: click.Context) -> str:
    """A message of the library with the command's options in place of the library's arguments."""
    flags = _flags(ctx)

    def assignment(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"].strip("'\"")
        if name not in flags:
            return match[0]
        if value in ("True", "False"):
            return f"`{_switch(flags[name], value == 'True')}`"
        return f"`{flags[name]} {value}`"

    message = message.replace("For greedy decoding set `do_sample=False`.", "For greedy decoding leave it out.")
    message = re.sub(r"`(?P<name>\w+)=(?P<value>[^`]+)`", assignment, message)
    message = re.sub(r"\b(?P<name>\w+)=(?P<value>'[^']*'|[\d,]*\d)", assignment, message)
    message = re.sub(r"`(\w+)`", lambda match: f"`{flags.get(match[1], match[1])}`", message)
    # Outside of backticks a name without an underscore is an ordinary word.
    return re.sub(r"\b([a-z]+(?:_[a-z]+)+)\b", lambda match: flags.get(match[1], match[1]), message)


def _flags(ctx: click.Context) -> dict[str, str]:
    """The option for each argument of the library; parameters are named after these."""
    command = ctx.command
    if isinstance(command, click.Group) and ctx.invoked_subcommand is not None:
        command = command.get_command(ctx, ctx.invoked_subcommand) or command
    return {own.name: own.opts[-1] for own in command.params if isinstance(own, click.Option) and own.name}


def _switch(flag: str, on: bool) -> str:
    if flag == "--early-stopping":
        return f"{flag} {str(on).lower()}"
    return flag if on else flag.replace("--", "--no-", 1)
