"""A decoder of an encoder-decoder model, run over one ragged row: what stands in for its cache and its encoder.

Its attention is ours, and reads keys and values from the store. So the model gets a cache that keeps nothing: new
keys pass through it, cross-attention finds its projections made already, and the past length is that of each token
of the row by itself, from which the model computes positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from kvloom.cache import LayerShape
from kvloom.models.sources.encoder import Encoded


class _PassThrough(Cache):  # type: ignore[misc]  # transformers is untyped for us
    """A self-attention cache that keeps nothing.

    Args:
        before: int64[tokens], how many tokens came before the row in which each token would stand by its position.
    """

    def __init__(self, before: Tensor) -> None:
        super().__init__(layers=[])
        self._before = before

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> Tensor:
        return self._before


def ragged_inputs(
    model: PreTrainedModel, token_ids: Tensor, positions: Tensor, shapes: Sequence[LayerShape]
) -> dict[str, Any]:
    """The arguments of a forward pass over one ragged row, int64[tokens] twice."""
    device, dtype = token_ids.device, model.dtype
    projected = DynamicCache()
    for layer, shape in enumerate(own for own in shapes if own.reach.cross):
        # One position each: what attention reads lies in the store.
        keys, values = (torch.empty((1, shape.kv_heads, 1, dim), dtype=dtype, device=device) for dim in shape.dims)
        projected.update(keys, values, layer)
    before = positions - torch.arange(len(positions), device=device)
    return {
        "decoder_input_ids": token_ids[None],
        # Models that are handed no mask build one, of the past length.
        "decoder_attention_mask": torch.ones_like(token_ids)[None],
        "encoder_outputs": Encoded(last_hidden_state=torch.empty((1, 1, 1), dtype=dtype, device=device)),
        "past_key_values": EncoderDecoderCache(_PassThrough(before), projected),
        "use_cache": True,
    }
