"""The pool: block ids, reference counts, a free list. It knows no tensors."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

BlockIds = npt.NDArray[np.int32]


class PoolExhausted(Exception):
    """More blocks were asked for than are free. The engine turns this into `CacheFull`."""

    def __init__(self, need: int, have: int) -> None:
        super().__init__(f"{need} blocks are needed and {have} are free")
        self.need = need
        self.have = have


class BlockPool:
    """`total` blocks, each free or held by one or more holders (tables, the prefix index).

    Invariant after every call: `free + referenced == total`.
    """

    def __init__(self, total: int) -> None:
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

    def allocate(self, count: int) -> BlockIds:
        """`count` free blocks, each now held once; raises `PoolExhausted` and takes none if there are fewer."""
        if count > len(self._free):
            raise PoolExhausted(count, len(self._free))
        blocks = np.array([heapq.heappop(self._free) for _ in range(count)], dtype=np.int32)
        self._references[blocks] = 1
        self.handed_out += count
        return blocks

    def acquire(self, blocks: BlockIds) -> None:
        """Add a holder to each of `blocks`, which are distinct and already held."""
        assert bool((self._references[blocks] > 0).all()), "a free block cannot be shared"
        self._references[blocks] += 1

    def release(self, blocks: BlockIds) -> None:
        """Take a holder from each of `blocks`, which are distinct; those without any become free."""
        assert bool((self._references[blocks] > 0).all()), "a block was released more often than held"
        self._references[blocks] -= 1
        for block in blocks[self._references[blocks] == 0].tolist():
            heapq.heappush(self._free, block)
