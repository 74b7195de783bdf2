"""Modules that map embeddings to hidden states, driven by hand on the cache: what `attach(decoder)` gives."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from torch import Tensor

from kvloom.blocks import PoolExhausted
from kvloom.cache import CacheLayout, KVCache, Turns
from kvloom.embeddings.context import Embedded, EmbeddingContext, Past, feed
from kvloom.embeddings.reading import check_context, check_continuation, read, read_source
from kvloom.engine.planner import default_budget_bytes
from kvloom.errors import CacheFull, CacheMismatch
from kvloom.models import Source
from kvloom.models.x_transformers.decoder import DecoderBinding


class EmbeddingModel:
    """A module from embeddings to hidden states, attached.

    Attributes:
        binding: how; its `dim` is the width of embeddings and outputs, its `source_dim` that of the encoder's outputs.
        cache: where all its contexts live.

    Example::

        em = kvloom.attach(decoder)
        out = em.extend(None, embeddings[:, :7], encoder_outputs=encoded)
        out = em.extend(out.context, embeddings[:, 7:8])
        out.outputs  # float[batch, 1, dim], of the eighth token
    """

    def __init__(self, binding: DecoderBinding, *, budget_bytes: int | None = None, block_tokens: int = 16) -> None:
        layout = CacheLayout(layers=binding.layers, dtype=binding.dtype, block_tokens=block_tokens)
        if budget_bytes is None:
            budget_bytes = default_budget_bytes(layout, max_tokens=None, device=binding.device)
        self.binding = binding
        self.cache = KVCache(layout, budget_bytes=budget_bytes, device=binding.device)
        self._turns = Turns(self.cache)

    def extend(
        self,
        context: EmbeddingContext | None,
        embeddings: Tensor,
        *,
        encoder_outputs: Tensor | None = None,
        start: int | None = None,
    ) -> Embedded:
        """Run the new tokens of a batch of sequences, and only these.

        One call returns the rows of the new tokens only. Row i of `outputs` is row `context.tokens + i` of a pass over
        the whole input.

        Args:
            context: what came before; None at the start. Unchanged.
            embeddings: float[batch, tokens, dim], of the new tokens, none of which the context holds.
            encoder_outputs: float[batch, source, source_dim], needed with `context=None` by a decoder with
                cross-attention, which projects them once. Later they may be left out; others than the context's are an
                error.
            start: the position of the first new token, as a check: it must be `context.tokens`.

        Returns:
            `Embedded`: `outputs` float[batch, tokens, dim] and the new `context`.

        Raises:
            CacheMismatch: `start` is not the end of the context, the input repeats all that the context holds and goes
                on, it has another number of sequences, its encoder outputs are not the context's, or the weights were
                changed since.
            InvalidRequest: a shape or dtype that the module does not take.
            CacheFull: the blocks do not suffice. Whatever is raised, nothing has changed.
        """
        with self._turns.turn():
            self.binding.check_ready()
            past = None if context is None else check_context(context).past_for(self)
            if past is not None and past.weights != self.binding.fingerprint():
                raise CacheMismatch(
                    "the weights were changed after the context was computed. Start again with context=None and the "
                    "whole input."
                )
            new = read(self.binding, embeddings, "embeddings", self.binding.dim)
            check_continuation(past, new, start)
            source = read_source(self.binding, encoder_outputs, past, batch=len(new))
            try:
                return self._extended(past, new, source)
            except PoolExhausted:
                self._turns.collect()
            try:
                return self._extended(past, new, source)
            except PoolExhausted as error:
                raise CacheFull(
                    f"{len(new)} sequences with {new.shape[1]} new tokens each need {error.need} more blocks of "
                    f"{self.cache.layout.block_tokens} tokens; {error.have} of {self.cache.blocks} are free. Drop "
                    "contexts, or attach with a larger budget_bytes."
                ) from error

    def _extended(self, past: Past | None, new: Tensor, source: Source | None) -> Embedded:
        """Raises `PoolExhausted`, with nothing changed, if the blocks do not suffice."""
        held = [self.cache.open() for _ in new] if past is None else list(map(self.cache.fork, past.sequences))
        try:
            encoder_outputs = source.inputs if past is None and source is not None else None
            outputs = self.binding.extend(self.cache, held, new, encoder_outputs)
        except BaseException:
            for sequence in held:
                self.cache.close(sequence)
            raise
        fed = hashlib.blake2b() if past is None else past.fed.copy()
        feed(fed, new)
        return Embedded(outputs, EmbeddingContext(self, Past(tuple(held), fed, source, self.binding.fingerprint())))

    def _fork(self, context: EmbeddingContext) -> EmbeddingContext:
        with self._turns.turn():
            past = context.past_for(self)
            sequences = tuple(map(self.cache.fork, past.sequences))
            return EmbeddingContext(self, replace(past, sequences=sequences))

    def __repr__(self) -> str:
        return f"EmbeddingModel({self.binding.name}, {self.cache.blocks} blocks, {self.binding.dtype})"
