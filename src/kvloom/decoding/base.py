"""What a decoder is: it looks at logits and decides; the engine applies the decision.

A decoder serves one request (one prompt). It starts with a single row, the prompt, and may fan out: the
first decision of eight beams, or of eight samples, names row 0 as the parent of all eight. So a prompt is
computed once, whatever the number of candidates.

`decide` changes nothing: if it raises, or if the engine cannot apply its decision, the decoder is as it was.
`advance` takes over what was decided, after the engine has applied it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

FinishReason = Literal["eos", "length", "stop"]


@dataclass(frozen=True)
class Step:
    """One decision. All tensors live on the device of the logits; nothing here waits for the device.

    Attributes:
        tokens: int64[rows_after], the token that each row chose.
        parents: int64[rows_after], the row before this step that each row continues.
        finished: bool[rows_after], rows that end with this token: they are dropped, not run again.
        logprobs: float32[rows_after], raw log-softmax (before any processor) of each chosen token.
            NaN here means that the model's logits held a NaN; the engine turns that into `NumericalError`.
    """

    tokens: Tensor
    parents: Tensor
    finished: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class HostStep:
    """The same decision as Python numbers: what one synchronisation of the engine brings to the host."""

    tokens: list[int]
    parents: list[int]
    finished: list[bool]
    logprobs: list[float]


@dataclass(frozen=True)
class TopLogprobs:
    """The likeliest alternatives of one step, best first, by raw log-softmax."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Hypothesis:
    """One finished sequence, as a decoder reports it.

    Attributes:
        token_ids: the new tokens, the EOS token included where it was chosen.
        logprobs: raw log-softmax of each of them.
        finish_reason: "eos", "length" or "stop".
        rows: which of the rows that `decide` was given each token continued.
        score: a beam hypothesis' length-normalised score; None for greedy and sampling.
        top_logprobs: alternatives of each step, if they were asked for.
        logits: float32[new_tokens, vocab], before any processing, if they were asked for.
        scores: float32[new_tokens, vocab], after processing, if they were asked for.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    rows: list[int]
    score: float | None = None
    top_logprobs: list[TopLogprobs] | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None


class Decoder(Protocol):
    """The protocol of greedy decoding, sampling and beam search."""

    @property
    def done(self) -> bool:
        """Whether no row is left to run."""
        ...

    @property
    def rows(self) -> int:
        """How many rows of logits the next `decide` expects."""
        ...

    def decide(self, logits: Tensor) -> Step:
        """Choose a token for each row of `logits`, float[rows, vocab]. Changes no state."""
        ...

    def advance(self, step: Step, host: HostStep) -> None:
        """Take over `step`, which the engine has applied; finished rows leave."""
        ...

    def results(self) -> list[Hypothesis]:
        """The sequences of a request that is done: samples in order, beam hypotheses best first."""
        ...

    @property
    def fill(self) -> int:
        """The token that fills short rows of `sequences`."""
        ...

    def sequences(self) -> Tensor:
        """int64[n, prompt + longest], prompt and new tokens of each, short rows filled as transformers fills them."""
        ...


def to_host(steps: list[Step]) -> list[HostStep]:
    """Bring the decisions of all requests to the host with a single synchronisation."""
    if all(step.tokens.device.type == "cpu" for step in steps):
        return [
            HostStep(own.tokens.tolist(), own.parents.tolist(), own.finished.tolist(), own.logprobs.tolist())
            for own in steps
        ]
    # float64 holds every token id and every float32 exactly, so one tensor can carry all four fields.
    packed = torch.cat(
        [torch.stack([s.tokens.double(), s.parents.double(), s.finished.double(), s.logprobs.double()]) for s in steps],
        dim=1,
    )
    rows = packed.cpu().tolist()
    hosts, start = [], 0
    for step in steps:
        end = start + step.tokens.shape[0]
        tokens, parents, finished, logprobs = (row[start:end] for row in rows)
        hosts.append(
            HostStep(
                tokens=[int(t) for t in tokens],
                parents=[int(p) for p in parents],
                finished=[bool(f) for f in finished],
                logprobs=logprobs,
            )
        )
        start = end
    return hosts
