"""What one step's attention reads, as the native kernels want it: blocks of 64 positions and who reads them.

The numbers lie in one int32 buffer; `native/src/schedule.h` says what they mean.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.attention.source import Source
from kvloom.blocks.table import FIRST
from kvloom.cache import Reach
from kvloom.native import Library

BLOCK_POSITIONS = 64
HEADER, SET, TOKEN, STRIDE = 8, 4, 4, 5
"""How many numbers each of these takes in `native/src/schedule.h`."""


@dataclass
class Schedule:
    """One group's schedule, and the memory in which the layers of a step work, one after the other.

    Attributes:
        numbers: int32, read by the kernels.
        memory: uint8, what they write into; grows to what the largest layer wants.
    """

    numbers: npt.NDArray[np.int32]
    memory: Tensor

    def reserve(self, wanted_bytes: int) -> int:
        """The address of that much memory."""
        if self.memory.numel() < wanted_bytes:
            self.memory = torch.empty(wanted_bytes, dtype=torch.uint8)
        return self.memory.data_ptr()


class Scheduler:
    """Makes schedules, by a function of the native library."""

    def __init__(self, library: Library) -> None:
        self._make = library.function(
            "kvloom_attention_schedule",
            *(ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_int64,) * 6,
            *(ctypes.c_void_p, ctypes.c_int64),
            restype=ctypes.c_int64,
        )

    def schedule(self, sources: Sequence[Source], reach: Reach, *, block_tokens: int, set_tokens: int) -> Schedule:
        """The schedule of one step and group.

        Args:
            set_tokens: how many new tokens at most go through a block together.
        """
        runs = np.concatenate([source.runs for source in sources])
        sealed = any(source.written is not None for source in sources)
        own = _own_blocks(sources) if sealed else [(0, 0, 0)] * len(sources)
        facts = np.array(
            [(len(s.runs), s.first_row, s.first_position, s.count, *o) for s, o in zip(sources, own, strict=True)],
            dtype=np.int64,
        )
        limits = (reach.window_tokens or 0, reach.chunk_tokens or 0, block_tokens, set_tokens, int(sealed))
        numbers = np.empty(_most_numbers(sources, set_tokens, kinds=1 + sealed), dtype=np.int32)
        need = self._make(runs.ctypes.data, facts.ctypes.data, len(facts), *limits, numbers.ctypes.data, len(numbers))
        assert need <= len(numbers), "a schedule is no larger than if nothing were shared"
        return Schedule(numbers, torch.empty(0, dtype=torch.uint8))


def _most_numbers(sources: Sequence[Source], set_tokens: int, kinds: int) -> int:
    """How many numbers a schedule has at most: as if no two sequences shared a block, and each began a set."""
    most = HEADER
    for source in sources:
        first = int(source.runs[0, FIRST]) if len(source.runs) else source.first_position
        last = source.first_position + source.count - 1
        blocks = (last // BLOCK_POSITIONS - first // BLOCK_POSITIONS + 1) * kinds
        sets = source.count // set_tokens + 2
        most += blocks * BLOCK_POSITIONS + sets * (SET + blocks * STRIDE) + source.count * TOKEN
    return most


def _own_blocks(sources: Sequence[Source]) -> list[tuple[int, int, int]]:
    """Of each source: the first position in the blocks that the step writes, and where in native order it and the first
    new token stand."""
    earlier = [0 if source.written is None else source.written.earlier for source in sources]
    *before, total = accumulate(earlier, initial=0)
    return [
        (source.first_position - own, start, total + source.first_row)
        for source, own, start in zip(sources, earlier, before, strict=True)
    ]
