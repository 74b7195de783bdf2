"""What retention policies want to know of a step: how much attention each held token received.

The native kernels add it up behind attention itself (`native/src/observe.h`); elsewhere it is measured beside it
(`weights`). A step that nobody observes pays nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.attention.source import Source
from kvloom.attention.weights import Weights
from kvloom.blocks.runs import COUNT, FIRST
from kvloom.cache import MixedKept

if TYPE_CHECKING:
    from kvloom.attention.plan import GroupPlan

SCORES_BYTES = 2 << 20
"""The most that the float32 scores of some queries take at once."""


class _Observed(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("sources", "runs", "masses")),
        ("count", ctypes.c_int64),
    )


class NativeMasses:
    """The masses of a step's observed sources, as the native kernels add to them.

    Args:
        sources, counts: of the plan, and how many of the last queries of each are observed.
    """

    def __init__(self, sources: Sequence[Source], counts: Sequence[int]) -> None:
        seen: list[tuple[int, ...]] = []
        runs: list[npt.NDArray[np.int64]] = []
        places, self._held = 0, dict[int, slice]()
        for index, (source, count) in enumerate(zip(sources, counts, strict=True)):
            if not count:
                continue
            _check(source)
            end_row = source.first_row + source.count
            seen.append((end_row - count, end_row, sum(map(len, runs)), len(source.runs)))
            held = source.runs[:, COUNT].astype(np.int64)
            ends = places + held.cumsum()
            runs.append(np.stack([source.runs[:, FIRST], held, ends - held], axis=1))
            self._held[index] = slice(places, places := int(ends[-1]))
        self._sources = np.array(seen, dtype=np.int64)
        self._runs = np.concatenate(runs, dtype=np.int64)
        self._masses = np.zeros(places, dtype=np.float32)
        addresses = (own.ctypes.data for own in (self._sources, self._runs, self._masses))
        self._arguments = _Observed(*addresses, len(seen))

    @property
    def address(self) -> int:
        """Of `struct Observed` in `native/src/attention.h`."""
        return ctypes.addressof(self._arguments)

    def of(self, index: int) -> npt.NDArray[np.float32]:
        """float32[held], what the tokens of an observed source have received."""
        return self._masses[self._held[index]]


class Observation:
    """Attention mass of one layer group's step; each layer adds its own.

    Args:
        counts: for each source of the plan, how many of its last queries are observed.
    """

    def __init__(self, counts: tuple[int, ...]) -> None:
        self.counts = counts
        self._masses: list[Tensor | None] = [None] * len(counts)
        self._native: NativeMasses | None = None

    def masses(self) -> list[npt.NDArray[np.float32] | None]:
        """For each source float32[held], summed over its observed queries, heads and layers; None if unobserved."""
        if self._native is not None:
            return [self._native.of(index) if count else None for index, count in enumerate(self.counts)]
        return [None if mass is None else mass.cpu().numpy() for mass in self._masses]

    def native(self, sources: Sequence[Source]) -> int:
        """The address of what the native kernels add the masses of a plan's sources to, in every layer."""
        if self._native is None:
            self._native = NativeMasses(sources, self.counts)
        return self._native.address

    def add(
        self,
        queries: Tensor,
        keys: Tensor | MixedKept,
        plan: GroupPlan,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """Add a layer's masses: `reference.attention_mass`, whose arguments these are, without turned queries."""
        for index, (source, count) in enumerate(zip(plan.sources, self.counts, strict=True)):
            if not count:
                continue
            _check(source)
            weights = Weights(queries, keys, plan, source, scale=scale, softcap=softcap, sinks=sinks)
            mass = _mass(weights, source.count - count, source.count, heads=queries.shape[1])
            before = self._masses[index]
            self._masses[index] = mass if before is None else before + mass


def _check(source: Source) -> None:
    assert source.sight is None and not source.chooses, "policies that observe see, and read, all that they hold"


def _mass(weights: Weights, first: int, end: int, *, heads: int) -> Tensor:
    """float32[held], the attention that some queries of a source give to each token, over all heads."""
    mass = torch.zeros(weights.held, device=weights.positions.device)
    rows = max(1, SCORES_BYTES // (4 * heads * weights.held))
    for start in range(first, end, rows):
        mass += weights.of(start, min(start + rows, end)).sum(dim=(0, 1))
    return mass
