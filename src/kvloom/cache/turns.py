"""Whose turn it is to work on a cache, and when what was dropped meanwhile is closed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

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

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Work alone; another thread waits. A turn has no turns inside."""
        with self._exclusive.turn():
            self._exclusive.catch_up()
            yield

    def drop(self, sequences: Sequence[CachedSequence]) -> None:
        """Close sequences that nobody uses any more: now, or behind the turn that runs. May be called at any moment."""
        self._exclusive.put_off(partial(self._close, sequences))

    def collect(self) -> None:
        """Within a turn whose blocks do not suffice: close what waits in reference cycles for the garbage collector."""
        self._exclusive.collect()

    def _close(self, sequences: Sequence[CachedSequence]) -> None:
        for sequence in sequences:
            self._cache.close(sequence)
