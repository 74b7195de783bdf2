"""Keys and values that another cache holds: a `DynamicCache` of transformers, or a tuple of (K, V) a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvloom.cache import CachedSequence, CacheLayout, KVCache, Store
from kvloom.errors import InvalidRequest

Pair = tuple[Tensor, Tensor]


def read_pairs(past_key_values: Any, layout: CacheLayout) -> list[Pair]:
    """Keys and values of each layer, [kv_heads, tokens, dim], of a batch of one.

    Raises `InvalidRequest` if they are not those of a model of this layout, or of another dtype, or if layers hold
    unlike numbers of tokens (as those with a window do, once it is full).
    """
    found = _pairs(past_key_values)
    if len(found) != len(layout.layers):
        raise InvalidRequest(
            f"the cache has {len(found)} layers; the model has {len(layout.layers)}. Pass a cache that it has filled."
        )
    tokens = found[0][0].shape[-2]
    for layer, ((keys, values), shape) in enumerate(zip(found, layout.layers, strict=True)):
        expected = [(1, shape.kv_heads, tokens, shape.key_dim), (1, shape.kv_heads, tokens, shape.value_dim)]
        if [keys.shape, values.shape] != expected:
            raise InvalidRequest(
                f"layer {layer} of the cache holds keys {list(keys.shape)} and values {list(values.shape)}; the model "
                f"needs {list(expected[0])} and {list(expected[1])}: a batch of one, and the same tokens in each layer."
            )
        if keys.dtype != layout.dtype or values.dtype != layout.dtype:
            raise InvalidRequest(
                f"layer {layer} of the cache holds {keys.dtype}; this model keeps {layout.dtype}. "
                "Convert its keys and values."
            )
    return [(keys[0], values[0]) for keys, values in found]


def gathered(cache: KVCache, cached: CachedSequence | None, layer: int, first: int, end: int | None) -> Pair:
    """Keys and values, [kv_heads, tokens, dim], of the tokens at positions `first` up to but not including `end`.

    Raises `InvalidRequest` if there is no such layer, or if it does not hold all of these tokens.
    """
    if cached is None:
        raise InvalidRequest("the cache holds nothing of this context. Prefill its token_ids again.")
    if layer not in range(len(cache.layout.layers)):
        raise InvalidRequest(f"there is no layer {layer!r}. Pass 0 to {len(cache.layout.layers) - 1}.")
    if not isinstance(cache.store, Store):
        raise InvalidRequest("an int8 cache holds codes. Attach with `codec='native'` to read keys and values.")
    table = cached.tables[cache.layout.group_of_layer[layer]]
    end = table.position if end is None else end
    if not 0 <= first < end <= table.position or not table.holds(first, end):
        raise InvalidRequest(
            f"layer {layer} does not hold tokens {first} to {end} of {table.position}; it holds {table.held}, the "
            f"first at position {table.first_held}. `inspect(context).groups` says which."
        )
    positions = table.positions()
    keys, values = cache.store.keys[layer], cache.store.values[layer]
    slots = torch.from_numpy(table.slots()[(positions >= first) & (positions < end)]).to(keys.device)
    return keys.index_select(1, slots), values.index_select(1, slots)


def exported(cache: KVCache, cached: CachedSequence | None) -> DynamicCache:
    """All that a sequence holds; raises `InvalidRequest` if any layer has let go of tokens."""
    pairs = [gathered(cache, cached, layer, 0, None) for layer in range(len(cache.layout.layers))]
    return DynamicCache([(keys[None], values[None]) for keys, values in pairs])


def _pairs(past_key_values: Any) -> Sequence[Pair]:
    if isinstance(past_key_values, DynamicCache):
        layers = past_key_values.layers
        pairs: list[Any] = [(getattr(own, "keys", None), getattr(own, "values", None)) for own in layers]
    elif isinstance(past_key_values, list | tuple):
        pairs = [tuple(own) if isinstance(own, list | tuple) else () for own in past_key_values]
    else:
        raise InvalidRequest(
            "`past_key_values` must be a DynamicCache of transformers or a tuple of (K, V) a layer; got "
            f"{type(past_key_values).__name__}."
        )
    if not pairs or not all(len(own) == 2 and all(_is_layer(part) for part in own) for own in pairs):
        raise InvalidRequest(
            "`past_key_values` must hold K and V, [1, kv_heads, tokens, head_dim], of at least one token."
        )
    return pairs


def _is_layer(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim == 4 and part.shape[-2] > 0
