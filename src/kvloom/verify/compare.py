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
from transformers import LogitsProcessor

from kvloom.decoding.randomness import Uniforms
from kvloom.results import Generation
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


def compare_sequences(reference: Decoded, other: Decoded, *, prompt: int, seed: int | None = None) -> Comparison:
    """Greedy decoding; with a seed, sampling from the whole distribution at temperature 1."""
    expected, found = reference.logits, other.logits
    equal = equal_prefix(reference.token_ids, other.token_ids)
    common = min(equal + 1, len(expected), len(found))
    differences = _row_differences(expected[:common], found[:common])
    margins = _Margins(expected, reference.token_ids, seed)
    diverged = []
    if (pair := _pair_at(reference.token_ids, other.token_ids, equal)) is not None:
        margin = math.inf if None in pair else margins.between(equal, int(pair[1] or 0))
        difference = float(differences[equal]) if equal < common else 0.0
        diverged.append(
            Divergence(
                prompt=prompt,
                sequence=0,
                position=equal,
                expected=pair[0],
                found=pair[1],
                margin=margin,
                difference=difference,
                explained=margin <= 2 * difference,
            )
        )
    return Comparison(
        sequences=1,
        tokens=len(reference.token_ids),
        equal_tokens=equal,
        divergences=tuple(diverged),
        margin=diverged[0].margin if diverged else margins.least(),
        max_difference=_largest(differences),
        same_bits=_same_bits(expected[:common], found[:common]) and not diverged,
        scale=_scale(expected),
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


# ---- beams -------------------------------------------------------------------------------------------------


class Watch(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped for us
    """Keeps what a beam search sees: at each step its beams and the log-probabilities of what may follow."""

    def __init__(self) -> None:
        self.beams: list[list[tuple[int, ...]]] = []
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Changes nothing."""
        self.beams.append([tuple(row) for row in input_ids.tolist()])
        self.logprobs.append(scores.detach().float().cpu().clone())
        return scores


def compare_beams(
    reference: Sequence[Decoded], other: Sequence[Decoded], watched: tuple[Watch, Watch], *, prompt: int
) -> Comparison:
    """All hypotheses of a search without EOS: token ids, logits, log-probabilities and scores."""
    search = _Search(*watched)
    equal = [equal_prefix(own.token_ids, its.token_ids) for own, its in zip(reference, other, strict=True)]
    diverged = []
    for sequence, (own, its) in enumerate(zip(reference, other, strict=True)):
        pair = _pair_at(own.token_ids, its.token_ids, equal[sequence])
        if pair is not None:
            margin, difference = search.divergence(own, its)
            diverged.append(
                Divergence(
                    prompt=prompt,
                    sequence=sequence,
                    position=equal[sequence],
                    expected=pair[0],
                    found=pair[1],
                    margin=margin,
                    difference=difference,
                    explained=margin <= 2 * difference,
                )
            )
    differences = [search.max_difference()]
    for own, its, same in zip(reference, other, equal, strict=True):
        common = min(same + 1, len(own.token_ids), len(its.token_ids))
        differences.append(_largest(_row_differences(own.logits[:common], its.logits[:common])))
        if own.token_ids == its.token_ids:
            pairs = [*zip(own.logprobs, its.logprobs, strict=True), (own.score, its.score)]
            differences += [_gap(a, b) for a, b in pairs]
    return Comparison(
        sequences=len(reference),
        tokens=sum(len(own.token_ids) for own in reference),
        equal_tokens=sum(equal),
        divergences=tuple(diverged),
        margin=diverged[0].margin if diverged else search.least_margin(),
        max_difference=worst(differences),
        same_bits=not diverged
        and search.same_bits()
        and all(_same_bits(own.logits, its.logits) for own, its in zip(reference, other, strict=True)),
        scale=max(_scale(own.logits) for own in reference),
    )


class _Search:
    """Two searches step by step, as far as they have the same beams."""

    def __init__(self, reference: Watch, other: Watch) -> None:
        self._reference, self._other = reference, other
        pairs = zip(reference.beams, other.beams, strict=False)
        same = [own == its for own, its in pairs]
        self._common = same.index(False) if False in same else len(same)
        self._scores = [_totals(watch, self._common) for watch in (reference, other)]

    def max_difference(self) -> float:
        """Largest difference of log-probabilities over the common steps."""
        steps = zip(self._reference.logprobs[: self._common], self._other.logprobs[: self._common], strict=True)
        return worst([_largest(_row_differences(own, its)) for own, its in steps])

    def same_bits(self) -> bool:
        """Whether the log-probabilities of all steps are the same bits."""
        steps = zip(self._reference.logprobs, self._other.logprobs, strict=False)
        alike = len(self._reference.logprobs) == len(self._other.logprobs) == self._common
        return alike and all(_same_bits(own, its) for own, its in steps)

    def divergence(self, own: Decoded, its: Decoded) -> tuple[float, float]:
        """Margin and difference of scores at the step at which the searches, or at last two hypotheses, part."""
        step = self._common - 1
        if step < 0:
            return math.inf, 0.0
        if self._common < min(len(self._reference.beams), len(self._other.beams)):
            pairs = zip(self._reference.beams[self._common], self._other.beams[self._common], strict=True)
            first, second = next((a, b) for a, b in pairs if a != b)
        else:
            prompt = self._reference.beams[0][0]
            first, second = (*prompt, *own.token_ids), (*prompt, *its.token_ids)
        totals, others = self._scores[0][step], self._scores[1][step]
        difference = worst([_largest(_row_differences(totals[row], others[row])) for row in totals])
        return self._score(totals, first) - self._score(totals, second), difference

    def least_margin(self) -> float:
        """The least gap between neighbours among the best beams, over all steps."""
        least = math.inf
        for step, totals in enumerate(self._scores[0]):
            beams = len(self._reference.beams[step])
            scores = torch.cat(list(totals.values()))
            best = scores.topk(min(beams + 1, scores.numel())).values
            least = min(least, float((best[:-1] - best[1:]).min()))
        return least

    @staticmethod
    def _score(totals: dict[tuple[int, ...], Tensor], beam: tuple[int, ...]) -> float:
        row = totals.get(beam[:-1])
        # A beam that continues no beam of this step cannot be a near tie.
        return -math.inf if row is None else float(row[beam[-1]])


def _totals(watch: Watch, steps: int) -> list[dict[tuple[int, ...], Tensor]]:
    """For each step and beam, float32[vocab]: the score of the beam continued by each token."""
    totals: list[dict[tuple[int, ...], Tensor]] = []
    for beams, logprobs in zip(watch.beams[:steps], watch.logprobs[:steps], strict=True):
        before = totals[-1] if totals else None
        # At the first step all beams are the prompt; one of them counts.
        rows = {beam: row for row, beam in reversed(list(enumerate(beams)))}
        totals.append(
            {
                beam: logprobs[row] + (0.0 if before is None else before[beam[:-1]][beam[-1]])
                for beam, row in rows.items()
            }
        )
    return totals


# ---- common ------------------------------------------------------------------------------------------------


def equal_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share from the start."""
    return next(
        (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def _pair_at(first: Sequence[int], second: Sequence[int], place: int) -> tuple[int | None, int | None] | None:
    """The tokens at the first difference; None if there is none."""
    if place >= len(first) and place >= len(second):
        return None
    return (first[place] if place < len(first) else None, second[place] if place < len(second) else None)


def _row_differences(expected: Tensor, found: Tensor) -> Tensor:
    """float[rows]: the largest |difference| of each row; forbidden tokens (-inf in both) count as equal."""
    equal = expected == found
    return (expected - found).abs().masked_fill(equal, 0.0).amax(dim=-1)


def _same_bits(expected: Tensor, found: Tensor) -> bool:
    """Whether float32 numbers are equal bit by bit."""
    return torch.equal(expected.contiguous().view(torch.int32), found.contiguous().view(torch.int32))


def _gap(first: float, second: float) -> float:
    return 0.0 if first == second else abs(first - second)


def worst(differences: Sequence[float]) -> float:
    """The largest; NaN if there is one, which `max` would pass over."""
    return max(differences, key=lambda value: math.inf if math.isnan(value) else value, default=0.0)


def _largest(values: Tensor) -> float:
    """The largest |value|; NaN if there is one, so that no comparison passes."""
    return float(values.abs().max()) if values.numel() else 0.0


def _scale(logits: Tensor) -> float:
    """The largest finite |logit|."""
    return _largest(logits[logits.isfinite()])
