"""Logits processors for one row of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


def seeing_padding(processor: Any, padding: Tensor) -> Any:
    """`processor`, which is shown sequences behind int64[padding] tokens."""
    return _SeeingPadding(processor, padding)


class _SeeingPadding(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped for us
    def __init__(self, processor: Any, padding: Tensor) -> None:
        self._processor, self._padding = processor, padding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        padding = self._padding.to(input_ids.device).expand(len(input_ids), -1)
        processed: Tensor = self._processor(torch.cat([padding, input_ids], dim=1), scores)
        return processed
