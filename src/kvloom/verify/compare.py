"""Two runs of one request, compared token by token, and what may explain a difference.

When is a divergence a matter of rounding? If no logit differs by more than d, a choice can only turn where the
reference preferred its token by at most 2 d: one logit rises by d while the other falls by d. The same holds for
the log-odds at which a random number meets the border between two tokens, and for the scores of beams. So a
divergence whose margin exceeds 2 d is a mistake, however small d is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.decoding.randomness import Uniforms
from kvloom.language_model.results import Generation
from kvloom.verify.differences import Pair, equal_prefix, largest, pair_at, row_differences, same_bits, scale_of
from kvloom.verify.report import Divergence


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """The numbers of one generation.

    Attributes:
        logits: float32[new_tokens, vocab], on the CPU.
        score: of a beam hypothesis, else 0.
    """

    token_ids: list[int]
    logprobs: list[float]
    logits: Tensor
    score: float
    cached_prompt_tokens: int
    dropped_tokens: int = 0

    @classmethod
    def of(cls, generation: Generation) -> Decoded:
        """What is compared of `generation`."""
        assert generation.logits is not None, "verify asks for logits"
        return cls(
            token_ids=generation.token_ids,
            logprobs=generation.logprobs,
            logits=generation.logits.float().cpu(),
            score=generation.score or 0.0,
            cached_prompt_tokens=generation.usage.cached_prompt_tokens,
            dropped_tokens=generation.usage.dropped_tokens,
        )

    @classmethod
    def nothing(cls, vocab_size: int) -> Decoded:
        """What stands for a run that gave logits which are no numbers."""
        return cls(
            token_ids=[], logprobs=[], logits=torch.full((1, vocab_size), torch.nan), score=0.0, cached_prompt_tokens=0
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One prompt's sequences in two runs.

    Attributes: as those of `Check`, for this prompt.
    """

    sequences: int
    tokens: int
    equal_tokens: int
    divergences: tuple[Divergence, ...]
    margin: float
    max_difference: float
    same_bits: bool
    scale: float


def divergence(prompt: int, sequence: int, position: int, pair: Pair, margin: float, difference: float) -> Divergence:
    """Two runs that part at a position, with the tokens that they chose there; it may be a near tie."""
    return Divergence(
        prompt=prompt,
        sequence=sequence,
        position=position,
        expected=pair[0],
        found=pair[1],
        margin=margin,
        difference=difference,
        explained=margin <= 2 * difference,
    )


def compare_sequences(reference: Decoded, other: Decoded, *, prompt: int, seed: int | None = None) -> Comparison:
    """Greedy decoding; with a seed, sampling from the whole distribution at temperature 1."""
    expected, found = reference.logits, other.logits
    equal = equal_prefix(reference.token_ids, other.token_ids)
    common = min(equal + 1, len(expected), len(found))
    differences = row_differences(expected[:common], found[:common])
    margins = _Margins(expected, reference.token_ids, seed)
    diverged = []
    if (pair := pair_at(reference.token_ids, other.token_ids, equal)) is not None:
        margin = math.inf if None in pair else margins.between(equal, int(pair[1] or 0))
        difference = float(differences[equal]) if equal < common else 0.0
        diverged.append(divergence(prompt, 0, equal, pair, margin, difference))
    return Comparison(
        sequences=1,
        tokens=len(reference.token_ids),
        equal_tokens=equal,
        divergences=tuple(diverged),
        margin=diverged[0].margin if diverged else margins.least(),
        max_difference=largest(differences),
        same_bits=same_bits(expected[:common], found[:common]) and not diverged,
        scale=scale_of(expected),
    )


class _Margins:
    """How far the reference was from choosing otherwise."""

    def __init__(self, logits: Tensor, token_ids: Sequence[int], seed: int | None) -> None:
        self._logits = logits.double()
        self._token_ids = token_ids
        self._uniforms = None if seed is None else Uniforms([seed], torch.device("cpu"))

    def between(self, step: int, token: int) -> float:
        """By how much the reference's own choice at `step` was preferred to `token`."""
        own = self._token_ids[step]
        if self._uniforms is None:
            return float(self._logits[step, own] - self._logits[step, token])
        # `token` is drawn if the random number falls beyond its nearer border.
        return abs(self._distance(step, token if token < own else token - 1))

    def least(self) -> float:
        """The least margin of all steps."""
        return min((self._least(step) for step in range(len(self._token_ids))), default=math.inf)

    def _least(self, step: int) -> float:
        if self._uniforms is None:
            best = self._logits[step].topk(2).values
            return float(best[0] - best[1])
        own = self._token_ids[step]
        return min(abs(self._distance(step, own)), abs(self._distance(step, own - 1)))

    def _distance(self, step: int, token: int) -> float:
        """Log-odds from the random number of `step` to the end of `token`'s share of the probability."""
        assert self._uniforms is not None, "only sampling has random numbers"
        if token < 0:
            return math.inf
        share = torch.softmax(self._logits[step], dim=-1).cumsum(dim=-1)
        number = self._uniforms.at(step)[0] * share[-1]
        return float(torch.logit(share[token] / share[-1]) - torch.logit(number / share[-1]))
