"""Who may start: the worst case of every running request must fit beside the contexts that users hold.

Because a request reserves all that it can come to need, a running request never meets a full pool: later
requests wait instead, and one that could never fit is refused before any work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvloom.blocks.table import Slots, pieces
from kvloom.cache import KVCache
from kvloom.cache.retention import Retention
from kvloom.engine.holding import Holding, Holdings
from kvloom.engine.planner import request_blocks, shares_prompt
from kvloom.errors import CacheFull
from kvloom.models import Binding, Source

Blocks = tuple[int, ...]
"""A number of blocks for each layer group."""


class Admission:
    """Counts what may still be promised of one cache's blocks."""

    def __init__(self, cache: KVCache, holdings: Holdings, binding: Binding, *, step_tokens: int) -> None:
        self._cache = cache
        self._holdings = holdings
        self._binding = binding
        self._step_tokens = step_tokens

    def worst_case(
        self,
        *,
        prompt_tokens: int,
        new_tokens: int = 0,
        rows: int,
        context: Holding | None,
        source: Source | None = None,
        retention: Retention | None = None,
    ) -> Blocks:
        """The most blocks that a request can come to hold beyond those of its context."""
        need = request_blocks(
            self._binding,
            self._cache.layout,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rows=rows,
            step_tokens=self._step_tokens,
            retention=retention,
            source_tokens=0 if source is None else source.tokens,
        )
        if retention is not None:
            return self._under_retention(need, retention, context, prompt_tokens, new_tokens, rows)
        constant = shares_prompt(self._binding, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        if context is None or context.cached is None or not constant:
            return need
        # The context's full blocks are held already, and never copied.
        full = (max(len(table.runs) - 1, 0) for table in context.cached.tables)
        return tuple(max(own - shared, 1) for own, shared in zip(need, full, strict=True))

    def _under_retention(
        self,
        need: Blocks,
        retention: Retention,
        context: Holding | None,
        prompt_tokens: int,
        new_tokens: int,
        rows: int,
    ) -> Blocks:
        """`need`, or what the row takes beside a context's blocks: these stay held even where it lets go of them."""
        if context is None or context.cached is None or context.regime != self._binding.regime(prompt_tokens):
            return need
        begins = context.cached.retained is None
        reusable = min(prompt_tokens - 1, retention.reusable(prompt_tokens) if begins else prompt_tokens)
        start = min(reusable, context.cached.tokens)
        if not self._cache.can_truncate(context.cached, start):
            return need
        blocks = self._cache.layout.blocks_of
        beside = blocks(prompt_tokens - start) + 1 + rows * (blocks(new_tokens) + 1)
        return tuple(min(own, beside) for own in need)

    def fits(self, need: Blocks, reserved: Iterable[Blocks]) -> bool:
        """Whether `need` fits beside what is `reserved` and what users' contexts hold."""
        taken = [sum(group) for group in zip(self._holdings.claimed_blocks(), *reserved, strict=True)]
        return all(own + others <= self._cache.blocks for own, others in zip(need, taken, strict=True))

    def refuse_unless_held(self, positions: Sequence[Slots], what: str, reserved: Iterable[Blocks]) -> None:
        """Raise `CacheFull` if a context from elsewhere, which holds the tokens at `positions`, does not fit."""
        need = tuple(len(pieces(own, self._cache.layout.block_tokens)[0]) for own in positions)
        remedy = "or close contexts that are no longer needed"
        self.refuse_unless_possible(need, what, reserved=reserved, remedy=remedy)

    def refuse_unless_possible(
        self,
        need: Blocks,
        what: str,
        *,
        reserved: Iterable[Blocks] = (),
        remedy: str = "or lower max_new_tokens or the number of sequences",
    ) -> None:
        """Raise `CacheFull` with need, have and remedy if `need` does not fit."""
        if self.fits(need, reserved := list(reserved)):
            return
        layout, pool = self._cache.layout, self._cache.blocks
        held = self._holdings.claimed_blocks()
        taken = [sum(group) for group in zip(held, *reserved, strict=True)]
        worst = max(range(len(need)), key=lambda group: need[group] + taken[group])
        beside = f", {held[worst]} of them held by contexts" if held[worst] else ""
        running = f", {taken[worst] - held[worst]} reserved by running requests" if taken[worst] > held[worst] else ""
        budget = (need[worst] + taken[worst]) * layout.bytes_per_row_of_blocks
        raise CacheFull(
            f"{what} needs {need[worst]} blocks of {layout.block_tokens} tokens; the pool has {pool}{beside}{running} "
            f"({_mebibytes(self._cache.store.allocated_bytes)}). Raise budget_bytes to at least {budget:,} "
            f"({_mebibytes(budget)}), {remedy}."
        )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
