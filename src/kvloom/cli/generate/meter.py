"""Counts what the engine tells, for a progress bar and for the speed in the summary."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvloom.cli.output.terminal import progress_bar

if TYPE_CHECKING:
    from rich.progress import Progress

    from kvloom.engine import Event


class Meter:
    """Listens to one request.

    Args:
        prompt_tokens, new_tokens: of the request; the latter at most.
        rows: sequences that are decoded at once; None for beams, whose speed is told in steps.
        bar: whether to draw a bar, on stderr.
    """

    def __init__(self, *, prompt_tokens: int, new_tokens: int, rows: int | None, bar: bool) -> None:
        self._prompt_tokens = prompt_tokens
        self._new_tokens = new_tokens
        self._rows = rows
        self._steps = 0
        self._first_token_at = self._last_token_at = time.perf_counter()
        self._progress: Progress | None = progress_bar() if bar else None
        if self._progress is not None:
            self._task = self._progress.add_task("prefill", total=prompt_tokens, unit="tokens", extra="")

    def __call__(self, event: Event) -> None:
        """Take an event of the engine."""
        from kvloom.engine import StepDone

        if not isinstance(event, StepDone):
            return
        if event.decoded_rows:
            self._last_token_at = time.perf_counter()
            if not self._steps:
                self._first_token_at = self._last_token_at
            self._steps += 1
        if self._progress is not None:
            self._draw(self._progress, event.pending_prompt_tokens)

    def start(self) -> None:
        """Draw the bar, if there is one."""
        if self._progress is not None:
            self._progress.start()

    @property
    def speed(self) -> str:
        """How fast tokens came, from the first one on; empty if there was but one."""
        seconds = self._last_token_at - self._first_token_at
        if self._steps < 2 or seconds <= 0:
            return ""
        steps = (self._steps - 1) / seconds
        return f"{steps:,.1f} steps/s" if self._rows is None else f"{steps * self._rows:,.1f} tokens/s"

    def stop(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _draw(self, progress: Progress, pending: int) -> None:
        if not self._steps:
            # What was found in the cache is not pending, and counts as done.
            progress.update(self._task, completed=self._prompt_tokens - pending)
            return
        progress.update(
            self._task, description="decode", completed=self._steps, total=self._new_tokens, extra=self.speed
        )
