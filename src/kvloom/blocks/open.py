"""Open blocks: those that are still written, where full ones are kept in another way (a codec).

An open block's tokens lie in their native dtype at a place of their own, in an arena that has far fewer places
than the pool has blocks. A block that is full is sealed: its place goes to another, and it is never written again.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

BlockIds = npt.NDArray[np.int32]

_SEALED = -1


class OpenBlocks:
    """Which blocks of a pool are open, and at which of `places` places each of them lies."""

    def __init__(self, blocks: int, places: int) -> None:
        self._place = np.full(blocks, _SEALED, dtype=np.int32)
        self._free = list(range(places))
        self._total = places

    @property
    def total(self) -> int:
        """Blocks that can be open at once."""
        return self._total

    @property
    def free(self) -> int:
        """How many more could be."""
        return len(self._free)

    def is_open(self, block: int) -> bool:
        """Whether `block` may still be written."""
        return int(self._place[block]) != _SEALED

    def open_among(self, blocks: BlockIds) -> BlockIds:
        """Those of `blocks` that are open."""
        found: BlockIds = blocks[self._place[blocks] != _SEALED]
        return found

    def place(self, block: int) -> int:
        """Where an open block lies."""
        assert self.is_open(block), "a sealed block has no place"
        return int(self._place[block])

    def open(self, blocks: BlockIds) -> None:
        """Give each of `blocks`, which are new, the lowest free place."""
        for block in blocks.tolist():
            assert not self.is_open(block), "a block is opened once"
            self._place[block] = heapq.heappop(self._free)

    def seal(self, blocks: BlockIds) -> None:
        """Take the places of those of `blocks` that are open."""
        for block in self.open_among(blocks).tolist():
            heapq.heappush(self._free, int(self._place[block]))
            self._place[block] = _SEALED
