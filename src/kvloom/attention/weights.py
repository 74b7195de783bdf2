"""The weights of attention, which no kernel writes down: computed beside it, from the same queries and keys.

So the output is the same whether anybody wants to see them or not, and whichever kernel computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.attention.source import native_orders, written_of
from kvloom.blocks.runs import expand_runs
from kvloom.cache import MixedKept
from kvloom.cache.retention.sight import positions_of

if TYPE_CHECKING:
    from kvloom.attention.plan import GroupPlan
    from kvloom.attention.source import Source


class Weights:
    """What the new tokens of one source give to each token that it holds, in one layer.

    Args:
        queries: [tokens, heads, key_dim], the ragged row.
        keys: [kv_heads, slots, dim], the new tokens' written already, or what `Int8Store.write` returned.
        plan: of this layer's group; `source` is one of its sources, whose tokens see all that it holds within reach.
        scale, softcap, sinks: as of `reference.attend`.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor | MixedKept,
        plan: GroupPlan,
        source: Source,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self._dtype = torch.promote_types(queries.dtype, torch.float32)
        self._queries = queries[source.first_row : source.first_row + source.count]
        self._first_position = source.first_position
        self._reach = plan.reach
        self._scale, self._softcap, self._sinks = scale, softcap, sinks
        slots = torch.from_numpy(expand_runs(source.runs, plan.block_tokens)).to(queries.device)
        self._keys = _Keys.of(keys, slots, plan, source, self._dtype)
        self.positions = torch.from_numpy(positions_of(source.runs)).to(queries.device)

    @property
    def held(self) -> int:
        """How many tokens the source holds; `positions`, int64[held], are theirs."""
        return len(self.positions)

    def of(self, first: int, end: int) -> Tensor:
        """float32[heads, end - first, held] (float64 of a float64 model): those of some new tokens, counted from 0."""
        kv_heads, heads = self._keys.numbers.shape[0], self._queries.shape[1]
        own = self._queries[first:end]
        grouped = own.view(len(own), kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3).flatten(1, 2)
        scores = self._keys.products(grouped.to(self._dtype), first, len(own)) * self._scale
        if self._softcap is not None:
            scores = self._softcap * torch.tanh(scores / self._softcap)
        if not self._reach.cross:
            scores = scores.masked_fill(~self._visible(first, end), -torch.inf)
        if self._sinks is not None:
            sinks = self._sinks.to(self._dtype)[:, None, None].expand(-1, len(own), 1)
            scores = torch.cat([scores, sinks], dim=-1)
        return torch.softmax(scores, dim=-1)[..., : self.held]

    def _visible(self, first: int, end: int) -> Tensor:
        """bool[end - first, held]."""
        queries = self._first_position + torch.arange(first, end)
        lowest = torch.from_numpy(self._reach.first_visible(queries.numpy()))
        queries, lowest = (own.to(self.positions.device)[:, None] for own in (queries, lowest))
        return (self.positions <= queries) & (self.positions >= lowest)


@dataclass(frozen=True)
class _Keys:
    """The keys of the tokens that a source holds, as its queries read them.

    Attributes:
        numbers: float[kv_heads, held, dim].
        own: where blocks are sealed, float[kv_heads, n, dim], the native numbers of the last n, which lie in the
            blocks that the step writes; else None.
        same_block: bool[count, n]: which of these lie in the block of each new token, which reads them natively.
    """

    numbers: Tensor
    own: Tensor | None = None
    same_block: Tensor | None = None

    @classmethod
    def of(cls, kept: Tensor | MixedKept, slots: Tensor, plan: GroupPlan, source: Source, dtype: torch.dtype) -> _Keys:
        if isinstance(kept, Tensor):
            return cls(kept.index_select(1, slots).to(dtype))
        written, device = written_of(source), kept.native.device
        order = native_orders(plan.sources)[next(i for i, own in enumerate(plan.sources) if own is source)]
        blocks = torch.from_numpy(written.block_of_token).to(device)
        return cls(
            kept.sealed.read(slots, kept.native.dtype).to(dtype),
            kept.native.index_select(1, torch.from_numpy(order).to(device)).to(dtype),
            blocks[written.earlier :, None] == blocks,
        )

    def products(self, queries: Tensor, first: int, count: int) -> Tensor:
        """float[heads, count, held]: of [kv_heads, group x count, dim], the source's queries from `first` on."""
        products = (queries @ self.numbers.transpose(1, 2)).view(-1, count, self.numbers.shape[1])
        if self.own is None or self.same_block is None:
            return products
        own = (queries @ self.own.transpose(1, 2)).view(-1, count, self.own.shape[1])
        before = products.shape[-1] - own.shape[-1]
        mixed = torch.where(self.same_block[first : first + count], own, products[..., before:])
        return torch.cat([products[..., :before], mixed], dim=-1)
