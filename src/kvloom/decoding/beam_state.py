"""What a beam search knows between two steps, and within one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvloom.decoding.base import Step
from kvloom.decoding.trace import Record

# transformers marks what cannot happen with this score rather than -inf.
IMPOSSIBLE = -1.0e9


@dataclass(frozen=True)
class BeamRules:
    """The options of a beam search.

    Attributes:
        num_beams: beams that run, and hypotheses that are kept.
        num_return_sequences: how many of those are reported.
        length_penalty: exponent of the length that a score is divided by.
        early_stopping: True ends with `num_beams` hypotheses; False when the best beam could not enter them
            at its present length; "never" when it could not at any length.
        candidates: how many continuations a step looks at.
        max_new_tokens: the most tokens of a hypothesis.
    """

    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    candidates: int
    max_new_tokens: int

    def divisor(self, new_tokens: int) -> float:
        """What the score of a hypothesis of `new_tokens` tokens is divided by."""
        return float(new_tokens**self.length_penalty)

    def hopeful_length(self, new_tokens: int) -> int:
        """The length at which the beams are compared with the finished hypotheses, in new tokens."""
        if self.early_stopping == "never" and self.length_penalty > 0.0:
            return self.max_new_tokens
        return new_tokens


@dataclass(frozen=True)
class Finished:
    """The best hypotheses so far, best first; unfilled places score about -1e9.

    Attributes:
        scores: float32[num_beams], divided by the length penalty.
        real: bool[num_beams], False for a place that no finished hypothesis has taken.
        steps, candidates: int64[num_beams], where each hypothesis ended; step -1 for an empty place.
    """

    scores: Tensor
    real: Tensor
    steps: Tensor
    candidates: Tensor

    @classmethod
    def none(cls, num_beams: int, device: torch.device) -> Finished:
        """`num_beams` empty places."""
        nowhere = torch.full((num_beams,), -1, dtype=torch.int64, device=device)
        scores = torch.full((num_beams,), IMPOSSIBLE, dtype=torch.float32, device=device)
        return cls(scores, torch.zeros_like(nowhere, dtype=torch.bool), nowhere, nowhere)

    def best_with(self, others: Finished) -> Finished:
        """The best `num_beams` of these and `others`."""
        mine, theirs = vars(self), vars(others)
        merged = Finished(**{name: torch.cat([mine[name], theirs[name]]) for name in mine})
        best = merged.scores.topk(self.scores.shape[0]).indices
        return Finished(**{name: values[best] for name, values in vars(merged).items()})


@dataclass(frozen=True)
class Beams:
    """The state of a search between two steps.

    Attributes:
        sequences: int64[num_beams, length], prompt and new tokens of each running beam; None if nobody reads them.
        scores: float32[num_beams], summed processed log-probabilities.
        finished: the hypotheses that have ended.
        none_finished: whether there are none yet, as far as is known without looking.
    """

    sequences: Tensor | None
    scores: Tensor
    finished: Finished
    none_finished: bool = False


@dataclass(frozen=True)
class Candidates:
    """The continuations that a step looks at, best first (or, sampling, in the order drawn).

    Attributes:
        scores: float32[candidates], summed processed log-probabilities.
        sequences: int64[candidates, length + 1]; None if nobody reads them.
        ends: bool[candidates], the sequence ends here.
    """

    scores: Tensor
    sequences: Tensor | None
    ends: Tensor


@dataclass(frozen=True)
class Seen:
    """What all running beams saw, beside what a hypothesis keeps of its own path.

    Attributes:
        logits: a float32[num_beams, vocab] for each step, before any processing; empty unless they were asked for.
        scores: the same for log-probabilities after processing.
    """

    logits: list[Tensor]
    scores: list[Tensor]


@dataclass(frozen=True)
class BeamStep(Step):
    """A `Step` with what the next one needs.

    Attributes:
        beams: the state after this step.
        record, kept: what the trace keeps: all candidates, and which of them run on.
        generator: the state of the random numbers after this step; None without sampling.
    """

    beams: Beams
    record: Record
    kept: Tensor
    generator: torch.Generator | None
