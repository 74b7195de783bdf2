"""What a query sees under sinks and a window: some stretches always, and the tokens just before it.

Visibility goes by token and depends on positions alone, so it is the same however a prompt is cut into chunks, and
whatever has been freed: storage follows, block by block.

Beyond the trained length queries are re-indexed, as in Xiao et al. 2024, "Efficient Streaming Language Models with
Attention Sinks", section 3.2: distances are those within the cache, not within the text. Keys are cached as their true
positions rotated them, so it is the query that is turned back, by as many tokens as are hidden between the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvloom.blocks.runs import COUNT, FIRST, OFFSET

Runs = npt.NDArray[np.int32]
Positions = npt.NDArray[np.int64]
Stretch = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """Runs that some of a step's queries read, and how.

    Attributes:
        runs: int32[runs, 4], as in a table.
        queries: the index of the first of the step's queries that reads them; all later ones do.
        seen: bool[queries, keys], or None if each query sees all.
        shift: int64[queries], how far each query is turned back; None for not at all.
        stretch: 0 for what lies near the query, else the number of the pinned stretch.
    """

    runs: Runs
    queries: int = 0
    seen: npt.NDArray[np.bool_] | None = None
    shift: Positions | None = None
    stretch: int = 0


@dataclass(frozen=True)
class Sight:
    """A window, and stretches that are seen from everywhere behind them.

    Attributes:
        always: (first, end) of each stretch, ascending, with gaps between them.
        window_tokens: a query sees this many tokens, itself included, whatever they are.
        reindexed: whether queries are turned back to distances within the cache.
        trained_tokens: then no distance reaches this many; None for no limit.
    """

    always: tuple[Stretch, ...]
    window_tokens: int
    reindexed: bool = False
    trained_tokens: int | None = None

    @property
    def exact_tokens(self) -> int:
        """How many leading queries see all that comes before them, at true distances."""
        gap = self.always[0][1] if self.always and self.always[0][0] == 0 else 0
        exact = gap + self.window_tokens
        return min(exact, self.trained_tokens) if self.reindexed and self.trained_tokens else exact

    def hides(self, query: int) -> bool:
        """Whether anything is hidden from the query at this position, or seen at another distance."""
        return query >= self.exact_tokens

    def hidden(self, query: int) -> int:
        """How many earlier tokens the query does not see."""
        border = self._border(query)
        return border - sum(_within(stretch, border) for stretch in self.always)

    def sees(self, keys: Positions, queries: Positions) -> npt.NDArray[np.bool_]:
        """bool[queries, keys]."""
        near = keys > queries[:, None] - self.window_tokens
        pinned = np.zeros(len(keys), dtype=bool)
        for first, end in self.always:
            pinned |= (keys >= first) & (keys < end)
        seen: npt.NDArray[np.bool_] = (near | pinned) & (keys <= queries[:, None])
        return seen

    def shift(self, stretch: int, queries: Positions) -> Positions:
        """int64[queries]: how far each query is turned back for the keys of a stretch that its window has left."""
        first = self.always[stretch][0]
        return np.array([self._shift(stretch, first, int(query)) for query in queries], dtype=np.int64)

    def shifts(self, keys: Positions, query: int) -> Positions:
        """int64[keys]: how far the query is turned back for each key that it sees."""
        turned = np.zeros(len(keys), dtype=np.int64)
        if self.reindexed:
            for index, (first, end) in enumerate(self.always):
                inside = (keys >= first) & (keys < min(end, self._border(query)))
                turned[inside] = self._shift(index, first, query)
        return turned

    def needed(self, firsts: Positions, ends: Positions, query: int) -> npt.NDArray[np.bool_]:
        """bool[runs]: which runs hold a token that the query sees, or a later one will."""
        needed = ends > self._border(query)
        for first, end in self.always:
            needed |= (firsts < end) & (ends > first)
        return needed

    def parts(self, runs: Runs, queries: Positions) -> list[Part]:
        """What consecutive queries of a sequence read of its runs."""
        if not self.reindexed:
            return [self._part(self._clipped(runs, queries, [(0, 0), *self.always]), queries)]
        near = self._part(self._clipped(runs, queries, [(0, 0)]), queries, near=True)
        far = [self._far(runs, queries, index) for index in range(len(self.always))]
        return [near, *(part for part in far if part is not None)]

    def _part(self, runs: Runs, queries: Positions, *, near: bool = False) -> Part:
        if len(queries) == 1:
            return Part(runs)
        keys = positions_of(runs)
        window = Sight((), self.window_tokens) if near else self
        return Part(runs, seen=window.sees(keys, queries))

    def _far(self, runs: Runs, queries: Positions, index: int) -> Part | None:
        """The stretch of that index as the queries read it whose windows have left some of it behind."""
        first, end = self.always[index]
        skipped = int(np.searchsorted(queries, first + self.window_tokens))
        queries = queries[skipped:]
        if not len(queries):
            return None
        clipped = clip(runs, first, min(end, self._border(int(queries[-1]))))
        seen = positions_of(clipped) < (queries - self.window_tokens + 1)[:, None]
        return Part(clipped, skipped, None if seen.all() else seen, self.shift(index, queries), index + 1)

    def _clipped(self, runs: Runs, queries: Positions, stretches: list[Stretch]) -> Runs:
        """The runs of the stretches and of the queries' windows, in token order."""
        border = self._border(int(queries[0]))
        parts = [clip(runs, first, min(end, border)) for first, end in stretches]
        return np.concatenate([*parts, clip(runs, border, int(queries[-1]) + 1)])

    def _border(self, query: int) -> int:
        """The first position of the query's window."""
        return max(0, query - self.window_tokens + 1)

    def _shift(self, stretch: int, first: int, query: int) -> int:
        border = self._border(query)
        hidden = max(0, border - self.always[stretch][1])
        hidden -= sum(_within(later, border) for later in self.always[stretch + 1 :])
        too_far = 0 if self.trained_tokens is None else query - first - (self.trained_tokens - 1)
        return max(0, hidden, too_far)


def clip(runs: Runs, first: int, end: int) -> Runs:
    """The part of `runs` that holds positions from `first` on and before `end`."""
    firsts = np.maximum(runs[:, FIRST], first)
    counts = np.minimum(runs[:, FIRST] + runs[:, COUNT], end) - firsts
    kept = counts > 0
    clipped: Runs = runs[kept].copy()
    clipped[:, OFFSET] += firsts[kept] - clipped[:, FIRST]
    clipped[:, FIRST], clipped[:, COUNT] = firsts[kept], counts[kept]
    return clipped


def positions_of(runs: Runs) -> Positions:
    """int64[tokens], the position of every token of `runs`."""
    counts = runs[:, COUNT].astype(np.int64)
    before = np.cumsum(counts) - counts
    return np.repeat(runs[:, FIRST] - before, counts) + np.arange(int(counts.sum()), dtype=np.int64)


def _within(stretch: Stretch, end: int) -> int:
    """Tokens of a stretch before `end`."""
    return max(0, min(stretch[1], end) - stretch[0])
