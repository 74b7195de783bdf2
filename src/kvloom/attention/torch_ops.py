"""Attention over the paged store on PyTorch operators: portable, no compiler needed.

Each span gives a partial result, normalised within the span, and the log-sum-exp of its scores; a row's
partial results are merged by these. A shared prefix is one matrix product for all the rows that share it.
"""

from __future__ import annotations

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
    """The same as `reference.attend`, span by span; see there for shapes."""
    if plan.whole:
        output, log_sums = _partial(queries, keys, values, plan.spans[0], scale, softcap, turn, bounds)
    else:
        output, log_sums = _merge(queries, keys, values, plan, scale, softcap, turn, bounds)
    if sinks is not None:
        # The sink adds exp(sink) to the softmax's denominator and nothing to its numerator.
        output = output * torch.sigmoid(log_sums - sinks.float())[..., None]
    return output.to(queries.dtype)


def _merge(
    queries: Tensor,
    keys: Tensor | MixedKept,
    values: Tensor | MixedKept,
    plan: GroupPlan,
    scale: float,
    softcap: float | None,
    turn: Turn | None,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [tokens, heads, value_dim] and log-sum-exp [tokens, heads], in the accumulator's dtype."""
    tokens, heads = queries.shape[:2]
    dtype = _accumulator(queries.dtype)
    output = torch.zeros(tokens, heads, values.shape[-1], dtype=dtype, device=queries.device)
    log_sums = torch.full((tokens, heads), -torch.inf, dtype=dtype, device=queries.device)
    for span in plan.spans:
        part, part_log_sums = _partial(queries, keys, values, span, scale, softcap, turn, bounds)
        before = log_sums[span.rows]
        after = torch.logaddexp(before, part_log_sums)
        old, new = (before - after).exp_()[..., None], (part_log_sums - after).exp_()[..., None]
        output[span.rows] = output[span.rows] * old + part * new
        log_sums[span.rows] = after
    return output, log_sums


def _partial(
    queries: Tensor,
    keys: Tensor | MixedKept,
    values: Tensor | MixedKept,
    span: Span,
    scale: float,
    softcap: float | None,
    turn: Turn | None,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention within one span.

    Returns:
        output [rows, heads, value_dim] and log-sum-exp float32[rows, heads].
    """
    heads, dim, kv_heads = queries.shape[1], queries.shape[2], keys.shape[0]
    own = queries[span.rows]
    if turn is not None and span.shift is not None:
        own = turn.back(own, span.shift)
    own = own.view(span.batch, -1, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    kernel = _flash if _flash_serves(queries, keys.shape[-1], values.shape[-1], softcap) else _plain
    slots = span.slots
    if isinstance(slots, Choice):
        assert bounds is not None, "a choice is made by the bounds of blocks"
        slots = _chosen(own[0, :, :, 0], slots, bounds, keys.shape[1] // bounds.shape[2])
    read_keys, read_values = (_read(kept, slots, span.native) for kept in (keys, values))
    output, log_sums = kernel(own, read_keys, read_values, span.mask, scale, softcap)
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


def _flash_serves(queries: Tensor, key_dim: int, value_dim: int, softcap: float | None) -> bool:
    """Whether PyTorch's fused CPU attention can do the work.

    It has no soft-cap, wants equal head sizes, and misreads a float32 mask where queries are float64.
    """
    return (
        queries.device.type == "cpu"
        and queries.dtype != torch.float64
        and softcap is None
        and key_dim == value_dim
        and _FLASH is not None
    )


def _flash(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | str | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's fused CPU attention, which also returns the log-sum-exp that `F.scaled_dot_product_attention` hides.

    Without a mask the heads of a group are folded into rows, so that each key is read once for all of them.
    """
    batch, kv_heads, group, rows, dim = queries.shape
    assert _FLASH is not None and softcap is None, "checked by _flash_serves"
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
