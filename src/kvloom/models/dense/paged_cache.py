"""A cache of transformers whose keys and values lie in paged, forkable, bounded blocks: for loops of your own.

KVLoom's own decoding does not need it. It is for code that calls `model(...)` or `model.generate(...)` of transformers
and wants what blocks give: a fork, a reordering of beams or a copy of the whole cache moves no keys and values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvloom.blocks import PoolExhausted
from kvloom.cache import CachedSequence, CacheLayout, Extension, KVCache, LayerShape, Turns, in_own_dtype
from kvloom.errors import CacheFull, CacheMismatch, UnsupportedModel
from kvloom.models.dense.step_cache import StoredLayer
from kvloom.models.hosted.cache_interface import CacheInterfaceBinding


class PagedCache(Cache):  # type: ignore[misc]  # transformers is untyped for us
    """A `transformers.Cache` in blocks of a pool that is allocated once.

    It takes the place of a `DynamicCache`: `model(ids, past_key_values=cache)` and `model.generate(...,
    past_key_values=cache)`, with beams, too. Models get dense keys and values, gathered from the blocks for each layer,
    so it is no faster; but `reorder_cache`, `batch_repeat_interleave`, `batch_select_indices`, `fork` and
    `copy.deepcopy` share blocks, and copy at most one for each row, when that row is written next.

    Args:
        layers: what each attention layer keeps.
        dtype: of keys and values.
        budget_bytes: the most that all keys and values may take, those of forks included.
        block_tokens: tokens a block.
        device: where the tensors live.

    Raises:
        CacheFull: the budget is below one block; later, from `update`: the rows have outgrown it. The cache must be
            `reset` then.

    Every layer keeps every token, whatever its window: the model masks what it does not see. A cache that is dropped
    gives its blocks back to those it shared them with, between two changes of the others, whenever the garbage
    collector comes. Forks may be used by several threads.

    Example::

        cache = kvloom.PagedCache.for_model(model, budget_bytes=2**28)
        model(prompt_ids, past_key_values=cache)
        for question in questions:
            model.generate(question, past_key_values=cache.fork())
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        dtype: torch.dtype,
        budget_bytes: int,
        block_tokens: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        layout = CacheLayout(layers=tuple(layers), dtype=dtype, block_tokens=block_tokens)
        cache = KVCache(layout, budget_bytes=budget_bytes, device=torch.device(device))
        self._stand_on(_Rows(cache, Turns(cache)))

    @classmethod
    def for_model(cls, model: PreTrainedModel, *, budget_bytes: int, block_tokens: int = 16) -> PagedCache:
        """An empty cache for a causal model, whose layers are learned in one short trial pass.

        Raises:
            UnsupportedModel: the model keeps something else than keys and values, or is an encoder-decoder model.
        """
        if model.config.is_encoder_decoder:
            raise UnsupportedModel(
                f"{type(model).__name__} is an encoder-decoder model, which wants two caches. Make one for each of its "
                "layers' shapes, and pass them as an `EncoderDecoderCache`."
            )
        binding = CacheInterfaceBinding(model)
        return cls(
            binding.layers,
            dtype=binding.dtype,
            budget_bytes=budget_bytes,
            block_tokens=block_tokens,
            device=binding.device,
        )

    def fork(self) -> PagedCache:
        """A cache with the same past, in the same budget; every block is shared until one of the two writes."""
        child = type(self).__new__(type(self))
        child._stand_on(self._rows.fork())
        return child

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """What a copy is wanted for, a fork does."""
        return self.fork()

    def _stand_on(self, rows: _Rows) -> None:
        self._rows = rows
        super().__init__(layers=[_PagedLayer(rows, layer) for layer in range(len(rows.cache.layout.layers))])
        weakref.finalize(self, rows.close).atexit = False

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before there are any."""
        return len(self._rows.sequences) or -1

    @property
    def blocks_in_use(self) -> int:
        """Blocks that this cache and its forks hold together."""
        return self._rows.cache.groups[0].pool.referenced

    def reset(self) -> None:
        """Forget all rows; their blocks are free again."""
        self._rows.close()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what row `beam_idx[i]` was. No key or value moves."""
        self._rows.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, int64[n], or where they are true, bool[batch]."""
        rows = torch.arange(len(self._rows.sequences))
        self._rows.select(rows[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` forks of each row where it was."""
        self._rows.select([row for row in range(len(self._rows.sequences)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every row.

        Args:
            tokens_to_remove: their number, as transformers counts it: 0 or negative.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`crop` takes the number of tokens to remove as a negative number; got {tokens_to_remove}."
            )
        self._rows.truncate(-tokens_to_remove)

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, None]]:
        """Keys, values and no window of each layer, as a `DynamicCache` gives them."""
        for layer in self.layers:
            yield layer.keys, layer.values, None


class _PagedLayer(StoredLayer):
    """One layer's view of the rows."""

    is_croppable = True

    def __init__(self, rows: _Rows, layer: int) -> None:
        self._rows, self._layer = rows, layer

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add [batch, kv_heads, count, dim]; returns all tokens, [batch, kv_heads, tokens, dim]."""
        return self._rows.write(self._layer, key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens of each row."""
        return self._rows.written[self._layer]

    @property
    def keys(self) -> Tensor | None:
        """All keys, gathered; None if there are none."""
        return self._rows.read(self._layer)[0] if self.get_seq_length() else None

    @property
    def values(self) -> Tensor | None:
        """The same for values."""
        return self._rows.read(self._layer)[1] if self.get_seq_length() else None

    def _all_at_once(self, *_: Any) -> None:
        raise NotImplementedError("the rows of a PagedCache change in all layers at once: call the cache's own method.")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = reset = _all_at_once


class _Rows:
    """The rows of a batch, all equally long.

    Args:
        cache: where they live, with those of all forks.
        turns: at this cache.

    Attributes:
        written: for each layer, tokens of each row that it has been given. Within a forward pass the first layers are
            ahead of the others.
    """

    def __init__(self, cache: KVCache, turns: Turns) -> None:
        self.cache, self._turns = cache, turns
        self.sequences: list[CachedSequence] = []
        self.written = [0] * len(cache.layout.layers)
        self._slots: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens of each row that there is room for: those of the layer that is ahead."""
        return self.sequences[0].tokens if self.sequences else 0

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values; the first layer to come makes room in all."""
        batch, _, count, _ = keys.shape
        if {keys.dtype, values.dtype} != {self.cache.layout.dtype}:
            raise CacheMismatch(
                f"the cache keeps {self.cache.layout.dtype}, and was given keys of {keys.dtype} and values of "
                f"{values.dtype}. Make one of the dtype in which the model computes, and use it outside of autocast."
            )
        if not self.sequences:
            self.sequences = [self.cache.open() for _ in range(batch)]
        if batch != len(self.sequences):
            raise CacheMismatch(
                f"the cache holds {len(self.sequences)} rows, and was given keys of {batch}. Reset it, or repeat or "
                "select its rows."
            )
        first = self.written[layer]
        if first == self.tokens:
            self._check_whole()
            self._extend(count)
        if first + count > self.tokens:
            raise CacheMismatch(
                f"layer {layer} was given {count} tokens behind {first}, and other layers have {self.tokens}. Every "
                "layer must be given the same tokens."
            )
        # Kernels read them by address, one after the other, and a column's flattening would be a view with gaps.
        new = self._all_slots()[:, first : first + count].flatten().contiguous()
        self.cache.store.write(layer, new, keys.transpose(0, 1).flatten(1, 2), values.transpose(0, 1).flatten(1, 2))
        self.written[layer] = first + count
        return self.read(layer)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, [batch, kv_heads, tokens, dim]."""
        return in_own_dtype(self.cache.store).gather(layer, self._all_slots()[:, : self.written[layer]])

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes a fork of row `rows[i]`."""
        with self._turns.turn():
            before, self.sequences = self.sequences, [self.cache.fork(self.sequences[row]) for row in rows]
            for sequence in before:
                self.cache.close(sequence)
        self._slots = None

    def truncate(self, count: int) -> None:
        """Forget the last `count` tokens."""
        tokens = max(0, self.tokens - count)
        with self._turns.turn():
            for sequence in self.sequences:
                self.cache.truncate(sequence, tokens)
        self.written = [min(written, tokens) for written in self.written]
        self._slots = None

    def fork(self) -> _Rows:
        """The same rows, in the same blocks."""
        child = _Rows(self.cache, self._turns)
        with self._turns.turn():
            child.sequences = [self.cache.fork(sequence) for sequence in self.sequences]
        child.written = list(self.written)
        return child

    def close(self) -> None:
        """Give the blocks back; the garbage collector may call it at any moment."""
        dropped, self.sequences = self.sequences, []
        self.written, self._slots = [0] * len(self.written), None
        self._turns.drop(dropped)

    def _check_whole(self) -> None:
        """Refuse to begin a pass behind one that was cut short, in which some layers were given fewer tokens."""
        lacking = self.tokens - min(self.written)
        if lacking:
            raise CacheMismatch(
                f"a pass over {lacking} tokens was cut short: some layers were given them, and others were not. Take "
                f"them back with `crop(-{lacking})`, or reset the cache."
            )

    def _extend(self, count: int) -> None:
        requests = [(sequence, count) for sequence in self.sequences]
        with self._turns.turn():
            try:
                extension = self.cache.extend(requests)
            except PoolExhausted:
                self._turns.collect()
                extension = self._extension_or_refusal(requests)
            self.cache.commit(extension)
        self._slots = None

    def _extension_or_refusal(self, requests: Sequence[tuple[CachedSequence, int]]) -> Extension:
        try:
            return self.cache.extend(requests)
        except PoolExhausted as exhausted:
            budget = self.cache.store.allocated_bytes
            raise CacheFull(
                f"{len(requests)} rows of {self.tokens + requests[0][1]} tokens: {exhausted}, of {self.cache.blocks} "
                f"in a budget of {budget:,} bytes. Raise budget_bytes, or drop forks."
            ) from exhausted

    def _all_slots(self) -> Tensor:
        """int64[batch, tokens]."""
        if self._slots is None:
            slots = np.stack([sequence.tables[0].slots() for sequence in self.sequences])
            self._slots = torch.from_numpy(slots).to(in_own_dtype(self.cache.store).keys[0].device)
        return self._slots
