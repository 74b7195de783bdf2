"""Attach proves itself: cached output is compared with the model's own before the model is accepted.

Some architectures ignore a custom attention silently, others hide state in their modules. So two sequences of
unequal length are run on the cache, one of them in chunks, one is forked inside a block, three rows decode two
more tokens; and what goes into and comes out of each attention layer, and the logits, are compared with a forward
pass of the model itself. Each attention layer is then handed the model's own input, so that rounding does not add
up over layers, and a token that a mixture of experts routes otherwise does not spread to those after it.
A model whose windows are longer than the check is checked on a copy with small windows, which shares the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from kvloom.errors import AttachMismatch, UnsupportedModel
from kvloom.models.binding import Regime
from kvloom.models.hosted.base import HostedModel
from kvloom.models.proofs.provable import CheckedSequence, Provable
from kvloom.models.proofs.recording import Trace, names_of
from kvloom.models.proofs.running import CHECKED_LOGITS, DECODED_TOKENS, run_cached, run_uncached
from kvloom.models.proofs.small_windows import with_small_windows
from kvloom.models.proofs.tolerance import TIES_QUANTILE, relative_errors, tolerance_of
from kvloom.models.sources.source import Source

CHECK_TOKENS = 44
SOURCE_TOKENS = (13, 6)
"""Of the two sources of an encoder-decoder model: neither is a number of whole blocks."""


def prove(binding: Provable) -> float:
    """Compare cached with uncached output; returns the largest relative error seen.

    Raises `AttachMismatch` with the first layer that differs beyond the tolerance.
    """
    tokens = CHECK_TOKENS if binding.max_tokens is None else min(CHECK_TOKENS, binding.max_tokens)
    if tokens < 12:
        raise UnsupportedModel(f"the model's context of {binding.max_tokens} tokens is too short to be checked.")
    subject = binding
    if any(limit > tokens // 2 for limit in binding.windows()) or binding.early_scales():
        subject = with_small_windows(binding)
    sequences = _random_sequences(subject, tokens)
    regime = subject.regime(tokens)
    return compare_runs(subject, sequences, regime=regime, chunk=len(sequences[0].token_ids) // 2 + 1)


def compare_runs(binding: Provable, sequences: list[CheckedSequence], *, regime: Regime, chunk: int) -> float:
    """The schedule of the check on the cache, against the model's own forward; returns the largest relative error.

    Args:
        sequences: a long one, a shorter one, and a fork of the long one that differs in its last two tokens.
        chunk: the first chunk of the long one.

    Raises:
        AttachMismatch: with the first layer that differs beyond the tolerance.
    """
    checked = _checked_positions(sequences, chunk)
    own = [run_uncached(binding, *each, regime) for each in zip(sequences, checked, strict=True)]
    cached = run_cached(binding, sequences, own, chunk)
    return max(_compare(binding, *each) for each in zip(own, cached, checked, strict=True))


def _checked_positions(sequences: list[CheckedSequence], chunk: int) -> list[list[int]]:
    """Of each sequence, where logits are compared: at the last tokens of each chunk of the schedule."""
    prompts = [len(own.token_ids) - DECODED_TOKENS for own in sequences]
    chunks = [(chunk, prompts[0] - chunk), (prompts[1],), (chunk, prompts[2] - chunk)]
    found = []
    for own in chunks:
        counts = [*own, *[1] * DECODED_TOKENS]
        ends = zip(accumulate(counts), counts, strict=True)
        found.append([at for end, count in ends for at in range(end - min(count, CHECKED_LOGITS), end)])
    return found


def check_bytes(binding: HostedModel) -> int:
    """About how much memory `prove` takes besides weights: all that it records, and one comparison of logits.

    Each layer's input and output is recorded for every token of three sequences, without the cache and on it, and
    logits of some; the model's own forward gives those of a whole sequence.
    """
    tokens = CHECK_TOKENS if binding.max_tokens is None else min(CHECK_TOKENS, binding.max_tokens)
    hidden = int(binding.model.get_input_embeddings().weight.shape[-1])
    lengths = (tokens, tokens // 2, tokens)
    rows = 2 * sum(lengths) * 2 * hidden * len(binding.calls)
    sequences = [CheckedSequence([0] * length) for length in lengths]
    checked = 2 * sum(map(len, _checked_positions(sequences, tokens // 2 + 1)))
    return (rows + (checked + tokens) * binding.vocab_size) * binding.dtype.itemsize


def _random_sequences(binding: Provable, tokens: int) -> list[CheckedSequence]:
    """A long sequence, a shorter one, and a fork of the long one with an ending of its own."""
    generator = torch.Generator().manual_seed(20_26)
    long, short, ending = (
        torch.randint(binding.vocab_size, (count,), generator=generator).tolist()
        for count in (tokens, tokens // 2, DECODED_TOKENS)
    )
    if binding.counting is not None:
        long, short, ending = map(binding.counting.without_pad, (long, short, ending))
    sources: list[Source | None] = [None, None]
    if binding.encoder is not None:
        sources = [binding.encoder.random_source(generator, tokens=count) for count in SOURCE_TOKENS]
    fork = long[:-DECODED_TOKENS] + ending
    return [CheckedSequence(own, sources[index]) for own, index in ((long, 0), (short, 1), (fork, 0))]


def _compare(binding: Provable, own: Trace, cached: Trace, checked: Sequence[int]) -> float:
    """The largest relative error; raises at the first layer beyond the tolerance."""
    tolerance = tolerance_of(binding.dtype)
    attention = {name for names in names_of(binding).values() for name in names}
    worst = 0.0
    compared = [(name, expected, cached.rows[name]) for name, expected in own.rows.items()]
    for name, expected, got in [*compared, ("the logits", own.logits, cached.logits)]:
        if got.shape != expected.shape:
            raise AttachMismatch(f"{name} is {tuple(got.shape)} on the cache and {tuple(expected.shape)} without it.")
        errors = relative_errors(got, expected)
        strict = name in attention or binding.dtype in (torch.float32, torch.float64)
        error = float(errors.max() if strict else _error_but_for_ties(errors))
        if not error <= tolerance:
            row = int(errors.nan_to_num(nan=torch.inf).argmax())
            position = checked[row] if expected is own.logits else row
            raise AttachMismatch(
                f"cached output differs from the model's own, first in {name}: relative error {error:.2g} "
                f"(largest at position {position}), tolerance {tolerance:.2g} for {binding.dtype}. "
                "The model is not decoded on the cache rather than decoded wrongly."
            )
        worst = max(worst, error)
    return worst


def _error_but_for_ties(errors: Tensor) -> Tensor:
    """What most rows keep to; the few decoded rows are looked at on their own, lest they be taken for ties."""
    return torch.maximum(errors.quantile(TIES_QUANTILE), errors[-DECODED_TOKENS:].min())
