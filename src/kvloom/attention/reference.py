"""The specification of attention over the paged store: one query at a time, float32, no cleverness.

It reads the tables, not the spans, so that it is an oracle for the plan as well as for the kernels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvloom.attention.plan import GroupPlan, Source
from kvloom.blocks.table import COUNT, FIRST, expand_runs


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: GroupPlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention of each new token over what its sequence holds and it may see.

    Args:
        queries: [tokens, heads, key_dim], the ragged row.
        keys, values: [kv_heads, slots, dim], one layer of the store, the new tokens already written.
        plan: the step's plan for this layer's group.
        scale: factor on the scores.
        softcap: if set, scores become softcap * tanh(score / softcap) (Gemma 2).
        sinks: [heads], if set, a score that takes part in the softmax and has no value (GPT-OSS).

    Returns:
        [tokens, heads, value_dim], in the dtype of `queries`.
    """
    heads, kv_heads = queries.shape[1], keys.shape[0]
    output = torch.empty(*queries.shape[:2], values.shape[-1], dtype=torch.float32, device=queries.device)
    for source in plan.sources:
        slots = torch.from_numpy(expand_runs(source.runs, plan.block_tokens)).to(keys.device)
        positions = _positions(source)
        for index in range(source.count):
            position = source.first_position + index
            low = int(plan.reach.first_visible(np.array([position]))[0])
            visible = slots[torch.from_numpy((positions >= low) & (positions <= position)).to(keys.device)]
            for head in range(heads):
                kv_head = head * kv_heads // heads
                query = queries[source.first_row + index, head].float()
                scores = keys[kv_head, visible].float() @ query * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1].float()])
                weights = torch.softmax(scores, dim=0)[: len(visible)]
                output[source.first_row + index, head] = weights @ values[kv_head, visible].float()
    return output.to(queries.dtype)


def _positions(source: Source) -> np.ndarray:
    """int64[held], the logical position of each token that the sequence holds."""
    return np.concatenate([np.arange(run[FIRST], run[FIRST] + run[COUNT]) for run in source.runs])
