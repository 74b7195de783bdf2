"""Two beam searches, compared step by step: the beams of each step, and what each of them might have become."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from kvloom.verify.compare import Comparison, Decoded, divergence
from kvloom.verify.differences import equal_prefix, gap, largest, pair_at, row_differences, same_bits, scale_of, worst


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
        pair = pair_at(own.token_ids, its.token_ids, equal[sequence])
        if pair is not None:
            margin, difference = search.divergence(own, its)
            diverged.append(divergence(prompt, sequence, equal[sequence], pair, margin, difference))
    differences = [search.max_difference()]
    for own, its, same in zip(reference, other, equal, strict=True):
        common = min(same + 1, len(own.token_ids), len(its.token_ids))
        differences.append(largest(row_differences(own.logits[:common], its.logits[:common])))
        if own.token_ids == its.token_ids:
            pairs = [*zip(own.logprobs, its.logprobs, strict=True), (own.score, its.score)]
            differences += [gap(a, b) for a, b in pairs]
    return Comparison(
        sequences=len(reference),
        tokens=sum(len(own.token_ids) for own in reference),
        equal_tokens=sum(equal),
        divergences=tuple(diverged),
        margin=diverged[0].margin if diverged else search.least_margin(),
        max_difference=worst(differences),
        same_bits=not diverged
        and search.same_bits()
        and all(same_bits(own.logits, its.logits) for own, its in zip(reference, other, strict=True)),
        scale=max(scale_of(own.logits) for own in reference),
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
        return worst([largest(row_differences(own, its)) for own, its in steps])

    def same_bits(self) -> bool:
        """Whether the log-probabilities of all steps are the same bits."""
        steps = zip(self._reference.logprobs, self._other.logprobs, strict=False)
        alike = len(self._reference.logprobs) == len(self._other.logprobs) == self._common
        return alike and all(same_bits(own, its) for own, its in steps)

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
        difference = worst([largest(row_differences(totals[row], others[row])) for row in totals])
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
