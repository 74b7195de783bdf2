"""Where the new tokens of a step land when full blocks are sealed.

A block that the step fills is sealed within the step, before attention: later tokens of the same step read it as
codes, as they would had it been filled long ago. The tokens of the block itself read it natively.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.blocks import BlockPool
from kvloom.blocks.runs import BLOCK, COUNT, FIRST, OFFSET, Slots, expand_runs

Runs = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Landing:
    """One step's new tokens in one layer group.

    "Native order" numbers all tokens of the blocks that the step writes: first those that were there before it,
    sequence by sequence, then the new ones, in the order of the ragged row.

    Attributes:
        earlier_slots: int64[earlier], arena slots of those that were there before.
        filled_blocks: int64[filled], the blocks that the step fills.
        filled_from: int64[filled, block_tokens], what each is sealed from, in native order. A slot that holds nothing
            is sealed from the block's first token.
        open_rows, open_slots: int64[n] each: new tokens of blocks that stay open, by row of the ragged row, and where
            in the arena they go.
    """

    earlier_slots: Tensor
    filled_blocks: Tensor
    filled_from: Tensor
    open_rows: Tensor
    open_slots: Tensor

    @property
    def device(self) -> torch.device:
        """Where the indices lie."""
        return self.earlier_slots.device


@dataclass(frozen=True)
class Written:
    """The blocks of one table that a step writes.

    Attributes:
        runs: int32[runs, 4], all of the table's runs in these blocks, the tokens that were there before included.
        new: how many of their tokens are new, the last ones.
        earlier_slots: int64[earlier], arena slots of the others.
        open_slots: int64[n], arena slots of those that lie in the last block, if it stays open.
        block_tokens: tokens a block.
    """

    runs: Runs
    new: int
    earlier_slots: Slots
    open_slots: Slots
    block_tokens: int

    @classmethod
    def of(cls, runs: Runs, new: int, pool: BlockPool, block_tokens: int) -> Written:
        """What a step wrote that has extended a table of `runs` by `new` tokens and is not yet committed."""
        assert pool.open_blocks is not None, "only a pool that counts places has open blocks"
        places = pool.open_blocks
        own = _written_runs(runs, new)
        block, offset, count, _ = own[0].tolist()
        if len(own) == 1 and places.is_open(block):
            # So it is in most decode steps, where what NumPy needs to begin with would cost more than all the rest.
            start = places.place(block) * block_tokens + offset
            slots = np.arange(start, start + count)
            still_open = offset + count < block_tokens
            return cls(own, new, slots[: count - new], slots if still_open else slots[:0], block_tokens)

        def arena_slots(some: Runs) -> Slots:
            moved = some.copy()
            moved[:, BLOCK] = [places.place(int(block)) for block in some[:, BLOCK]]
            return expand_runs(moved, block_tokens)

        earlier = int(own[:, COUNT].sum()) - new
        first = own[own[:, BLOCK] == own[0, BLOCK]]
        last = own[own[:, BLOCK] == own[-1, BLOCK]]
        return cls(
            runs=own,
            new=new,
            earlier_slots=arena_slots(first)[:earlier] if earlier else np.empty(0, np.int64),
            open_slots=arena_slots(last)
            if last[-1, OFFSET] + last[-1, COUNT] < block_tokens
            else np.empty(0, np.int64),
            block_tokens=block_tokens,
        )

    @property
    def earlier(self) -> int:
        """Tokens that were there before."""
        return len(self.earlier_slots)

    @cached_property
    def block_of_token(self) -> Slots:
        """int64[tokens]: the how-manieth of these blocks each token lies in."""
        return np.repeat(np.cumsum(np.diff(self.runs[:, BLOCK], prepend=self.runs[0, BLOCK]) != 0), self.runs[:, COUNT])

    @property
    def fills(self) -> bool:
        """Whether any of these blocks is full now."""
        return len(self.runs) > 1 or not len(self.open_slots)

    @property
    def filled(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """int32[filled] block ids, and int64[filled, block_tokens]: the index among these tokens of each slot's."""
        blocks = self.runs[np.flatnonzero(np.diff(self.runs[:, BLOCK], prepend=-1)), BLOCK]
        count = len(blocks) - bool(len(self.open_slots))
        offsets = expand_runs(self.runs, self.block_tokens) % self.block_tokens
        firsts = np.searchsorted(self.block_of_token, np.arange(count))
        index = np.repeat(firsts[:, None], self.block_tokens, axis=1)
        inside = self.block_of_token < count
        index[self.block_of_token[inside], offsets[inside]] = np.flatnonzero(inside)
        return blocks[:count], index


def land(written: Sequence[Written], device: torch.device | str) -> Landing:
    """The landing of a step, from what it writes of each table, in the order of the ragged row."""
    earlier = sum(own.earlier for own in written)
    kept, blocks, sources, rows, slots = ([np.empty(0, dtype=np.int64)] for _ in range(5))
    before, first_row = 0, earlier
    for own in written:
        kept.append(own.earlier_slots)
        if own.fills:
            filled, index = own.filled
            blocks.append(filled.astype(np.int64))
            sources.append(native_order(own, before, first_row)[index].ravel())
        # Of the tokens in the block that stays open, the new ones.
        if fresh := min(own.new, len(own.open_slots)):
            end = first_row - earlier + own.new
            rows.append(np.arange(end - fresh, end))
            slots.append(own.open_slots[-fresh:])
        before, first_row = before + own.earlier, first_row + own.new
    # One tensor, and so one copy to a device.
    lengths = [sum(map(len, parts)) for parts in (kept, blocks, sources, rows, slots)]
    numbers = torch.from_numpy(np.concatenate([*kept, *blocks, *sources, *rows, *slots])).to(device)
    earlier_slots, filled_blocks, filled_from, open_rows, open_slots = numbers.split_with_sizes(lengths)
    block_tokens = written[0].block_tokens if written else 1
    return Landing(earlier_slots, filled_blocks, filled_from.view(-1, block_tokens), open_rows, open_slots)


def _written_runs(runs: Runs, new: int) -> Runs:
    """All runs that lie in the blocks of the last `new` tokens."""
    if new <= runs[-1, COUNT] and (len(runs) == 1 or runs[-2, BLOCK] != runs[-1, BLOCK]):
        return runs[-1:]
    first_new = int(runs[-1, FIRST] + runs[-1, COUNT]) - new
    ends = runs[:, FIRST] + runs[:, COUNT]
    block = runs[int(np.searchsorted(ends, first_new, side="right")), BLOCK]
    return runs[int(np.flatnonzero(runs[:, BLOCK] == block)[0]) :]


def native_order(own: Written, before: int, first_row: int) -> Slots:
    """int64[tokens]: where each token of `own` stands in native order.

    Args:
        before: earlier tokens of the tables before this one. first_row: where its first new token stands.
    """
    return np.concatenate([before + np.arange(own.earlier), first_row + np.arange(own.new)])
