"""What every decoder is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList

from kvloom.decoding.stopping import Stopping
from kvloom.decoding.trace import Observer


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


def filled(prompt_ids: list[int], generated: list[list[int]], fill: int) -> Tensor:
    """int64[sequences, prompt + longest]: each sequence after the prompt, short ones filled up."""
    longest = max(len(tokens) for tokens in generated)
    rows = [prompt_ids + tokens + [fill] * (longest - len(tokens)) for tokens in generated]
    return torch.tensor(rows, dtype=torch.int64)
