"""Bookkeeping that nothing comes between: no other thread, no signal, no fork of the process.

Tables, counts and a model that runs with another attention must never be met half changed. What a signal's handler
raises, Ctrl-C above all, could come between any two lines. Within `uninterrupted` it waits for the end; within
`interruptible`, which is for what takes long and changes nothing (a forward pass, a processor of the user's), it comes
at once.

Handlers belong to the process and run in its main thread: what is put off is kept here for all.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from kvloom.errors import ForkedMidway

Handler = Callable[[int, FrameType | None], Any]

WAIT_SECONDS = 0.05
"""How long a thread waits for another before it looks whether it was interrupted."""

# The functions that those of `signal` wrap: these make enumerations of numbers, which takes longer than all the rest of
# a turn. Pythons that have them elsewhere take the time.
_raw: Any = sys.modules.get("_signal", signal)

_NUMBERS: tuple[int, ...] = tuple(
    int(getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPROF", "SIGVTALRM")
    if hasattr(signal, name)
)


class _Signals:
    """The program's handlers, while ours stands in front of them. Used in the main thread alone."""

    def __init__(self) -> None:
        self.depth = 0
        self.waiting = False
        self._handlers: dict[int, Handler] = {}
        self._came: list[tuple[Handler, int, FrameType | None]] = []

    def stand_in(self) -> None:
        """Put our handler in front of each that is a function. May be interrupted, and done again."""
        for number in _NUMBERS:
            handler = _raw.getsignal(number)
            if callable(handler) and handler != self._note:
                self._handlers[number] = handler
                _raw.signal(number, self._note)

    def step_aside(self) -> None:
        """Put the program's handlers back, but for those that it has set anew meanwhile."""
        for number, handler in self._handlers.items():
            if _raw.getsignal(number) == self._note:
                _raw.signal(number, handler)

    def hand_on(self) -> None:
        """Let the program's handlers have what came, which may raise."""
        while self._came and not self.waiting:
            handler, number, frame = self._came.pop(0)
            handler(number, frame)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append((self._handlers[number], number, frame))
        self.hand_on()


_signals = _Signals()


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


class uninterrupted:
    """Within the block what signals raise waits; it comes at the end of the outermost block."""

    def __enter__(self) -> None:
        self._applies = _in_main_thread()
        if self._applies:
            self._waited = _signals.waiting
            _signals.waiting = True
            _signals.depth += 1
            if _signals.depth == 1:
                try:
                    _signals.stand_in()
                except BaseException:
                    self.__exit__()
                    raise

    def __exit__(self, *_: object) -> None:
        if self._applies:
            _signals.depth -= 1
            _signals.waiting = self._waited
            if not _signals.depth:
                _signals.step_aside()
            _signals.hand_on()


class interruptible:
    """Within the block, inside one that is uninterrupted, what signals raise comes at once."""

    def __enter__(self) -> None:
        self._waited = _signals.waiting
        self._applies = self._waited and _in_main_thread()
        if self._applies:
            _signals.waiting = False
            try:
                _signals.hand_on()
            except BaseException:
                _signals.waiting = True
                raise

    def __exit__(self, *_: object) -> None:
        if self._applies:
            _signals.waiting = True


class Exclusive:
    """Lets one thread at a time in, as often as it wants, and keeps signals out.

    What uses these things may be dropped at any moment, by the garbage collector even in the middle of a turn: what is
    to be done then is put off until nobody works.

    A forked process has one thread, and of those of its parent neither OpenMP's pool nor whoever held the lock: it
    gets a lock of its own, and computes on one thread, since OpenMP would wait for the others for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._depth = 0  # turns, one inside the other, of the thread that works
        self._put_off: deque[Callable[[], None]] = deque()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Work alone; another thread waits. Raises `ForkedMidway` in a process that was forked within a turn."""
        try:
            with uninterrupted():
                self._take()
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1
                    self._lock.release()
        finally:
            self._catch_up_if_free()

    def put_off(self, work: Callable[[], None]) -> None:
        """Do `work` as soon as nobody works: now, or at the end of what runs. May be called at any moment."""
        self._put_off.append(work)
        self._catch_up_if_free()

    def catch_up(self) -> None:
        """Within a turn: do what was put off."""
        while self._put_off:
            self._put_off.popleft()()

    def collect(self) -> None:
        """Within a turn: do what was put off, also what waits in reference cycles for the garbage collector."""
        gc.collect()
        self.catch_up()

    def _catch_up_if_free(self) -> None:
        """Without waiting: not if another thread works, or this one does already."""
        if not self._put_off:
            return
        with uninterrupted():
            if self._forked_midway() or not self._lock.acquire(blocking=False):
                return
            try:
                if not self._depth:
                    self.catch_up()
            finally:
                self._lock.release()

    def _take(self) -> None:
        if self._forked_midway():
            raise ForkedMidway(
                "this process was forked while its parent was decoding, so what it has of model and cache is half "
                "changed. Fork between two calls, or load the model in the new process."
            )
        while not self._lock.acquire(timeout=WAIT_SECONDS):
            with interruptible():
                pass

    def _forked_midway(self) -> bool:
        """Look whether this is another process than before, and make it ready if it can be."""
        if self._process == os.getpid():
            return False
        if self._depth:
            return True
        self._lock, self._process = threading.RLock(), os.getpid()
        torch.set_num_threads(1)
        return False
