"""What a cache hands out: one sequence's tables, and what a step has added to those of several."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvloom.blocks import Append, BlockPool, PrefixIndex, Table
from kvloom.blocks.runs import Slots
from kvloom.cache.layout import LayerGroup
from kvloom.cache.retention import Retained


@dataclass
class GroupCache:
    """Pool and prefix index of one layer group."""

    group: LayerGroup
    pool: BlockPool
    index: PrefixIndex

    def ensure_free(self, count: int) -> None:
        """Reclaim idle blocks until `count` are free, as far as there are any."""
        if self.pool.free < count:
            self.index.reclaim(count - self.pool.free)


class CachedSequence:
    """One sequence's tables, one a layer group, and what its retention policy knows of it (None without one).

    Made by `KVCache.open` and `fork`. `foreign` if it began with keys and values that this model has not computed, so
    that nothing of it may be found by others. `key` is a digest of what its keys and values come from besides tokens:
    weights that were changed since are not those that it was computed with.
    """

    def __init__(
        self, tables: list[Table], retained: Retained | None = None, *, foreign: bool = False, key: bytes = b""
    ) -> None:
        self.tables = tables
        self.retained = retained
        self.foreign = foreign
        self.key = key

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are in the cache, or were before they left a window."""
        return self.tables[0].position

    @property
    def exact_tokens(self) -> int:
        """How many of the first ones have the keys and values of full attention, as this model computes it."""
        if self.foreign:
            return 0
        limit = None if self.retained is None else self.retained.exact_tokens
        return self.tokens if limit is None else min(limit, self.tokens)


@dataclass(frozen=True)
class Extension:
    """The slots of one step's new tokens.

    Attributes:
        sequences: the sequences that were extended, in the order of the ragged row.
        counts: new tokens of each.
        appends: for each layer group, one `Append` a sequence; none for cross-attention, which only reads.
    """

    sequences: tuple[CachedSequence, ...]
    counts: tuple[int, ...]
    appends: tuple[tuple[Append, ...], ...]

    def slots(self, group: int) -> Slots:
        """int64[tokens], where the ragged row's keys and values go in `group`; none in cross-attention's."""
        return np.concatenate([np.empty(0, dtype=np.int64), *(append.slots for append in self.appends[group])])
