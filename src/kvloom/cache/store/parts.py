"""Parts of a store's tensors, as snapshots read and write them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Some rows of one of a store's tensors, of the second dimension."""

    tensor: Tensor
    rows: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what `read` returns."""
        return (self.tensor.shape[0], len(self.rows), *self.tensor.shape[2:])

    def read(self) -> Tensor:
        """A copy, on the CPU."""
        return self.tensor.index_select(1, self.rows.to(self.tensor.device)).cpu()

    def write(self, content: Tensor) -> None:
        """Put `content` there."""
        self.tensor.index_copy_(1, self.rows.to(self.tensor.device), content.to(self.tensor.device))


Parts = dict[str, Part]
