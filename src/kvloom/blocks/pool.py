"""The pool: block ids, reference counts, a free list. It knows no tensors."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from kvloom.blocks.open import BlockIds, OpenBlocks


class PoolExhausted(Exception):
    """More blocks were asked for than are free. The engine turns this into `CacheFull`."""

    def __init__(self, need: int, have: int, *, what: str = "blocks") -> None:
        super().__init__(f"{need} {what} are needed and {have} are free")
        self.need = need
        self.have = have


class BlockPool:
    """`total` blocks, each free or held by one or more holders (tables, the prefix index).

    Invariant after every call: `free + referenced == total`.

    Args:
        open_places: how many blocks may be open at once; None if a block stays open for as long as it is held.

    Attributes:
        open_blocks: which blocks are open, and where; None without `open_places`.
    """

    def __init__(self, total: int, *, open_places: int | None = None) -> None:
        self.open_blocks = None if open_places is None else OpenBlocks(total, open_places)
        self._references = np.zeros(total, dtype=np.int32)
        # A heap hands out the lowest free id, so that a long prompt tends to lie in one contiguous run,
        # which attention can read as a view.
        self._free = list(range(total))
        self.handed_out = 0
        """Blocks that `allocate` has given in all; where it stands still, nobody holds a block that is new to them."""

    @property
    def total(self) -> int:
        """Blocks in the pool."""
        return int(self._references.shape[0])

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def referenced(self) -> int:
        """Blocks with at least one holder."""
        return int(np.count_nonzero(self._references))

    @property
    def references(self) -> BlockIds:
        """int32[total], holders of each block; a view that must not be written."""
        view = self._references.view()
        view.flags.writeable = False
        return view

    def is_shared(self, block: int) -> bool:
        """Whether more than one holder reads this block, so that nobody may write it."""
        return bool(self._references[block] > 1)

    def is_open(self, block: int) -> bool:
        """Whether `block` may be written by its only holder."""
        return self.open_blocks is None or self.open_blocks.is_open(block)

    def allocate(self, count: int, *, opened: Sequence[int] = ()) -> BlockIds:
        """`count` free blocks, each now held once; raises `PoolExhausted` and takes none if there are fewer.

        Args:
            opened: which of them, by index, are not filled at once. Where places are counted, these get one.
        """
        if not count:
            return np.empty(0, dtype=np.int32)
        if count > len(self._free):
            raise PoolExhausted(count, len(self._free))
        if self.open_blocks is not None and len(opened) > self.open_blocks.free:
            raise PoolExhausted(len(opened), self.open_blocks.free, what="open blocks")
        blocks = np.array([heapq.heappop(self._free) for _ in range(count)], dtype=np.int32)
        self._references[blocks] = 1
        self.handed_out += count
        if self.open_blocks is not None:
            self.open_blocks.open(blocks[list(opened)])
        return blocks

    def acquire(self, blocks: BlockIds) -> None:
        """Add a holder to each of `blocks`, which are distinct and already held."""
        held = self._references[blocks]
        assert held.all(), "a free block cannot be shared"
        self._references[blocks] = held + 1

    def release(self, blocks: BlockIds) -> None:
        """Take a holder from each of `blocks`, which are distinct; those without any become free."""
        if not len(blocks):
            return
        held = self._references[blocks]
        assert held.all(), "a block was released more often than held"
        self._references[blocks] = held - 1
        freed = blocks[held == 1]
        if self.open_blocks is not None:
            self.open_blocks.seal(freed)
        for block in freed.tolist():
            heapq.heappush(self._free, block)
