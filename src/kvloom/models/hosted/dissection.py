"""A forward pass taken apart: the attention weights, keys and values of every layer.

It computes the formula as it stands, in float32, over one whole row without any cache; for people who want to see
what a model does, not for decoding. The causal mask can be taken away, to show what depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvloom.cache import Reach

DISSECT = "kvloom_dissect"


@dataclass(frozen=True)
class DissectedLayer:
    """What one attention layer did for a row of tokens.

    Attributes:
        weights: float32[heads, tokens, tokens], row i what query i gave to each key.
        keys, values: float32[kv_heads, tokens, dim]; keys are rotated, as the cache keeps them.
        outputs: float32[tokens, heads, value_dim].
    """

    weights: Tensor
    keys: Tensor
    values: Tensor
    outputs: Tensor


@dataclass
class Dissection:
    """Collects the layers of one pass; travels to the attention function as a keyword argument."""

    reach_of: dict[nn.Module, Reach]
    causal: bool
    layers: list[DissectedLayer] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def dissect(forward: Callable[[Dissection], Tensor], reach_of: dict[nn.Module, Reach], *, causal: bool) -> Dissection:
    """One pass of `forward` under the attention below; it returns the logits, float[tokens, vocab]."""
    seen = Dissection(reach_of, causal)
    seen.logits = forward(seen).float()
    return seen


def _dissected_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    kvloom: Dissection | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function, for one row: query [1, heads, tokens, dim]."""
    assert kvloom is not None, "only `dissect` runs a model with this attention"
    queries, keys, values = query[0].float(), key[0].float(), value[0].float()
    group = queries.shape[0] // keys.shape[0]
    scores = queries @ keys.repeat_interleave(group, 0).transpose(1, 2)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if kvloom.causal:
        scores = scores.masked_fill(~_visible(kvloom.reach_of[module], scores), -torch.inf)
    if s_aux is not None:
        sink = s_aux.float()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : keys.shape[1]]
    outputs = (weights @ values.repeat_interleave(group, 0)).transpose(0, 1)
    kvloom.layers.append(DissectedLayer(weights, keys, values, outputs))
    return outputs[None].to(query.dtype).contiguous(), None


def _visible(reach: Reach, scores: Tensor) -> Tensor:
    """bool[tokens, tokens], which keys a query may see."""
    positions = torch.arange(scores.shape[-1], device=scores.device)
    first = torch.from_numpy(reach.first_visible(positions.cpu().numpy())).to(scores.device)
    return (positions <= positions[:, None]) & (positions >= first[:, None])


ALL_ATTENTION_FUNCTIONS.register(DISSECT, _dissected_attention)
