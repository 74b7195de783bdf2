"""Tables that outlive their request: what stands behind a user's context."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from kvloom.cache import CachedSequence, KVCache
from kvloom.cache.retention import Retention
from kvloom.models.binding import Binding, Regime
from kvloom.models.images.media import Media
from kvloom.models.sources.source import Source


@dataclass(eq=False)
class Holding:
    """Tables kept for later use.

    Attributes:
        cached: the tables; None once they were given up. Their tokens are then computed anew when needed.
        regime: the rotary regime under which they were computed.
        claimed: whether a user holds a context on them. Unclaimed holdings are the tables of results whose
            `context` nobody has asked for; they are given up, oldest first, when blocks run short.
        owner: that context, once there is one.
    """

    cached: CachedSequence | None
    regime: Regime
    claimed: bool
    owner: weakref.ref[object] | None = None

    @property
    def is_orphan(self) -> bool:
        """Whether its context is gone. Then it is let go of, unless what lets it go was interrupted."""
        return self.owner is not None and self.owner() is None


@dataclass(frozen=True)
class Restored:
    """A context that came from a file: as `Context` has it, and a claimed holding of its tables."""

    token_ids: list[int]
    holding: Holding
    source: Source | None
    media: Media | None
    retention: Retention | None


def is_current(holding: Holding, binding: Binding) -> bool:
    """Whether the model still is the one that computed a holding's tables; False if there are none."""
    return holding.cached is not None and holding.cached.key.startswith(binding.fingerprint())


class Holdings:
    """All holdings on one cache."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._all: dict[int, Holding] = {}  # by id, oldest first

    def add(self, cached: CachedSequence, regime: Regime, *, claimed: bool) -> Holding:
        """Keep `cached`, which now belongs to the holding."""
        holding = Holding(cached, regime, claimed)
        self._all[id(holding)] = holding
        return holding

    def release(self, holding: Holding) -> None:
        """Let go of a holding's tables. May be called more than once."""
        if holding.cached is not None:
            self._cache.close(holding.cached)
            holding.cached = None
        self._all.pop(id(holding), None)

    def release_oldest_unclaimed(self) -> bool:
        """Let go of the oldest tables that no user has claimed; False if there are none."""
        oldest = next((holding for holding in self._all.values() if not holding.claimed), None)
        if oldest is not None:
            self.release(oldest)
        return oldest is not None

    def release_all(self) -> None:
        """Let go of everything."""
        for holding in list(self._all.values()):
            self.release(holding)

    def claimed_blocks(self) -> tuple[int, ...]:
        """For each layer group, the distinct blocks that users' contexts hold; then the open ones, if these count."""
        for orphan in [holding for holding in self._all.values() if holding.is_orphan]:
            self.release(orphan)
        claimed = [holding.cached for holding in self._all.values() if holding.claimed and holding.cached is not None]
        return self._cache.blocks_and_open(
            self._cache.blocks_held(claimed), max(self._cache.open_blocks_held(claimed), default=0)
        )
