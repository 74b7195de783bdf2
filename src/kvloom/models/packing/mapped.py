"""Memory that is given back to the system: pages of a checkpoint's file, as safetensors maps it, and freed memory."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor

Range = tuple[int, int]


def mapped_files() -> list[Range]:
    """The address ranges of this process that are mapped from files; empty where there is no /proc."""
    maps = Path("/proc/self/maps")
    if sys.platform != "linux" or not maps.exists():
        return []
    ranges = []
    for line in maps.read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/"):
            first, last = (int(address, 16) for address in fields[0].split("-"))
            ranges.append((first, last))
    return ranges


def drop_pages(tensor: Tensor, files: list[Range]) -> None:
    """Take a tensor's pages out of memory if they are mapped from a file, from which they can be read again.

    Nothing is lost and nothing has to be written: without this the pages of a weight that nobody reads any more
    stay resident as long as any other weight of the same file is in use.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last and any(start <= first and last <= end for start, end in files):
        # A failure only means that the pages stay.
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def give_back_freed() -> None:
    """Hand back what was freed and the C library keeps for later, where it is one that can be asked to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
