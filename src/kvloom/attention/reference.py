"""The specification of attention over the paged store: one query at a time, float32, no cleverness.

It reads the tables, not the spans, so that it is an oracle for the plan as well as for the kernels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvloom.attention.plan import GroupPlan
from kvloom.attention.source import Source, native_orders
from kvloom.attention.turn import Turn
from kvloom.blocks.runs import BLOCK, COUNT, FIRST, expand_runs
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
) -> Tensor:
    """Scaled dot-product attention of each new token over what its sequence holds and it may see.

    Args:
        queries: [tokens, heads, key_dim], the ragged row.
        keys, values: [kv_heads, slots, dim], one layer of the store, the new tokens already written; or, where blocks
            are sealed, what `Int8Store.write` returned: then a token reads the blocks before its own as codes.
        plan: the step's plan for this layer's group.
        scale: factor on the scores.
        softcap: if set, scores become softcap * tanh(score / softcap) (Gemma 2).
        sinks: [heads], if set, a score that takes part in the softmax and has no value (GPT-OSS).
        turn: how queries turn with their positions, for sources that see some tokens at other distances.

    Returns:
        [tokens, heads, value_dim], in the dtype of `queries`.
    """
    output = torch.empty(*queries.shape[:2], values.shape[-1], dtype=torch.float32, device=queries.device)
    for number, source in enumerate(plan.sources):
        for index in range(source.count):
            row = source.first_row + index
            own_keys, own_values = (_numbers(kept, plan, number, index) for kept in (keys, values))
            seen, shifts = _visible(plan, source, source.first_position + index)
            for head in range(queries.shape[1]):
                group = queries.shape[1] // keys.shape[0]
                kv_head = head // group
                if source.chooses:
                    group_queries = queries[row, kv_head * group : (kv_head + 1) * group]
                    seen = _chosen(group_queries, own_keys[kv_head], plan, source, index)
                    shifts = np.zeros(len(seen), dtype=np.int64)
                keys_seen = own_keys[kv_head, seen]
                weights = _weights(queries[row, head], keys_seen, shifts, scale, softcap, turn, sinks, head)
                output[row, head] = weights @ own_values[kv_head, seen].float()
    return output.to(queries.dtype)


def attention_mass(
    queries: Tensor,
    keys: Tensor | MixedKept,
    plan: GroupPlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> list[Tensor]:
    """For each source, float32[held]: the attention that its observed queries give to each token, over all heads.

    Arguments as of `attend`; what the queries do not see gets none.
    """
    assert plan.observation is not None, "only observed queries have a mass"
    masses = []
    for number, (source, observed) in enumerate(zip(plan.sources, plan.observation.counts, strict=True)):
        mass = torch.zeros(int(source.runs[:, COUNT].sum()))
        for index in range(source.count - observed, source.count):
            numbers = _numbers(keys, plan, number, index)
            seen, shifts = _visible(plan, source, source.first_position + index)
            for head in range(queries.shape[1]):
                own = numbers[head * keys.shape[0] // queries.shape[1], seen]
                query = queries[source.first_row + index, head]
                mass[seen] += _weights(query, own, shifts, scale, softcap, None, sinks, head)
        masses.append(mass)
    return masses


def _numbers(kept: Tensor | MixedKept, plan: GroupPlan, number: int, index: int) -> Tensor:
    """[kv_heads, held, dim]: what the `index`-th new token of the `number`-th source reads of each token held.

    Where blocks are sealed: native numbers of the block that it lies in, codes of those before it.
    """
    source = plan.sources[number]
    slots = torch.from_numpy(expand_runs(source.runs, plan.block_tokens))
    if isinstance(kept, Tensor):
        return kept[:, slots.to(kept.device)]
    numbers = kept.sealed.read(slots.to(kept.native.device), kept.native.dtype)
    blocks = np.repeat(source.runs[:, BLOCK], source.runs[:, COUNT])
    own = np.flatnonzero(blocks == blocks[len(blocks) - source.count + index])
    order = native_orders(plan.sources)[number]
    numbers[:, own] = kept.native[:, order[own - (len(blocks) - len(order))]]
    return numbers


def _visible(plan: GroupPlan, source: Source, position: int) -> tuple[Tensor, np.ndarray]:
    """int64[seen], which of the tokens held the query at a position sees, and how far it is turned back for each."""
    positions = _positions(source)
    if plan.reach.cross:
        return torch.arange(len(positions)), np.zeros(len(positions), dtype=np.int64)
    low = int(plan.reach.first_visible(np.array([position]))[0])
    seen = (positions >= low) & (positions <= position)
    if source.sight is None:
        return torch.from_numpy(np.flatnonzero(seen)), np.zeros(int(seen.sum()), dtype=np.int64)
    seen &= source.sight.sees(positions, np.array([position]))[0]
    return torch.from_numpy(np.flatnonzero(seen)), source.sight.shifts(positions[seen], position)


def _chosen(queries: Tensor, keys: Tensor, plan: GroupPlan, source: Source, index: int) -> Tensor:
    """int64[read], which of the tokens held a KV head reads for a query that chooses: see `retention.TopBlocks`.

    Args:
        queries: [group, dim], of the query heads that share the KV head, whose keys are [held, dim].
    """
    assert source.read_tokens is not None, "only a limited source chooses"
    full, others, before = [], [], 0
    for _, _, count, first in source.runs.tolist():
        seen = min(count, source.first_position + index + 1 - first)
        if seen == plan.block_tokens and first + seen <= source.first_position:
            full.append(before + torch.arange(seen))
        elif seen > 0:
            others.append(before + torch.arange(seen))
        before += count

    def most(tokens: Tensor) -> float:
        own = keys[tokens].float()
        products = torch.stack([queries.float() * own.amin(dim=0), queries.float() * own.amax(dim=0)])
        return float(products.amax(dim=0).sum(dim=-1).max())

    take = max(0, source.read_tokens // plan.block_tokens - len(others))
    best = sorted(full, key=most, reverse=True)[:take]
    return torch.cat([*best, *others])


def _weights(
    query: Tensor,
    keys: Tensor,
    shifts: np.ndarray,
    scale: float,
    softcap: float | None,
    turn: Turn | None,
    sinks: Tensor | None,
    head: int,
) -> Tensor:
    """float32[seen], the softmax of one query's scores."""
    turned = query.expand(len(keys), -1)
    if turn is not None and shifts.any():
        turned = turn.back(turned[:, None], torch.from_numpy(shifts).to(query.device))[:, 0]
    scores = (keys.float() * turned.float()).sum(-1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is not None:
        scores = torch.cat([scores, sinks[head : head + 1].float()])
    return torch.softmax(scores, dim=0)[: len(keys)]


def _positions(source: Source) -> np.ndarray:
    """int64[held], the logical position of each token that the sequence holds."""
    return np.concatenate([np.arange(run[FIRST], run[FIRST] + run[COUNT]) for run in source.runs])
