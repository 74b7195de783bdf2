"""Which rows run in the next step, and how many of their tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvloom.engine.request import Request, Row

STEP_TOKENS = 512
"""The most prompt tokens that a step computes, unless told otherwise."""


@dataclass(frozen=True)
class Scheduled:
    """A row and how many of its pending tokens run now."""

    request: Request
    row: Row
    count: int

    @property
    def prompt_tokens_run(self) -> int:
        """How many of the tokens belong to the prompt, once they have run."""
        end = self.row.computed
        return max(0, min(end, len(self.request.prompt_ids)) - (end - self.count))


def schedule(requests: Iterable[Request], *, step_tokens: int) -> list[Scheduled]:
    """Rows that need a single token come first; the rest of `step_tokens` goes to prompts, oldest first.

    Several rows of one request that must compute a prompt do so one after the other, so that the later ones
    find the earlier one's blocks in the prefix index.
    """
    live = [request for request in requests if request.started and not request.done]
    decode = [Scheduled(r, row, 1) for r in live for row in r.rows if row.pending == 1]
    room = max(step_tokens - len(decode), 1)
    prompts = []
    for request in live:
        row = next((row for row in request.rows if row.pending > 1), None)
        if row is not None and room > 0:
            count = min(row.pending, room)
            prompts.append(Scheduled(request, row, count))
            room -= count
    return decode + prompts
