"""A `TransformerWrapper` of x-transformers: token ids to logits, with or without a source that it attends to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.cache import AnyStore, CacheLayout, LayerShape, Store, in_own_dtype
from kvloom.errors import KVLoomError, UnsupportedModel
from kvloom.models.binding import Regime
from kvloom.models.callables.cached import CachedCallableBinding
from kvloom.models.dense.batches import DenseBatch
from kvloom.models.hosted.probe import AttentionCall
from kvloom.models.images.media import Media
from kvloom.models.proofs.selfcheck import prove
from kvloom.models.sources.embedded import EmbeddedSources
from kvloom.models.sources.source import Source
from kvloom.models.x_transformers.shared import (
    attention_layers,
    gathered,
    is_of,
    layer_cache,
    reason_of,
    refuse,
    refuse_decoder,
    rows_of,
    running_attentions,
    source_dim,
)

Pairs = tuple[tuple[Tensor, Tensor], ...]


def bind_wrapper(wrapper: Any) -> CachedCallableBinding:
    """Attach a `TransformerWrapper`, proven by the same check as every model.

    Raises:
        UnsupportedModel: it cannot be decoded on a cache; says why.
    """
    if not is_of(wrapper, "TransformerWrapper"):
        raise UnsupportedModel(
            "of x-transformers only a TransformerWrapper or a Decoder can be attached; this is a "
            f"{type(wrapper).__name__}. Attach what it wraps, such as the `net` of an AutoregressiveWrapper."
        )
    refuse_decoder(wrapper.attn_layers)
    _refuse_wrapper(wrapper)
    if wrapper.attn_layers.cross_attend:
        return _proven(SourcedBinding, wrapper)
    try:
        return _proven(PaddingXTransformersBinding, wrapper)
    except UnsupportedModel:
        return _proven(XTransformersBinding, wrapper)


def _proven(kind: Callable[[Any], CachedCallableBinding], wrapper: Any) -> CachedCallableBinding:
    try:
        binding = kind(wrapper)
        binding.check_ready()
        prove(binding)
    except KVLoomError:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"this {type(wrapper).__name__} cannot be run on its own cache: {reason_of(error)}"
        ) from error
    return binding


class XTransformersBinding(CachedCallableBinding):
    """A `TransformerWrapper` around a `Decoder`: token ids to logits.

    Args:
        wrapper: in evaluation mode. Its weights and mode are left as they are.
    """

    name = "x-transformers cache"

    def __init__(self, wrapper: Any) -> None:
        device = next(wrapper.parameters()).device
        super().__init__(_speaking(wrapper), max_tokens=wrapper.max_seq_len or None, device=device)
        self.calls = _calls(wrapper, self.layers)


class PaddingXTransformersBinding(XTransformersBinding):
    """The same for wrappers that are right with padding on the left too; see `PaddingCacheBinding`."""

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        weights = sum(own.nbytes for own in wrapper.parameters())
        self.padding_tokens = weights // CacheLayout(layers=self.layers, dtype=self.dtype).bytes_per_token


class SourcedBinding(CachedCallableBinding):
    """A `TransformerWrapper` around a `Decoder` with cross-attention: token ids, and a source, to logits.

    A source is what an encoder of the caller's has made, float[tokens, dim], the wrapper's `context`. Cross-attention
    projects it in a pass over one token; later passes are handed an empty context and the keys and values.

    Args:
        wrapper: in evaluation mode. Its weights and mode are left as they are.
    """

    name = "x-transformers cache"
    encoder: EmbeddedSources

    def __init__(self, wrapper: Any) -> None:
        # The trial of a callable knows no source, so nothing of it serves.
        weight = next(wrapper.parameters())
        self._wrapper = self._cached_function = wrapper
        self._packed = None
        self.device, self.dtype = weight.device, weight.dtype
        self.max_tokens = wrapper.max_seq_len or None
        self.encoder = EmbeddedSources(source_dim(wrapper.attn_layers), self.dtype, self.device)
        logits, intermediates = self._begin(self.encoder.trial_source())
        self.vocab_size = int(logits.shape[-1])
        self._order, self.layers = attention_layers(wrapper, intermediates)
        self.calls = _calls(wrapper, [self.layers[layer] for layer in self._order])

    def encode(self, source: Source, store: AnyStore, slots: Tensor) -> None:
        """Put a source's keys and values into int64[source.tokens] slots of every cross-attention layer."""
        kept = in_own_dtype(store)
        _, intermediates = self._begin(source)
        for layer, own in zip(self._order, intermediates.attn_intermediates, strict=True):
            if self.layers[layer].reach.cross:
                kept.write(layer, slots, *(rows_of(states) for states in own.cached_kv))

    @torch.no_grad()
    def forward_uncached(
        self,
        token_ids: Tensor,
        *,
        last: int | None = 1,
        regime: Regime | None = None,
        source: Source | None = None,
        media: Media | None = None,
    ) -> Tensor:
        """The wrapper over whole sequences, beside the whole source."""
        assert source is not None, "a decoder that attends to a source needs one"
        context = self.encoder.inputs(source).expand(len(token_ids), -1, -1)
        logits: Tensor = self._wrapper(token_ids, context=context)
        return logits if last is None else logits[:, -last:]

    @torch.no_grad()
    def _begin(self, source: Source) -> tuple[Tensor, Any]:
        """Logits and intermediates of one token."""
        token_ids = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        logits, intermediates = self._wrapper(token_ids, context=self.encoder.inputs(source), return_intermediates=True)
        return logits, intermediates

    def _run(self, token_ids: Tensor, batch: DenseBatch, store: Store) -> Tensor:
        """Logits, float[batch, wanted, vocab], of int64[batch, count] token ids."""
        assert batch.source is not None, "a decoder that attends to a source has one in each step"
        logits, intermediates = self._wrapper(
            token_ids,
            # The decoder wants a context, and projects none of it behind a cache.
            context=torch.empty((batch.batch, 0, self.encoder.dim), dtype=self.dtype, device=self.device),
            context_mask=batch.source.seen,
            cache=layer_cache(gathered(batch, store, self._order, self.layers), batch.past),
            input_not_include_cache=True,
            cache_age=batch.count,
            return_intermediates=True,
        )
        for layer, own in zip(self._order, intermediates.attn_intermediates, strict=True):
            if not self.layers[layer].reach.cross:
                store.write(
                    layer, batch.write_slots, *(rows_of(states[:, :, batch.past :]) for states in own.cached_kv)
                )
        wanted: Tensor = logits[:, batch.count - batch.wanted :]
        return wanted


def _calls(wrapper: Any, layers: Sequence[LayerShape]) -> tuple[AttentionCall, ...]:
    """The attention modules in the order in which they run; none if it is not known, and then logits are compared."""
    names = {own: name for name, own in wrapper.named_modules()}
    attentions = [(names[own], own) for own in running_attentions(wrapper.attn_layers)]
    if len(attentions) != len(layers):
        return ()
    return tuple(AttentionCall(own, name, shape) for (name, own), shape in zip(attentions, layers, strict=True))


def _refuse_wrapper(wrapper: Any) -> None:
    reasons = {
        "it carries recurrent memories from segment to segment (max_mem_len)": wrapper.max_mem_len > 0,
        "it puts memory tokens before each input (num_memory_tokens)": wrapper.num_memory_tokens > 0,
        "it runs its layers over their own output (recycling or looped)": wrapper.recycling or wrapper.looped,
        "it wants more than token ids (embed_num_tokens)": wrapper.embeds is not None,
        "it gives no logits for each token (return_only_embed, average_pool_embed or use_cls_token)": (
            wrapper.to_logits is None or wrapper.average_pool_embed or wrapper.cls_token is not None
        ),
        "it gives several logits a token (num_output_heads)": wrapper.has_multiple_heads,
    }
    refuse(wrapper, reasons)


@dataclass(frozen=True)
class _Output:
    logits: Tensor
    past_key_values: Pairs | None


def _speaking(wrapper: Any) -> Callable[..., _Output]:
    """A wrapper that speaks the cache protocol, its past as pairs of keys and values."""

    def run(
        token_ids: Tensor,
        *,
        past_key_values: Pairs | None = None,
        use_cache: bool = False,
        padding: Tensor | None = None,
    ) -> _Output:
        if not use_cache:
            return _Output(wrapper(token_ids), None)
        cache = None
        if past_key_values is not None:
            cache = layer_cache(past_key_values, past_key_values[0][0].shape[2])
        logits, intermediates = wrapper(
            token_ids,
            cache=cache,
            input_not_include_cache=True,
            cache_age=token_ids.shape[1],  # of how many last tokens it runs: by default, of one
            seq_start_pos=padding,
            return_intermediates=True,
        )
        return _Output(logits, tuple(own.cached_kv for own in intermediates.attn_intermediates))

    return run
