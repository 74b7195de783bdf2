"""How far apart two ways to calculate the same may come."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest relative error of a row, by dtype. A model that is attached wrongly misses by some 10 to 100 per cent."""

TIES_QUANTILE = 0.75
"""In 16 bits a few rows may differ more outside of attention, where a mixture of experts sits on a tie."""

COMPARED_ROWS = 4
"""At a time, because a row of logits may be large."""


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest relative error of a row; of a dtype that is not listed, that of the widest."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


def relative_errors(got: Tensor, expected: Tensor) -> Tensor:
    """float32[rows]: for each row |got - expected| / |expected|, over the last dimension; all others are rows."""
    errors = []
    pairs = (torch.split(own.reshape(-1, own.shape[-1]), COMPARED_ROWS) for own in (got, expected))
    for mine, theirs in zip(*pairs, strict=True):
        wide = theirs.float()
        errors.append((mine.float() - wide).norm(dim=-1) / wide.norm(dim=-1).clamp_min(1e-12))
    return torch.cat(errors)
