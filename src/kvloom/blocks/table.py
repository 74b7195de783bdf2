"""A table: what one sequence holds in one layer group, an ordered list of runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvloom.blocks.open import BlockIds
from kvloom.blocks.pool import BlockPool
from kvloom.blocks.runs import BLOCK, COUNT, FIRST, OFFSET, Slots, blocks_of, expand_runs


@dataclass(frozen=True)
class BlockCopy:
    """Tokens that must be copied before a shared block's new owner writes: `count` slots from `offset` on."""

    source: int
    target: int
    offset: int
    count: int


@dataclass(frozen=True)
class Append:
    """What one `Table.append` did, and all that is needed to undo it.

    Attributes:
        slots: int64[count], where the new tokens' keys and values go, in token order.
        copies: at most one copy-on-write, to be carried out before the slots are written.
    """

    slots: Slots
    copies: tuple[BlockCopy, ...]
    runs_before: int
    last_run_before: npt.NDArray[np.int32] | None
    position_before: int
    allocated: BlockIds


class Table:
    """The runs of one sequence in one layer group. Appending to a shared block copies it first."""

    def __init__(self, pool: BlockPool, block_tokens: int) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._storage = np.empty((8, 4), dtype=np.int32)
        self._count = 0
        self._position = 0

    @property
    def position(self) -> int:
        """Logical position of the next token to be appended."""
        return self._position

    @property
    def held(self) -> int:
        """Tokens that the table holds; fewer than `position` once some were dropped."""
        return int(self.runs[:, COUNT].sum())

    @property
    def first_held(self) -> int:
        """The lowest position that the table holds; `position` if it holds none."""
        return int(self._storage[0, FIRST]) if self._count else self._position

    @property
    def runs(self) -> npt.NDArray[np.int32]:
        """int32[runs, 4]: block, offset, count and first position of each run, in token order."""
        return self._storage[: self._count]

    @property
    def blocks(self) -> BlockIds:
        """int32[runs], the block of each run."""
        return self.runs[:, BLOCK]

    @property
    def full_blocks(self) -> int:
        """Blocks that no append writes, as many as tokens without gaps would fill; the last one is not counted.

        A sealed block that was cut holds fewer tokens than it could: what it leaves empty is taken off.
        """
        if not self._count:
            return 0
        empty = self._block_tokens - self.runs[:, OFFSET] - self.runs[:, COUNT]
        lost = int(empty[:-1].sum()) + (0 if self._pool.is_open(self._last_block()) else int(empty[-1]))
        return max(self._count - 1 - blocks_of(lost, self._block_tokens), 0)

    def slots(self) -> Slots:
        """int64[held], the slot of each token held, in token order."""
        return expand_runs(self.runs, self._block_tokens)

    def positions(self) -> Slots:
        """int64[held], the logical position of each token held, in token order."""
        counts = self.runs[:, COUNT].astype(np.int64)
        before = np.cumsum(counts) - counts
        return np.repeat(self.runs[:, FIRST] - before, counts) + np.arange(int(counts.sum()), dtype=np.int64)

    def blocks_for(self, count: int) -> int:
        """How many blocks `append(count)` would take from the pool, a copy-on-write included."""
        room = self._room()
        copied = 1 if count and room and self._pool.is_shared(self._last_block()) else 0
        return copied + blocks_of(max(0, count - room), self._block_tokens)

    def append(self, count: int) -> Append:
        """Make room for `count` more tokens.

        Raises `PoolExhausted`, with nothing changed, if the pool has too few free blocks.
        """
        assert count > 0, "an append holds at least one token"
        room = self._room()
        copy_on_write = bool(room) and self._pool.is_shared(self._last_block())
        ends_inside = count > room and bool((count - room) % self._block_tokens)
        opened = [*([0] if copy_on_write else []), *([-1] if ends_inside else [])]
        allocated = self._pool.allocate(self.blocks_for(count), opened=opened)
        runs_before, position_before = self._count, self._position
        last_run_before = self.runs[-1].copy() if runs_before else None
        copies: tuple[BlockCopy, ...] = ()
        fresh = allocated
        if copy_on_write:
            copies = (self._own_last_block(int(allocated[0])),)
            fresh = allocated[1:]
        slots = self._fill_last(min(count, room))
        if count > room:
            slots = np.concatenate([slots, self._add_runs(fresh, count - room)])
        return Append(slots, copies, runs_before, last_run_before, position_before, allocated)

    def undo(self, append: Append) -> None:
        """Take back `append`, the last change of this table: runs, positions and counts are as before it."""
        self._count = append.runs_before
        self._position = append.position_before
        if append.last_run_before is not None:
            self._storage[self._count - 1] = append.last_run_before
            if append.copies:
                self._pool.acquire(append.last_run_before[BLOCK : BLOCK + 1])
        self._pool.release(append.allocated)

    def seal(self, append: Append) -> None:
        """Seal the block that `append` went on with, if that is full now: from now on nobody writes it."""
        if self._pool.open_blocks is not None and append.runs_before:
            block, offset, count, _ = self._storage[append.runs_before - 1].tolist()
            if offset + count == self._block_tokens:
                self._pool.open_blocks.seal(np.array([block], dtype=np.int32))

    def share(self, blocks: BlockIds, *, first: int = 0, unused: int = 0) -> None:
        """Start an empty table with full blocks that others hold, for the positions from `first` on.

        Args:
            unused: slots at the end of the last block that hold nothing; such a table is not appended to.
        """
        assert not self._count, "only an empty table can adopt a prefix"
        self._pool.acquire(blocks)
        self._reserve(len(blocks))
        self._count = len(blocks)
        self.runs[:, BLOCK] = blocks
        self.runs[:, OFFSET] = 0
        self.runs[:, COUNT] = self._block_tokens
        self.runs[:, FIRST] = first + self._block_tokens * np.arange(len(blocks))
        self._position = first + self._block_tokens * len(blocks) - unused
        if unused:
            self.runs[-1, COUNT] -= unused

    def place(self, runs: Slots, *, end: int, last_is_open: bool = True) -> Slots:
        """Start an empty table with room for runs that lie as they are told to, each in a new block.

        Args:
            runs: int64[runs, 3], offset, count and first position of each, in token order; see `runs_of`.
            end: the position of the next token to be appended.
            last_is_open: whether the last one's block is to be written on.

        Returns:
            int64[tokens], the slots. Raises `PoolExhausted`, with nothing changed, if there are too few free blocks.
        """
        assert not self._count and (not len(runs) or runs[-1, 1:].sum() <= end), "only an empty table can be placed"
        blocks = self._pool.allocate(len(runs), opened=[-1] if last_is_open and len(runs) else [])
        self._reserve(len(blocks))
        self._count, self._position = len(blocks), end
        self.runs[:, BLOCK] = blocks
        self.runs[:, OFFSET:] = runs
        return self.slots()

    def fork(self) -> Table:
        """A new table with the same runs. No tensor moves; the cost is one vectorised increment."""
        child = Table(self._pool, self._block_tokens)
        self._pool.acquire(self.blocks)
        child._storage = np.concatenate([self.runs, np.empty((4, 4), dtype=np.int32)])
        child._count, child._position = self._count, self._position
        return child

    def unsealed_length(self, position: int) -> int:
        """The greatest position up to `position` at which no sealed block is cut."""
        if self._pool.open_blocks is None or position == self._position:
            return position
        held = int(np.searchsorted(self.runs[:, FIRST], position, side="left"))
        if not held or self._pool.is_open(int(self._storage[held - 1, BLOCK])):
            return position
        first, count = self._storage[held - 1, FIRST], self._storage[held - 1, COUNT]
        return position if position >= first + count else int(first)

    def truncate(self, position: int) -> None:
        """Forget the tokens at `position` and beyond."""
        assert 0 <= position <= self._position, "a table is truncated to a position that it has reached"
        keep = int(np.searchsorted(self.runs[:, FIRST], position, side="left"))
        self._pool.release(self.blocks[keep:].copy())
        self._count = keep
        if keep:
            last = self._storage[keep - 1]
            last[COUNT] = min(int(last[COUNT]), position - int(last[FIRST]))
        self._position = position

    def drop_before(self, position: int) -> int:
        """Free the runs that lie wholly before `position`; returns how many blocks the table let go.

        Where full blocks are sealed, a block that is still being filled stays: what it is sealed from must not depend
        on how many tokens were appended at a time.
        """
        ends = self.runs[:, FIRST] + self.runs[:, COUNT]
        gone = int(np.searchsorted(ends, position, side="right"))
        if self._pool.open_blocks is not None and gone == self._count and self._room():
            gone -= 1
        if gone:
            self._pool.release(self.blocks[:gone].copy())
            self._storage = self._storage[gone:].copy()
            self._count -= gone
        return gone

    def keep(self, kept: npt.NDArray[np.bool_]) -> None:
        """Let go of the runs, by index, that are not `kept`. Positions of the others are as before."""
        if kept.all():
            return
        self._pool.release(self.blocks[~kept])
        self._storage = self.runs[kept]
        self._count = len(self._storage)

    def holds(self, first: int, end: int) -> bool:
        """Whether every position from `first` on and before `end` is held."""
        firsts, ends = self.runs[:, FIRST], self.runs[:, FIRST] + self.runs[:, COUNT]
        return int(np.maximum(np.minimum(ends, end) - np.maximum(firsts, first), 0).sum()) >= end - first

    def close(self) -> None:
        """Let go of every block."""
        self._pool.release(self.blocks.copy())
        self._count = 0

    def _last_block(self) -> int:
        return int(self._storage[self._count - 1, BLOCK])

    def _room(self) -> int:
        """Slots left in the last block, if the next token continues its run."""
        if not self._count:
            return 0
        block, offset, count, first = self._storage[self._count - 1].tolist()
        if first + count != self._position or not self._pool.is_open(block):
            return 0
        return self._block_tokens - int(offset) - int(count)

    def _own_last_block(self, target: int) -> BlockCopy:
        """Replace the shared last block by `target`."""
        source, offset, count, _ = self._storage[self._count - 1].tolist()
        self._pool.release(self.blocks[-1:].copy())
        self._storage[self._count - 1, BLOCK] = target
        return BlockCopy(source, target, offset, count)

    def _fill_last(self, count: int) -> Slots:
        """Use `count` free slots of the last block."""
        if not count:
            return np.empty(0, dtype=np.int64)
        last = self._storage[self._count - 1]
        start = int(last[BLOCK]) * self._block_tokens + int(last[OFFSET]) + int(last[COUNT])
        last[COUNT] += count
        self._position += count
        return np.arange(start, start + count, dtype=np.int64)

    def _add_runs(self, blocks: BlockIds, count: int) -> Slots:
        """Add one run a block, for `count` tokens."""
        self._reserve(len(blocks))
        runs = self._storage[self._count : self._count + len(blocks)]
        steps = self._block_tokens * np.arange(len(blocks))
        runs[:, BLOCK] = blocks
        runs[:, OFFSET] = 0
        runs[:, COUNT] = np.minimum(self._block_tokens, count - steps)
        runs[:, FIRST] = self._position + steps
        self._count += len(blocks)
        self._position += count
        return expand_runs(runs, self._block_tokens)

    def _reserve(self, extra: int) -> None:
        need = self._count + extra
        if need > len(self._storage):
            grown = np.empty((max(need, 2 * len(self._storage)), 4), dtype=np.int32)
            grown[: self._count] = self.runs
            self._storage = grown
