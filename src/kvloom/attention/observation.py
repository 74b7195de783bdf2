"""What retention policies want to know of a step: how much attention each held token received.

It is measured beside the attention itself (`weights`). A step that nobody observes pays nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.attention.weights import Weights
from kvloom.cache import MixedKept

if TYPE_CHECKING:
    from kvloom.attention.plan import GroupPlan

SCORES_BYTES = 2 << 20
"""The most that the float32 scores of some queries take at once."""


class Observation:
    """Attention mass of one layer group's step; each layer adds its own.

    Args:
        counts: for each source of the plan, how many of its last queries are observed.
    """

    def __init__(self, counts: tuple[int, ...]) -> None:
        self.counts = counts
        self._masses: list[Tensor | None] = [None] * len(counts)

    def masses(self) -> list[npt.NDArray[np.float32] | None]:
        """For each source float32[held], summed over its observed queries, heads and layers; None if unobserved."""
        return [None if mass is None else mass.cpu().numpy() for mass in self._masses]

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
            assert source.sight is None, "policies that observe see all that they hold"
            weights = Weights(queries, keys, plan, source, scale=scale, softcap=softcap, sinks=sinks)
            mass = _mass(weights, source.count - count, source.count, heads=queries.shape[1])
            before = self._masses[index]
            self._masses[index] = mass if before is None else before + mass


def _mass(weights: Weights, first: int, end: int, *, heads: int) -> Tensor:
    """float32[held], the attention that some queries of a source give to each token, over all heads."""
    mass = torch.zeros(weights.held, device=weights.positions.device)
    rows = max(1, SCORES_BYTES // (4 * heads * weights.held))
    for start in range(first, end, rows):
        mass += weights.of(start, min(start + rows, end)).sum(dim=(0, 1))
    return mass
