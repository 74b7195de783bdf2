"""Where the tokens of a table lie in the tensors of a store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvloom.blocks import BlockPool
from kvloom.blocks.runs import BLOCK, OFFSET, Slots, expand_runs, runs_of
from kvloom.blocks.table import Table


@dataclass(frozen=True)
class Placement:
    """How a table's tokens lie in blocks, whichever these are.

    Attributes:
        runs: int64[runs, 3], offset, count and first position of each, in token order.
        last_is_open: whether the last one's block has a place in the arena of open blocks, where there is one.
    """

    runs: Slots
    last_is_open: bool = True

    @classmethod
    def of_positions(cls, positions: Slots, block_tokens: int) -> Placement:
        """As if every token had been appended from position 0 on, and those without a position dropped."""
        return cls(runs_of(positions, block_tokens))

    @classmethod
    def of(cls, table: Table, pool: BlockPool) -> Placement:
        """As the tokens of `table` lie."""
        last_is_open = bool(table.held) and pool.open_blocks is not None and pool.is_open(int(table.blocks[-1]))
        return cls(table.runs[:, OFFSET:].astype(np.int64), last_is_open)

    def holds(self, positions: Slots, block_tokens: int) -> bool:
        """Whether the runs hold just `positions`, fit blocks of that size, and leave room if the last one is open."""
        offsets, counts, firsts = self.runs.T
        ends = offsets + counts
        before = np.cumsum(counts) - counts
        held = np.repeat(firsts - before, counts) + np.arange(int(counts.sum()))
        fits = (
            (offsets >= 0).all()
            and (ends <= block_tokens).all()
            and not (self.last_is_open and ends[-1] == block_tokens)
        )
        return bool(fits) and np.array_equal(held, positions)


@dataclass(frozen=True)
class Stored:
    """The tokens of a table, in token order: those of sealed blocks, then those that are kept natively.

    Attributes:
        sealed_slots: int64[sealed], in the pool.
        sealed_blocks: int64[runs], of the runs that they form.
        native_slots: int64[native], in the arena of open blocks; where nothing is sealed, in the pool.
    """

    sealed_slots: Slots
    sealed_blocks: Slots
    native_slots: Slots

    @classmethod
    def of(cls, table: Table, pool: BlockPool, block_tokens: int) -> Stored:
        """What `table` holds between two steps: at most its last run is in an open block."""
        runs = table.runs
        nothing = np.empty(0, dtype=np.int64)
        if pool.open_blocks is None:
            return cls(nothing, nothing, table.slots())
        is_open = bool(len(runs)) and pool.is_open(int(runs[-1, BLOCK]))
        sealed, native = (runs[:-1], runs[-1:].copy()) if is_open else (runs, runs[:0].copy())
        if is_open:
            native[0, BLOCK] = pool.open_blocks.place(int(native[0, BLOCK]))
        return cls(
            expand_runs(sealed, block_tokens), sealed[:, BLOCK].astype(np.int64), expand_runs(native, block_tokens)
        )
