"""Modules that map embeddings to hidden states, driven by hand on the cache: what `attach(decoder)` gives."""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvloom.blocks import PoolExhausted
from kvloom.cache import CachedSequence, CacheLayout, KVCache, Turns
from kvloom.engine.planner import default_budget_bytes
from kvloom.errors import CacheFull, CacheMismatch, ContextClosed, InvalidRequest
from kvloom.models import Source
from kvloom.models.x_transformers.decoder import DecoderBinding

Sequences = tuple[CachedSequence, ...]


@dataclass(frozen=True)
class Embedded:
    """What `EmbeddingModel.extend` returns.

    Attributes:
        outputs: float[batch, tokens, dim], a row for each new token and none for those before it: compare with the
            last `tokens` rows of a pass over the whole input, `full[:, -tokens:]`.
        context: the past and the new tokens, to be continued.
    """

    outputs: Tensor
    context: EmbeddingContext


@dataclass(frozen=True)
class _Past:
    """What a context stands for: its tables, and digests of what was fed to them.

    Attributes:
        fed: of the embeddings, token by token.
        source: the encoder's outputs; None without cross-attention.
        weights: digest of those that it was computed with.
    """

    sequences: Sequences
    fed: hashlib.blake2b
    source: Source | None
    weights: bytes


class EmbeddingContext:
    """A batch of sequences of equal lengths whose keys and values are kept, to be continued any number of times.

    It never changes: what continues it works on a fork, which shares its blocks. They are freed when the context is
    dropped, or by `close`. The keys and values of the encoder's outputs belong to it, and are shared like the others.
    `EmbeddingModel.extend` makes it.

    Attributes:
        batch: how many sequences.
        tokens: of each.
        source_tokens: of the encoder's outputs; 0 without cross-attention.
    """

    def __init__(self, model: EmbeddingModel, past: _Past) -> None:
        self.batch, self.tokens = len(past.sequences), past.sequences[0].tokens
        self.source_tokens = 0 if past.source is None else past.source.tokens
        self._model, self._past = model, past
        self._finalizer = weakref.finalize(self, model._turns.drop, past.sequences)

    def fork(self) -> EmbeddingContext:
        """Another context of the same past, which shares the blocks and may outlive this one."""
        return self._model._fork(self)

    def close(self) -> None:
        """Free the blocks now. The context cannot be used afterwards."""
        self._finalizer()

    def past_for(self, model: EmbeddingModel) -> _Past:
        """What stands behind the context, for the model that made it."""
        if not self._finalizer.alive:
            raise ContextClosed("the context was closed. Extend None with the whole input again.")
        if model is not self._model:
            raise ContextClosed("the context belongs to another model. Extend None with the whole input on this one.")
        return self._past

    def __enter__(self) -> EmbeddingContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._finalizer.alive else ", closed"
        return (
            f"EmbeddingContext({self.batch} sequences of {self.tokens} tokens, source of {self.source_tokens}{state})"
        )


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
            past = None if context is None else self._checked(context).past_for(self)
            if past is not None and past.weights != self.binding.fingerprint():
                raise CacheMismatch(
                    "the weights were changed after the context was computed. Begin anew with context=None and the "
                    "whole input."
                )
            new = self._read(embeddings, "embeddings", self.binding.dim)
            _check_continuation(past, new, start)
            source = self._read_source(encoder_outputs, past, batch=len(new))
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

    def _extended(self, past: _Past | None, new: Tensor, source: Source | None) -> Embedded:
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
        _feed(fed, new)
        return Embedded(outputs, EmbeddingContext(self, _Past(tuple(held), fed, source, self.binding.fingerprint())))

    # ---- what was passed -----------------------------------------------------------------------------------

    def _checked(self, context: object) -> EmbeddingContext:
        if not isinstance(context, EmbeddingContext):
            hint = " Pass its `.context`." if hasattr(context, "context") else ""
            raise InvalidRequest(f"`context` must be an EmbeddingContext; got {type(context).__name__}.{hint}")
        return context

    def _read(self, given: object, name: str, width: int) -> Tensor:
        """A tensor float[batch, tokens, width], none of them 0, where the module is."""
        if not isinstance(given, Tensor):
            raise InvalidRequest(f"`{name}` must be a tensor; got {type(given).__name__}.")
        if given.dim() != 3 or given.shape[2] != width or 0 in given.shape:
            raise InvalidRequest(
                f"`{name}` must be of shape [batch, tokens, {width}], none of them 0; got {list(given.shape)}. One "
                "token of each sequence is inputs[:, i : i + 1]."
            )
        if given.dtype != self.binding.dtype:
            raise InvalidRequest(
                f"`{name}` must be {self.binding.dtype}, as the module's weights are; got {given.dtype}. Pass "
                f"{name}.to({self.binding.dtype})."
            )
        return given.detach().to(self.binding.device)

    def _read_source(self, given: Tensor | None, past: _Past | None, *, batch: int) -> Source | None:
        width = self.binding.source_dim
        if width is None:
            if given is not None:
                raise InvalidRequest(
                    "the decoder has no cross-attention, so it reads no `encoder_outputs`. Leave them out."
                )
            return None
        if given is None:
            if past is None:
                raise InvalidRequest(
                    f"the decoder has cross-attention: pass `encoder_outputs`, float[{batch}, source, {width}], with "
                    "the first call."
                )
            return past.source
        read = self._read(given, "encoder_outputs", width)
        if len(read) != batch:
            raise InvalidRequest(
                f"`encoder_outputs` must be of {batch} sequences, as the embeddings are; got {len(read)}. "
                "Repeat them for each."
            )
        source = Source.of(read, tokens=read.shape[1])
        if past is not None and past.source is not None and source.key != past.source.key:
            raise CacheMismatch(
                "these `encoder_outputs` are not those that the context was begun with, whose keys and values it "
                "holds. Leave them out, or begin anew with context=None."
            )
        return source if past is None else past.source

    # ---- contexts ------------------------------------------------------------------------------------------

    def _fork(self, context: EmbeddingContext) -> EmbeddingContext:
        with self._turns.turn():
            past = context.past_for(self)
            sequences = tuple(map(self.cache.fork, past.sequences))
            return EmbeddingContext(self, replace(past, sequences=sequences))

    def __repr__(self) -> str:
        return f"EmbeddingModel({self.binding.name}, {self.cache.blocks} blocks, {self.binding.dtype})"


def _check_continuation(past: _Past | None, new: Tensor, start: int | None) -> None:
    held = 0 if past is None else past.sequences[0].tokens
    if start is not None and (isinstance(start, bool) or start != held):
        raise CacheMismatch(
            f"the new tokens must start at position {held}, the end of the context; start={start} was passed. Pass "
            f"only the tokens that the context does not hold: inputs[:, {held}:], start={held}."
        )
    if past is None:
        return
    if len(new) != len(past.sequences):
        raise CacheMismatch(
            f"the context holds {len(past.sequences)} sequences, and the new tokens are of {len(new)}. Pass those of "
            "each sequence in the same order, or begin anew with context=None."
        )
    if start is None and new.shape[1] > held:
        again = hashlib.blake2b()
        _feed(again, new[:, :held])
        if again.digest() == past.fed.digest():
            raise CacheMismatch(
                f"the {new.shape[1]} new tokens begin with all {held} that the context already holds, which would "
                f"store them twice. Pass inputs[:, {held}:]; if the repetition is meant, say start={held}."
            )


def _feed(digest: hashlib.blake2b, embeddings: Tensor) -> None:
    """Add embeddings token by token, so that the digest does not depend on how they were cut into calls."""
    digest.update(embeddings.transpose(0, 1).contiguous().cpu().view(torch.uint8).numpy().tobytes())
