"""How fast this machine reads memory: what a decode step, which reads every weight once, is measured against."""

from __future__ import annotations

import ctypes
import time

import torch

from kvloom.native.library import Library

BUFFER_BYTES = 256 << 20
"""More than the caches of most machines."""
PASSES = 7


def memory_bandwidth(library: Library, *, threads: int) -> float:
    """Bytes a second, the best of several passes of all `threads` over one large buffer."""
    read = library.function("kvloom_read", ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, restype=ctypes.c_float)
    ask = library.function("kvloom_ask_for_large_pages", ctypes.c_void_p, ctypes.c_int64)
    numbers = torch.empty(BUFFER_BYTES // 4)
    ask(numbers.data_ptr(), numbers.nbytes)
    numbers.zero_()
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        read(numbers.data_ptr(), len(numbers), threads)
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds)
