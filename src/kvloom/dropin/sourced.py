"""Batches of encoder-decoder models: sources, padded on the right, and what the decoder's sequences begin with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvloom.decoding import Options
from kvloom.dropin.padding import Batch, read_ids, read_mask
from kvloom.errors import InvalidRequest, UnsupportedOption
from kvloom.language_model.model import LanguageModel
from kvloom.models import HostedModel, Source
from kvloom.models.sources.source import SourceReader
from kvloom.prompts import Prompt, Start, read_token_ids

NAMES = ("attention_mask", "decoder_input_ids", "decoder_attention_mask")
"""What is taken besides the encoder's own input."""


def read_sourced_batch(given: Mapping[str, Any], options: Options, lm: LanguageModel) -> Batch:
    """The sources of a batch, and for each what its decoder begins with.

    Args:
        given: the encoder's input, int[batch, width] or float[batch, bins, frames]; its `attention_mask`, without which
            every token counts, as in transformers; `decoder_input_ids`, int[batch, width], by default the start token,
            which is put before ids of which no row begins with it, but not for Whisper; `decoder_attention_mask`.

    Raises:
        InvalidRequest, InvalidTokens: another rank or type, or padding in places where it would change the output.
    """
    encoder = lm.binding.encoder
    assert encoder is not None, "only encoder-decoder models have sources"
    sources = _sources(given, encoder)
    begun = given.get("decoder_input_ids")
    padded = _starts(len(sources), options, lm) if begun is None else _begun(begun, len(sources), options, lm)
    rows = _without_padding(padded, given.get("decoder_attention_mask"), lm)
    prompts = [Prompt(read_token_ids(row, lm.vocab_size), own) for row, own in zip(rows, sources, strict=True)]
    return Batch(padded, prompts)


def _sources(given: Mapping[str, Any], encoder: SourceReader) -> list[Source]:
    inputs = given.get(encoder.input_name)
    if inputs is None:
        raise InvalidRequest(f"there is nothing to decode from. Pass `{encoder.input_name}`.")
    if encoder.vocab_size is None:
        # Its encoder takes no mask: silence is a sound like any other.
        if not isinstance(inputs, Tensor) or inputs.ndim != 3:
            got = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise InvalidRequest(f"`{encoder.input_name}` must be a tensor [batch, bins, frames]; got {got}.")
        return [encoder.of_features(own) for own in inputs]
    padded, mask = read_ids("inputs", inputs), given.get("attention_mask")
    shown = torch.ones_like(padded, dtype=torch.bool) if mask is None else read_mask("attention_mask", mask, padded)
    counts = shown.sum(dim=1)
    if not torch.equal(shown, torch.arange(padded.shape[1], device=shown.device) < counts[:, None]):
        raise InvalidRequest(
            "padding must stand on the right of a source, where an encoder's positions do not count it, and the mask "
            "hides tokens elsewhere. Tokenize with padding_side='right'."
        )
    rows = zip(padded.tolist(), counts.tolist(), strict=True)
    return [encoder.of_ids(read_token_ids(row[:count], encoder.vocab_size)) for row, count in rows]


def _starts(count: int, options: Options, lm: LanguageModel) -> Tensor:
    """int64[count, 1], the start token of each row."""
    starts = Start(None, lm.calls.start_tokens(options)).each(lm.binding, count)
    return torch.tensor(starts, device=lm.binding.device)


def _begun(given: Any, count: int, options: Options, lm: LanguageModel) -> Tensor:
    """int64[batch, width] that the decoder begins with; the start token is put before it where transformers does."""
    padded = read_ids("decoder_input_ids", given)
    if len(padded) != count:
        raise InvalidRequest(f"`decoder_input_ids` has {len(padded)} rows for {count} sources. Pass one for each.")
    if lm.binding.encoder is not None and lm.binding.encoder.reads_features:
        return padded
    starts = _starts(count, options, lm).to(padded.device)
    return torch.cat([starts, padded], dim=1) if bool((padded[:, :1] != starts).all()) else padded


def _without_padding(padded: Tensor, mask: Any, lm: LanguageModel) -> list[list[int]]:
    """The decoder's tokens of each row; padding, on the left, only where a model's positions do not count it."""
    if mask is None:
        return list(padded.tolist())
    hidden = ~read_mask("decoder_attention_mask", mask, padded)
    counts = hidden.sum(dim=1)
    left = torch.equal(hidden, torch.arange(padded.shape[1], device=hidden.device) < counts[:, None])
    if hidden.any() and not (left and _positions_follow_the_mask(lm)):
        raise UnsupportedOption(
            "`decoder_attention_mask` is not supported for such a batch: it hides tokens that the decoder's positions "
            "count. Pass sequences of one length, or one at a time."
        )
    return [row[count:] for row, count in zip(padded.tolist(), counts.tolist(), strict=True)]


def _positions_follow_the_mask(lm: LanguageModel) -> bool:
    """Whether transformers makes the decoder's positions from its mask."""
    model = lm.binding.model if isinstance(lm.binding, HostedModel) else None
    return model is not None and "decoder_position_ids" in inspect.signature(model.forward).parameters
