"""Attention over the paged store on PyTorch operators: portable, no compiler needed.

Each span gives a partial result, normalised within the span, and the log-sum-exp of its scores; a row's
partial results are merged by these. A shared prefix is one matrix product for all the rows that share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.attention.plan import GroupPlan
from kvloom.attention.spans import Choice, Span
from kvloom.attention.turn import Turn
from kvloom.cache import MixedKept


def attend(
    queries: Tensor,
    keys: Tensor | MixedKept,
    values: Tensor | MixedKept,
    plan: GroupPlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    turn: Turn | None = None,
    bounds: Tensor | None = None,
) -> Tensor:
    """The same as `reference.attend`, span by span; see there for shapes.

    Args:
        bounds: [2, kv_heads, blocks, key_dim], the least and the largest of each block's keys, for sources that choose.
    """
    layer = _Layer(queries, keys, values, scale, softcap, turn, bounds)
    output, log_sums = _partial(layer, plan.spans[0]) if plan.whole else _merge(layer, plan)
    if sinks is not None:
        # The sink adds exp(sink) to the softmax's denominator and nothing to its numerator.
        output = output * torch.sigmoid(log_sums - sinks.float())[..., None]
    return output.to(queries.dtype)


@dataclass(frozen=True, eq=False)
class _Layer:
    """The arguments of `attend` but for the plan."""

    queries: Tensor
    keys: Tensor | MixedKept
    values: Tensor | MixedKept
    scale: float
    softcap: float | None
    turn: Turn | None
    bounds: Tensor | None


def _merge(layer: _Layer, plan: GroupPlan) -> tuple[Tensor, Tensor]:
    """Output [tokens, heads, value_dim] and log-sum-exp [tokens, heads], in the accumulator's dtype."""
    tokens, heads = layer.queries.shape[:2]
    dtype, device = _accumulator(layer.queries.dtype), layer.queries.device
    output = torch.zeros(tokens, heads, layer.values.shape[-1], dtype=dtype, device=device)
    log_sums = torch.full((tokens, heads), -torch.inf, dtype=dtype, device=device)
    for span in plan.spans:
        part, part_log_sums = _partial(layer, span)
        before = log_sums[span.rows]
        after = torch.logaddexp(before, part_log_sums)
        old, new = (before - after).exp_()[..., None], (part_log_sums - after).exp_()[..., None]
        output[span.rows] = output[span.rows] * old + part * new
        log_sums[span.rows] = after
    return output, log_sums


def _partial(layer: _Layer, span: Span) -> tuple[Tensor, Tensor]:
    """Attention within one span.

    Returns:
        output [rows, heads, value_dim] and log-sum-exp [rows, heads], as sums are kept.
    """
    heads, dim, kv_heads = layer.queries.shape[1], layer.queries.shape[2], layer.keys.shape[0]
    own = layer.queries[span.rows]
    if layer.turn is not None and span.shift is not None:
        own = layer.turn.back(own, span.shift)
    own = own.view(span.batch, -1, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    slots = span.slots
    if isinstance(slots, Choice):
        assert layer.bounds is not None, "a choice is made by the bounds of blocks"
        slots = _chosen(own[0, :, :, 0], slots, layer.bounds, layer.keys.shape[1] // layer.bounds.shape[2])
    keys, values = (_read(kept, slots, span.native) for kept in (layer.keys, layer.values))
    if _flash_serves(layer):
        output, log_sums = _flash(own, keys, values, span.mask, layer.scale)
    else:
        output, log_sums = _plain(own, keys, values, span.mask, layer.scale, layer.softcap)
    output = output.permute(0, 3, 1, 2, 4).reshape(-1, heads, output.shape[-1])
    return output, log_sums.permute(0, 3, 1, 2).reshape(-1, heads)


def _read(kept: Tensor | MixedKept, slots: slice | Tensor, native: bool = False) -> Tensor:
    """[batch, kv_heads, keys, dim]: a view of consecutive slots, or a gather of int64[batch, keys].

    Slots int64[kv_heads, keys, 1] are those of each head. Codes become numbers here.
    """
    if isinstance(kept, MixedKept) and not native:
        return _decoded(kept, slots)
    store = kept.native if isinstance(kept, MixedKept) else kept
    if isinstance(slots, slice):
        return store[None, :, slots]
    if slots.dim() == 3:
        return store.gather(1, slots.expand(-1, -1, store.shape[-1]))[None]
    batch, keys = slots.shape
    gathered = store.index_select(1, slots.flatten())
    return gathered.view(store.shape[0], batch, keys, -1).transpose(0, 1)


def _decoded(kept: MixedKept, slots: slice | Tensor) -> Tensor:
    """The same of sealed blocks."""
    dtype = kept.native.dtype
    if isinstance(slots, slice):
        return kept.sealed.read(slots, dtype)[None]
    if slots.dim() == 3:
        return kept.sealed.read_by_head(slots, dtype)[None]
    read = kept.sealed.read(slots.flatten(), dtype)
    return read.view(read.shape[0], *slots.shape, -1).transpose(0, 1)


def _chosen(query: Tensor, choice: Choice, bounds: Tensor, block_tokens: int) -> Tensor:
    """int64[kv_heads, keys, 1], the slots that each KV head reads for a query, [kv_heads, group, dim].

    No key of a block scores more than the sum over channels of the larger of query x least and query x largest value.
    """
    least, largest = bounds[:, :, choice.blocks].float()
    query = query.float()
    most = query.clamp(min=0) @ largest.transpose(1, 2) + query.clamp(max=0) @ least.transpose(1, 2)
    best = most.amax(dim=1).topk(choice.take, dim=-1).indices.sort(dim=-1).values
    slots = choice.blocks[best][..., None] * block_tokens + torch.arange(block_tokens, device=best.device)
    always = choice.always.expand(len(best), -1)
    return torch.cat([slots.flatten(1), always], dim=1)[..., None]


def _plain(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | str | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The formula. Queries [batch, kv_heads, group, rows, dim], keys [batch, kv_heads, keys, dim]."""
    batch, kv_heads, group, rows, dim = queries.shape
    dtype = _accumulator(queries.dtype)
    folded = queries.reshape(batch, kv_heads, group * rows, dim).to(dtype) * scale
    scores = (folded @ keys.to(dtype).transpose(-1, -2)).view(batch, kv_heads, group, rows, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if isinstance(mask, str):
        causal = torch.ones(rows, scores.shape[-1], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, -torch.inf)
    elif mask is not None:
        scores = scores + mask[:, None, None]
    log_sums = torch.logsumexp(scores, dim=-1)
    weights = (scores - log_sums[..., None]).exp()
    output = weights.view(batch, kv_heads, group * rows, -1) @ values.to(dtype)
    return output.view(batch, kv_heads, group, rows, -1), log_sums


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _flash_serves(layer: _Layer) -> bool:
    """Whether PyTorch's fused CPU attention can do the work.

    It has no soft-cap, wants equal head sizes, and misreads a float32 mask where queries are float64.
    """
    return (
        layer.queries.device.type == "cpu"
        and layer.queries.dtype != torch.float64
        and layer.softcap is None
        and layer.keys.shape[-1] == layer.values.shape[-1]
        and _FLASH is not None
    )


def _flash(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | str | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's fused CPU attention: it gives the log-sum-exp that `F.scaled_dot_product_attention` hides.

    Without a mask the heads of a group are folded into rows, so that each key is read once for all of them.
    """
    batch, kv_heads, group, rows, dim = queries.shape
    assert _FLASH is not None, "checked by _flash_serves"
    if mask is None:
        folded = queries.reshape(batch, kv_heads, group * rows, dim)
        output, log_sums = _FLASH(folded, keys, values, 0.0, False, scale=scale)
    else:
        shape = (batch, kv_heads, group, keys.shape[2], dim)
        output, log_sums = _FLASH(
            queries.reshape(batch, kv_heads * group, rows, dim),
            keys[:, :, None].expand(shape).flatten(1, 2),
            values[:, :, None].expand(shape).flatten(1, 2),
            0.0,
            isinstance(mask, str),
            attn_mask=None if isinstance(mask, str) else mask[:, None],
            scale=scale,
        )
    return output.reshape(batch, kv_heads, group, rows, -1), log_sums.reshape(batch, kv_heads, group, rows)


def _find_flash() -> torch._ops.OpOverloadPacket | None:
    """The operator is not public API: without it the plain formula serves."""
    return getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


_FLASH = _find_flash()
