"""What one sequence of a step reads, and parts of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvloom.blocks.runs import COUNT, FIRST, OFFSET
from kvloom.cache import Written
from kvloom.cache.landing import native_order
from kvloom.cache.retention import Sight

Runs = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """What one sequence of the step reads: its runs, and where its new tokens stand.

    Attributes:
        runs: int32[runs, 4] of the sequence's table, the new tokens included; of cross-attention its source's.
        first_row: the ragged row's index of its first new token.
        first_position: that token's logical position.
        count: its new tokens.
        sight: what a retention policy lets them see of the runs; None if all of it.
        read_tokens: the most tokens that each of them may read, in whole blocks of its choice; None for no limit.
        written: the blocks that they lie in, where full blocks are sealed: of these a row reads its own natively.
    """

    runs: Runs
    first_row: int
    first_position: int
    count: int
    sight: Sight | None = None
    read_tokens: int | None = None
    written: Written | None = None

    @property
    def chooses(self) -> bool:
        """Whether they hold more than they may read."""
        return self.read_tokens is not None and int(self.runs[:, COUNT].sum()) > self.read_tokens

    @property
    def hides(self) -> bool:
        """Whether something is hidden from any of them, or seen at another distance."""
        return self.sight is not None and self.sight.hides(self.first_position + self.count - 1)

    @property
    def queries(self) -> Rows:
        """int64[count], the positions of its new tokens."""
        return self.first_position + np.arange(self.count)


def behind_its_runs(source: Source) -> Source:
    """The same with new tokens that stand behind all that it reads: none of it lies ahead of them, as in a source."""
    last = source.runs[-1]
    return replace(source, first_position=int(last[FIRST]) + int(last[COUNT]))


def from_position(runs: Runs, position: int) -> Runs:
    """The part of `runs` that holds the tokens at `position` and beyond; FIRST of a cut run moves along."""
    if not len(runs) or int(runs[0, FIRST]) >= position:
        return runs
    kept = runs[runs[:, FIRST] + runs[:, COUNT] > position].copy()
    if len(kept) and kept[0, FIRST] < position:
        cut = position - int(kept[0, FIRST])
        kept[0, OFFSET] += cut
        kept[0, COUNT] -= cut
        kept[0, FIRST] = position
    return kept


def before_position(runs: Runs, position: int) -> Runs:
    """The part of `runs` that holds the tokens before `position`."""
    kept = runs[runs[:, FIRST] < position]
    if len(kept) and kept[-1, FIRST] + kept[-1, COUNT] > position:
        kept = kept.copy()
        kept[-1, COUNT] = position - kept[-1, FIRST]
    return kept


def written_of(source: Source) -> Written:
    """The blocks that the step writes for a source."""
    assert source.written is not None, "where blocks are sealed, a source says which blocks its tokens lie in"
    return source.written


def native_orders(sources: Sequence[Source]) -> list[Rows]:
    """For each source, int64[tokens]: where the tokens of the blocks that the step writes stand in native order."""
    earlier = np.array([written_of(source).earlier for source in sources], dtype=np.int64)
    before = np.cumsum(earlier) - earlier
    return [
        native_order(written_of(source), int(start), int(earlier.sum()) + source.first_row)
        for source, start in zip(sources, before, strict=True)
    ]
