"""What every decoder is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList

from kvloom.decoding.stopping import Stopping
from kvloom.decoding.trace import Observer
from kvloom.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The parts that greedy decoding, sampling and beam search have in common.

    Attributes:
        processors: change the scores; may be empty.
        stopping: when a sequence ends.
        observer: what to keep of the raw logits.
        device: where logits come from and decisions live.
        fill: the token that fills short rows of `sequences()`.
        seed: of the random numbers; None where the likeliest token is taken.
    """

    processors: LogitsProcessorList
    stopping: Stopping
    observer: Observer
    device: torch.device
    fill: int
    seed: int | None

    @property
    def reads_sequences(self) -> bool:
        """Whether anybody looks at the tokens of whole sequences."""
        return bool(self.processors) or bool(self.stopping.criteria)

    def process(self, sequences: Tensor, scores: Tensor) -> Tensor:
        """What the processors make of `scores`, float32[rows, vocab], which they may write into.

        Raises:
            InvalidRequest: a processor returns something else than scores of that shape.
        """
        processed = self.processors(sequences, scores)
        if not isinstance(processed, Tensor) or processed.shape != scores.shape:
            got = list(processed.shape) if isinstance(processed, Tensor) else type(processed).__name__
            raise InvalidRequest(
                f"a logits processor must return scores of the shape that it is given, {list(scores.shape)}; "
                f"it returned {got}."
            )
        return processed


def filled(prompt_ids: list[int], generated: list[list[int]], fill: int) -> Tensor:
    """int64[sequences, prompt + longest]: each sequence after the prompt, short ones filled up."""
    longest = max(len(tokens) for tokens in generated)
    rows = [prompt_ids + tokens + [fill] * (longest - len(tokens)) for tokens in generated]
    return torch.tensor(rows, dtype=torch.int64)
