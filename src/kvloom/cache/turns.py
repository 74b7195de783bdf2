"""Whose turn it is to work on a cache, and when what was dropped meanwhile is closed."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvloom.cache.cache import KVCache
from kvloom.cache.sequence import CachedSequence
from kvloom.exclusive import Exclusive


class Turns:
    """One thread at a time works on a cache, and sequences are closed between two turns alone.

    Forks and contexts are dropped at any moment, by the garbage collector even in the middle of a turn, where their
    blocks must stay what they are.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._exclusive = Exclusive()
        self._dropped: deque[Sequence[CachedSequence]] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Work alone; another thread waits. A turn has no turns inside."""
        try:
            with self._exclusive.turn():
                self._close_dropped()
                yield
        finally:
            self._close_if_nobody_works()

    def drop(self, sequences: Sequence[CachedSequence]) -> None:
        """Close sequences that nobody uses any more: now, or behind the turn that runs. May be called at any moment."""
        self._dropped.append(sequences)
        self._close_if_nobody_works()

    def collect(self) -> None:
        """Within a turn whose blocks do not suffice: close what waits in reference cycles for the garbage collector."""
        gc.collect()
        self._close_dropped()

    def _close_if_nobody_works(self) -> None:
        if self._dropped:
            with self._exclusive.turn_if_free() as free:
                if free:
                    self._close_dropped()

    def _close_dropped(self) -> None:
        while self._dropped:
            for sequence in self._dropped.popleft():
                self._cache.close(sequence)
