"""Who works on an engine, and when."""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvloom.errors import ContextClosed
from kvloom.models import Binding


class Guard:
    """Lets one thread at a time work on a model and its cache.

    Contexts are dropped at any moment, by the garbage collector even in the middle of a step. What is to be done then
    is put off until nobody works.
    """

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._lock = threading.RLock()
        self._depth = 0
        self._put_off: deque[Callable[[], None]] = deque()
        self._closed = False

    @contextmanager
    def working(self, *, new: bool = False) -> Iterator[None]:
        """Work alone; another thread waits.

        Args:
            new: whether the work is begun here; then raises `ContextClosed` if the model was detached, and what the
                binding raises if its model cannot run now.
        """
        with self._lock:
            self._depth += 1
            try:
                if new:
                    self._check_open()
                yield
            finally:
                self._depth -= 1
                self._catch_up()

    def close(self) -> None:
        """Take on no new work, and detach from the model."""
        self._closed = True
        self._binding.detach()

    def put_off(self, work: Callable[[], None]) -> None:
        """Do `work` as soon as nobody works: now, or at the end of what runs. May be called at any moment."""
        self._put_off.append(work)
        if self._lock.acquire(blocking=False):
            try:
                self._catch_up()
            finally:
                self._lock.release()

    def catch_up_now(self) -> None:
        """Do what was put off, also what waits in reference cycles for the garbage collector; never inside a step."""
        gc.collect()
        while self._put_off:
            self._put_off.popleft()()

    def _catch_up(self) -> None:
        while self._depth == 0 and self._put_off:
            self._put_off.popleft()()

    def _check_open(self) -> None:
        if self._closed:
            raise ContextClosed("the model was detached. Attach it again.")
        self._binding.check_ready()
