"""What rich prints on. Imported late: rich takes a while."""

from __future__ import annotations

from rich.console import Console


class PlainConsole(Console):
    """A console that leaves a closed pipe to the end of the command, like any other output.

    rich would exit with status 1, which says that something failed.
    """

    def on_broken_pipe(self) -> None:
        """Called while the `BrokenPipeError` is handled: raise it on."""
        raise
