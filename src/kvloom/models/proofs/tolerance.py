"""How far apart two ways to calculate the same may come."""

from __future__ import annotations

import torch

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest relative error of a row, by dtype. A model that is attached wrongly misses by some 10 to 100 per cent."""

TIES_QUANTILE = 0.75
"""In 16 bits a few rows may differ more outside of attention, where a mixture of experts sits on a tie."""
