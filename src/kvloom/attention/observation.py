"""What retention policies want to know of a step: how much attention each held token received.

It is measured beside the attention itself, from the same queries and keys, so that the output is the same whether
anybody observes or not, and whichever kernel computes it. A step that nobody observes pays nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.attention.source import native_orders, written_of
from kvloom.blocks.table import expand_runs
from kvloom.cache import MixedKept
from kvloom.cache.retention.sight import positions_of

if TYPE_CHECKING:
    from kvloom.attention.plan import GroupPlan
    from kvloom.attention.source import Source

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
            mass = _mass(queries, keys, plan, source, count, scale, softcap, sinks)
            before = self._masses[index]
            self._masses[index] = mass if before is None else before + mass


def _mass(
    queries: Tensor,
    keys: Tensor | MixedKept,
    plan: GroupPlan,
    source: Source,
    count: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """float32[held], the attention that the last `count` queries of a source give to each token, over all heads."""
    assert source.sight is None, "policies that observe see all that they hold"
    kv_heads, heads = keys.shape[0], queries.shape[1]
    slots = torch.from_numpy(expand_runs(source.runs, plan.block_tokens)).to(queries.device)
    held = _Keys.of(keys, slots, plan, source)
    positions = torch.from_numpy(positions_of(source.runs)).to(queries.device)
    mass = torch.zeros(len(slots), device=queries.device)
    end = source.first_row + source.count
    rows = max(1, SCORES_BYTES // (4 * heads * len(slots)))
    for first in range(end - count, end, rows):
        own = queries[first : min(first + rows, end)]
        grouped = own.view(len(own), kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3).flatten(1, 2).float()
        scores = held.products(grouped, first - source.first_row, len(own)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = source.first_position + first - source.first_row + torch.arange(len(own), device=queries.device)
        scores = scores.masked_fill(positions > position[:, None], -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, len(own), 1)], dim=-1)
        mass += torch.softmax(scores, dim=-1)[..., : len(slots)].sum(dim=(0, 1))
    return mass


@dataclass(frozen=True)
class _Keys:
    """The keys of the tokens that a source holds, as its queries read them.

    Attributes:
        numbers: float32[kv_heads, held, dim].
        own: where blocks are sealed, float32[kv_heads, n, dim], the native numbers of the last n, which lie in the
            blocks that the step writes; else None.
        same_block: bool[count, n]: which of these lie in the block of each new token, which reads them natively.
    """

    numbers: Tensor
    own: Tensor | None = None
    same_block: Tensor | None = None

    @classmethod
    def of(cls, kept: Tensor | MixedKept, slots: Tensor, plan: GroupPlan, source: Source) -> _Keys:
        if isinstance(kept, Tensor):
            return cls(kept.index_select(1, slots).float())
        written, device = written_of(source), kept.native.device
        order = native_orders(plan.sources)[next(i for i, own in enumerate(plan.sources) if own is source)]
        blocks = torch.from_numpy(written.block_of_token).to(device)
        return cls(
            kept.sealed.read(slots, kept.native.dtype).float(),
            kept.native.index_select(1, torch.from_numpy(order).to(device)).float(),
            blocks[written.earlier :, None] == blocks,
        )

    def products(self, queries: Tensor, first: int, count: int) -> Tensor:
        """float32[heads, count, held]: of [kv_heads, group x count, dim], the source's queries from `first` on."""
        products = (queries @ self.numbers.transpose(1, 2)).view(-1, count, self.numbers.shape[1])
        if self.own is None or self.same_block is None:
            return products
        own = (queries @ self.own.transpose(1, 2)).view(-1, count, self.own.shape[1])
        before = products.shape[-1] - own.shape[-1]
        mixed = torch.where(self.same_block[first : first + count], own, products[..., before:])
        return torch.cat([products[..., :before], mixed], dim=-1)
