"""How far apart two runs are, in tokens and in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[int | None, int | None]
"""The tokens that two runs chose at the same place; None where a run had ended."""


def equal_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share from the start."""
    return next(
        (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def pair_at(first: Sequence[int], second: Sequence[int], place: int) -> Pair | None:
    """The tokens at the first difference; None if there is none."""
    if place >= len(first) and place >= len(second):
        return None
    return (first[place] if place < len(first) else None, second[place] if place < len(second) else None)


def row_differences(expected: Tensor, found: Tensor) -> Tensor:
    """float[rows]: the largest |difference| of each row; forbidden tokens (-inf in both) count as equal."""
    equal = expected == found
    return (expected - found).abs().masked_fill(equal, 0.0).amax(dim=-1)


def same_bits(expected: Tensor, found: Tensor) -> bool:
    """Whether float32 numbers are equal bit by bit."""
    return torch.equal(expected.contiguous().view(torch.int32), found.contiguous().view(torch.int32))


def gap(first: float, second: float) -> float:
    """|difference|, 0 of equal infinities."""
    return 0.0 if first == second else abs(first - second)


def worst(differences: Sequence[float]) -> float:
    """The largest; NaN if there is one, which `max` would pass over."""
    return max(differences, key=lambda value: math.inf if math.isnan(value) else value, default=0.0)


def largest(values: Tensor) -> float:
    """The largest |value|; NaN if there is one, so that no comparison passes."""
    return float(values.abs().max()) if values.numel() else 0.0


def scale_of(logits: Tensor) -> float:
    """The largest finite |logit|."""
    return largest(logits[logits.isfinite()])
