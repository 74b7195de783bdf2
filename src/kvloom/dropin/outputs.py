"""What transformers' `generate` returns: a tensor of sequences, or one of its output classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)

from kvloom.decoding import BeamSearch, Decoder, Hypothesis, Options
from kvloom.dropin.inside import Shown
from kvloom.dropin.padding import Batch

Output: TypeAlias = (
    GenerateDecoderOnlyOutput
    | GenerateBeamDecoderOnlyOutput
    | GenerateEncoderDecoderOutput
    | GenerateBeamEncoderDecoderOutput
)


def sequences_of(batch: Batch, decoders: Sequence[Decoder]) -> Tensor:
    """int64[batch * num_return_sequences, width + longest]."""
    generated = [found.token_ids for decoder in decoders for found in decoder.results()]
    return batch.followed_by(generated, decoders[0].fill)


def output_of(
    batch: Batch, decoders: Sequence[Decoder], options: Options, shown: Shown, past: DynamicCache | None
) -> Output:
    """The output class that transformers returns for such a call, with what was asked to be kept."""
    sequences = sequences_of(batch, decoders)
    beams = [decoder for decoder in decoders if isinstance(decoder, BeamSearch)]
    sourced = batch.prompts[0].source is not None
    if beams:
        return _of_beams(sequences, beams, options, shown, sourced=sourced)
    hypotheses = [found for decoder in decoders for found in decoder.results()]
    kind = GenerateEncoderDecoderOutput if sourced else GenerateDecoderOnlyOutput
    return kind(
        sequences=sequences,
        scores=_steps([_kept(found.scores) for found in hypotheses]) if options.output_scores else None,
        logits=_steps([_kept(found.logits) for found in hypotheses]) if options.output_logits else None,
        past_key_values=past,
        **_inside(shown, sourced),
    )


def _of_beams(
    sequences: Tensor, searches: list[BeamSearch], options: Options, shown: Shown, *, sourced: bool
) -> Output:
    hypotheses = [found for search in searches for found in search.results()]
    seen = [search.rows_seen() for search in searches]
    scores = [found.score for found in hypotheses]
    kind = GenerateBeamEncoderDecoderOutput if sourced else GenerateBeamDecoderOnlyOutput
    return kind(
        sequences=sequences,
        sequences_scores=torch.tensor(scores, device=sequences.device) if options.output_scores else None,
        scores=_steps([torch.stack(own.scores) for own in seen]) if options.output_scores else None,
        logits=_steps([torch.stack(own.logits) for own in seen]) if options.output_logits else None,
        beam_indices=_beam_indices(hypotheses, options).to(sequences.device),
        **_inside(shown, sourced),
    )


def _inside(shown: Shown, sourced: bool) -> dict[str, Any]:
    """Under the names of transformers' output class; of encoder-decoder models such looks are refused."""
    return {} if sourced else {"attentions": shown.attentions, "hidden_states": shown.hidden_states}


def _steps(rows: list[Tensor]) -> tuple[Tensor, ...]:
    """A float32[n, vocab] for each step, of all sequences or beams; rows that do not run any more are zeros.

    Args:
        rows: for each sequence float32[steps, vocab], or for each prompt float32[steps, beams, vocab].
    """
    vocab = rows[0].shape[-1]
    return pad_sequence(rows).reshape(max(map(len, rows)), -1, vocab).unbind(0)


def _beam_indices(hypotheses: list[Hypothesis], options: Options) -> Tensor:
    """int32[n, longest]: the row of `scores` that each token continues; -1 behind the end of a sequence."""
    own = []
    for index, found in enumerate(hypotheses):
        first = index // options.num_return_sequences * options.num_beams
        own.append(torch.tensor([first + beam for beam in found.rows], dtype=torch.int32))
    return pad_sequence(own, batch_first=True, padding_value=-1)


def _kept(rows: Tensor | None) -> Tensor:
    assert rows is not None, "what was asked for is kept"
    return rows
