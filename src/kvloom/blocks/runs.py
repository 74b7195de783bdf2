"""Runs: `count` consecutive slots of one block, beginning at `offset` in the block.

They hold the tokens at the logical positions `first`, `first + 1`, ... Positions are stored, never derived from the
place, so that dropped tokens and forks need no special case.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int64]

BLOCK, OFFSET, COUNT, FIRST = range(4)  # columns of a run


def blocks_of(tokens: int, block_tokens: int) -> int:
    """Blocks that `tokens` consecutive tokens fill, the last one perhaps in part."""
    return -(-tokens // block_tokens)


def runs_of(positions: Slots, block_tokens: int) -> Slots:
    """int64[runs, 3]: offset, count and first position of the runs that hold ascending `positions`, a block each.

    A token's offset in its block is what it would be had every token been appended from position 0 on, so full blocks
    can be found by their prefix.
    """
    if not len(positions):
        return np.empty((0, 3), dtype=np.int64)
    breaks = np.flatnonzero((np.diff(positions) != 1) | (positions[1:] % block_tokens == 0)) + 1
    starts = np.concatenate([[0], breaks])
    firsts, counts = positions[starts], np.diff(np.concatenate([starts, [len(positions)]]))
    return np.stack([firsts % block_tokens, counts, firsts], axis=1)


def expand_runs(runs: npt.NDArray[np.int32], block_tokens: int) -> Slots:
    """int64[tokens], the slot of every token of `runs`, in token order."""
    counts = runs[:, COUNT].astype(np.int64)
    starts = runs[:, BLOCK].astype(np.int64) * block_tokens + runs[:, OFFSET]
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()), dtype=np.int64)
