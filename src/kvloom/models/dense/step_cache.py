"""The cache that a model of transformers is handed for one dense batch of one step.

It owns nothing: what the model puts in goes into the store's slots, and what it gets are keys and values gathered
from there. All layers share the batch's indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from kvloom.cache import LayerShape, Store
from kvloom.models.dense.batches import DenseBatch


class StoredLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped for us
    """What layers that keep everything in a store have in common: nothing is ever dropped, whatever the window."""

    is_sliding = False
    is_initialized = True

    def __init__(self) -> None:
        """Keys and values are no attributes here, so there is nothing to set."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is lazy: the store was allocated with its budget."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a pass over `query_length` new tokens sees, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum of its own: -1, in the words of transformers."""
        return -1


class _SelfLayer(StoredLayer):
    """Self-attention: new tokens are written, and all are read."""

    def __init__(self, store: Store, layer: int, batch: DenseBatch) -> None:
        self._store, self._layer, self._batch = store, layer, batch
        self._written = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [batch, kv_heads, count, dim] and hand out [batch, kv_heads, past + count, dim]."""
        keys, values = (states.transpose(0, 1).flatten(1, 2) for states in (key_states, value_states))
        self._store.write(self._layer, self._batch.write_slots, keys, values)
        self._written = self._batch.count
        return self._store.gather(self._layer, self._batch.read_slots)

    def get_seq_length(self) -> int:
        """Tokens of each row that the layer knows."""
        return self._batch.past + self._written


class _CrossLayer(StoredLayer):
    """Cross-attention: the source's keys and values, which were projected once."""

    def __init__(self, store: Store, layer: int, batch: DenseBatch) -> None:
        assert batch.source is not None, "cross-attention has a source"
        self._source = batch.source
        self._rows = batch.batch
        self._gathered = store.gather(layer, self._source.slots)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Never called: the model is told that it has projected the source already."""
        raise AssertionError("a source is projected once, when it is encoded")

    def get_seq_length(self) -> int:
        """The longest source of the batch."""
        return self._source.tokens

    @property
    def keys(self) -> Tensor:
        """[batch, kv_heads, tokens, dim]; a view of one row where all rows read one source."""
        return self._gathered[0].expand(self._rows, -1, -1, -1)

    @property
    def values(self) -> Tensor:
        """The same for values."""
        return self._gathered[1].expand(self._rows, -1, -1, -1)


def step_cache(store: Store, shapes: Sequence[LayerShape], batch: DenseBatch) -> Cache:
    """The cache of one batch, with a layer for each attention layer of the model, in its own order.

    Args:
        shapes: of the store's layers.
    """
    own = [layer for layer, shape in enumerate(shapes) if not shape.reach.cross]
    cross = [layer for layer, shape in enumerate(shapes) if shape.reach.cross]
    self_attention = Cache(layers=[_SelfLayer(store, layer, batch) for layer in own])
    if not cross:
        return self_attention
    return EncoderDecoderCache(self_attention, Cache(layers=[_CrossLayer(store, layer, batch) for layer in cross]))
