"""The requests of an engine, in order of arrival."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from kvloom.engine.admission import Blocks
from kvloom.engine.request import Request


class Requests:
    """Requests that wait, and those that run."""

    def __init__(self) -> None:
        self._all: list[Request] = []
        self._ids = itertools.count()

    def __iter__(self) -> Iterator[Request]:
        """Over those that there are now, so that they may leave meanwhile."""
        return iter(list(self._all))

    def __len__(self) -> int:
        return len(self._all)

    def add(self, request: Request) -> None:
        """Give the request a number, and let it wait."""
        request.id = next(self._ids)
        self._all.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request, if it is not forgotten yet."""
        if request in self._all:
            self._all.remove(request)

    def remove_done(self) -> None:
        """Forget those that are done."""
        self._all = [request for request in self._all if not request.done]

    @property
    def waiting(self) -> list[Request]:
        """Those that have not started."""
        return [request for request in self._all if not request.started]

    def running(self, *, cached: bool) -> list[Request]:
        """Those that have, on the cache or without it."""
        return [request for request in self._all if request.started and request.use_cache == cached]

    @property
    def reserved(self) -> list[Blocks]:
        """The worst case of each request that runs on the cache."""
        return [request.reserved for request in self.running(cached=True)]
