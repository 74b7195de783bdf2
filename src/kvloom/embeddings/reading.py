"""What users pass to an `EmbeddingModel`, checked."""

from __future__ import annotations

import hashlib

from torch import Tensor

from kvloom.embeddings.context import EmbeddingContext, Past, feed
from kvloom.errors import CacheMismatch, InvalidRequest
from kvloom.models import Source
from kvloom.models.x_transformers.decoder import DecoderBinding


def check_context(context: object) -> EmbeddingContext:
    """Refuse what is no context, with a hint for what holds one."""
    if not isinstance(context, EmbeddingContext):
        hint = " Pass its `.context`." if hasattr(context, "context") else ""
        raise InvalidRequest(f"`context` must be an EmbeddingContext; got {type(context).__name__}.{hint}")
    return context


def read(binding: DecoderBinding, given: object, name: str, width: int) -> Tensor:
    """A tensor float[batch, tokens, width], none of them 0, where the module is."""
    if not isinstance(given, Tensor):
        raise InvalidRequest(f"`{name}` must be a tensor; got {type(given).__name__}.")
    if given.dim() != 3 or given.shape[2] != width or 0 in given.shape:
        raise InvalidRequest(
            f"`{name}` must be of shape [batch, tokens, {width}], none of them 0; got {list(given.shape)}. One "
            "token of each sequence is inputs[:, i : i + 1]."
        )
    if given.dtype != binding.dtype:
        raise InvalidRequest(
            f"`{name}` must be {binding.dtype}, as the module's weights are; got {given.dtype}. Pass "
            f"{name}.to({binding.dtype})."
        )
    return given.detach().to(binding.device)


def read_source(binding: DecoderBinding, given: Tensor | None, past: Past | None, *, batch: int) -> Source | None:
    """The source of a call: the context's, if there is one; None for a decoder that reads none."""
    width = binding.source_dim
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
    found = read(binding, given, "encoder_outputs", width)
    if len(found) != batch:
        raise InvalidRequest(
            f"`encoder_outputs` must be of {batch} sequences, as the embeddings are; got {len(found)}. "
            "Repeat them for each."
        )
    source = Source.of(found, tokens=found.shape[1])
    if past is not None and past.source is not None and source.key != past.source.key:
        raise CacheMismatch(
            "these `encoder_outputs` are not those that the context was begun with, whose keys and values it "
            "holds. Leave them out, or start again with context=None."
        )
    return source if past is None else past.source


def check_continuation(past: Past | None, new: Tensor, start: int | None) -> None:
    """Raise `CacheMismatch` unless new tokens are what follows a context, as far as that can be seen."""
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
            "each sequence in the same order, or start again with context=None."
        )
    if start is None and new.shape[1] > held:
        again = hashlib.blake2b()
        feed(again, new[:, :held])
        if again.digest() == past.fed.digest():
            raise CacheMismatch(
                f"the {new.shape[1]} new tokens begin with all {held} that the context already holds, which would "
                f"store them twice. Pass inputs[:, {held}:]; if the repetition is meant, say start={held}."
            )
