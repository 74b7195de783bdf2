"""What one step's attention reads, as the native kernels want it: blocks of 64 positions and who reads them.

The numbers lie in one int32 buffer; `native/src/schedule.h` says what they mean.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.attention.source import Source
from kvloom.attention.turn import Turn
from kvloom.blocks.runs import COUNT, FIRST
from kvloom.cache import Reach
from kvloom.cache.retention.sight import Stretch
from kvloom.native import Library

BLOCK_POSITIONS = 64
HEADER, SET, TOKEN, STRIDE, CHOICE = 11, 4, 5, 6, 5
"""How many numbers each of these takes in `native/src/schedule.h`."""


@dataclass
class Schedule:
    """One group's schedule, and the memory in which the layers of a step work, one after the other.

    Attributes:
        numbers: int32, read by the kernels.
        memory: uint8, what they write into; grows to what the largest layer wants.
        factors: for each turn of a layer, what its queries are turned back by; made when a layer first asks.
    """

    numbers: npt.NDArray[np.int32]
    memory: Tensor
    factors: dict[Turn, TurnFactors] = field(default_factory=dict)

    @property
    def shifts(self) -> int:
        """By how many numbers of tokens queries are turned back."""
        return int(self.numbers[7])

    def reserve(self, wanted_bytes: int) -> int:
        """The address of that much memory."""
        if self.memory.numel() < wanted_bytes:
            self.memory = torch.empty(wanted_bytes, dtype=torch.uint8)
        return self.memory.data_ptr()


class _Turn(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cosines", "sines")),
        *((name, ctypes.c_int64) for name in ("pairs", "first", "interleaved")),
    )


class TurnFactors:
    """Cosines and sines of the angles by which a layer's queries are turned back in a step.

    Args:
        shifts: how many different ones there are.
    """

    def __init__(self, turn: Turn, shifts: int) -> None:
        pairs = len(turn.frequencies)
        self.numbers = np.empty(2 * shifts * pairs, dtype=np.float32)
        cosines = self.numbers.ctypes.data
        sines = cosines + self.numbers.nbytes // 2
        self.arguments = _Turn(cosines, sines, pairs, turn.first, turn.interleaved)

    @property
    def address(self) -> int:
        """Where the kernels read it."""
        return ctypes.addressof(self.arguments)


class Scheduler:
    """Makes schedules, by a function of the native library."""

    def __init__(self, library: Library) -> None:
        self._make = library.function(
            "kvloom_attention_schedule",
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
            *(ctypes.c_int64,) * 6,
            *(ctypes.c_void_p, ctypes.c_int64),
            restype=ctypes.c_int64,
        )
        pointer = ctypes.c_void_p
        self._turn = library.function("kvloom_turn_factors", pointer, pointer, ctypes.c_int64, pointer, pointer)

    def schedule(self, sources: Sequence[Source], reach: Reach, *, block_tokens: int, set_tokens: int) -> Schedule:
        """The schedule of one step and group.

        Args:
            set_tokens: how many new tokens at most go through a block together.
        """
        runs = np.concatenate([source.runs for source in sources])
        sealed = any(source.written is not None for source in sources)
        own = _own_blocks(sources) if sealed else [(0, 0, 0)] * len(sources)
        facts = np.array(
            [
                (len(s.runs), s.first_row, s.first_position, s.count, *o, *_sight(s), _limit(s))
                for s, o in zip(sources, own, strict=True)
            ],
            dtype=np.int64,
        )
        stretches = np.array([pair for s in sources for pair in _stretches(s)], dtype=np.int64)
        limits = (reach.window_tokens or 0, reach.chunk_tokens or 0, block_tokens, set_tokens, int(sealed))
        numbers = np.empty(_most_numbers(sources, set_tokens, kinds=1 + sealed), dtype=np.int32)
        read = (runs.ctypes.data, facts.ctypes.data, stretches.ctypes.data)
        need = self._make(*read, len(facts), *limits, numbers.ctypes.data, len(numbers))
        assert need <= len(numbers), "a schedule is no larger than if nothing were shared"
        return Schedule(numbers, torch.empty(0, dtype=torch.uint8))

    def turn(self, schedule: Schedule, turn: Turn | None) -> int | None:
        """The address of what a layer's queries are turned back by; None if none is."""
        if turn is None or not schedule.shifts:
            return None
        if turn not in schedule.factors:
            made = TurnFactors(turn, schedule.shifts)
            own = made.arguments
            self._turn(schedule.numbers.ctypes.data, turn.frequencies.data_ptr(), own.pairs, own.cosines, own.sines)
            schedule.factors[turn] = made
        return schedule.factors[turn].address


def _most_numbers(sources: Sequence[Source], set_tokens: int, kinds: int) -> int:
    """How many numbers a schedule has at most: as if no two sequences shared a block, and each began a set."""
    most = HEADER
    for source in sources:
        first = int(source.runs[0, FIRST]) if len(source.runs) else source.first_position
        last = source.first_position + source.count - 1
        # A sequence that has let go of much holds few blocks, which lie far from each other.
        held = len(source.runs) * (2 + int(source.runs[:, COUNT].max(initial=0)) // BLOCK_POSITIONS)
        blocks = min(last // BLOCK_POSITIONS - first // BLOCK_POSITIONS + 1, held)
        stretches = _stretches(source)
        blocks += sum((end - 1) // BLOCK_POSITIONS - first // BLOCK_POSITIONS + 1 for first, end in stretches)
        blocks *= kinds
        sets = source.count // set_tokens + 2
        turns = 2 * source.count * len(stretches)
        most += blocks * BLOCK_POSITIONS + sets * (SET + blocks * STRIDE) + source.count * TOKEN + turns
        if (limit := _limit(source)) >= 0:
            chosen = limit // BLOCK_POSITIONS + 1
            most += blocks * BLOCK_POSITIONS + len(source.runs)
            most += source.count * (SET + CHOICE + (chosen + blocks) * STRIDE)
    return most


def _limit(source: Source) -> int:
    """How much each of its new tokens may read, where it must choose; -1 if it reads all that it sees."""
    return source.read_tokens if source.read_tokens is not None and source.chooses else -1


def _sight(source: Source) -> tuple[int, ...]:
    """Numbers of `struct Source` in `native/src/reader.h`."""
    if source.sight is None or not source.hides:
        return 0, 0, 0, 0, 0
    own = source.sight
    return own.window_tokens, own.exact_tokens, len(own.always), int(own.reindexed), own.trained_tokens or 0


def _stretches(source: Source) -> tuple[Stretch, ...]:
    """What the new tokens see before their windows."""
    return source.sight.always if source.sight is not None and source.hides else ()


def _own_blocks(sources: Sequence[Source]) -> list[tuple[int, int, int]]:
    """Of each source: the first position in the blocks that the step writes, and where in native order it and the first
    new token stand."""
    earlier = [0 if source.written is None else source.written.earlier for source in sources]
    *before, total = accumulate(earlier, initial=0)
    return [
        (source.first_position - own, start, total + source.first_row)
        for source, own, start in zip(sources, earlier, before, strict=True)
    ]
