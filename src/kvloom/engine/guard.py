"""Who works on an engine, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvloom.errors import ContextClosed
from kvloom.exclusive import Exclusive
from kvloom.models import Binding


class Guard:
    """Lets one thread at a time work on a model and its cache.

    Contexts are dropped at any moment, by the garbage collector even in the middle of a step. What is to be done then
    is put off until nobody works. So is what signals raise, but for the parts of a step that are `interruptible`.
    """

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._exclusive = Exclusive()
        self._closed = False

    @contextmanager
    def working(self, *, new: bool = False) -> Iterator[None]:
        """Work alone; another thread waits.

        Args:
            new: whether the work is begun here; then raises `ContextClosed` if the model was detached, and what the
                binding raises if its model cannot run now.
        """
        with self._exclusive.turn():
            if new:
                self._check_open()
            yield

    def close(self) -> None:
        """Take on no new work, and detach from the model."""
        self._closed = True
        self._binding.detach()

    def put_off(self, work: Callable[[], None]) -> None:
        """Do `work` as soon as nobody works: now, or at the end of what runs. May be called at any moment."""
        self._exclusive.put_off(work)

    def catch_up_now(self) -> None:
        """Do what was put off, also what waits in reference cycles for the garbage collector; never inside a step."""
        self._exclusive.collect()

    def _check_open(self) -> None:
        if self._closed:
            raise ContextClosed("the model was detached. Attach it again.")
        self._binding.check_ready()
