"""How the queries of a layer turn with their positions, so that one can be moved to another position afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Turn:
    """A rotary embedding: pairs of channels that turn by an angle proportional to the position.

    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2.

    Attributes:
        frequencies: float64[pairs], radians a token.
        first: the first channel that turns; those before it and behind the last pair do not.
        interleaved: whether a pair is two neighbours, else channel i and channel i + pairs.
    """

    frequencies: Tensor
    first: int
    interleaved: bool

    @property
    def key(self) -> tuple[bytes, int, bool]:
        """Equal for turns that are alike."""
        return self.frequencies.cpu().numpy().tobytes(), self.first, self.interleaved

    def back(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """`queries`, [rows, heads, dim], as if each stood `tokens` (int64[rows]) earlier."""
        angles = tokens.double()[:, None] * -self.frequencies
        cos, sin = (own.to(torch.float32)[:, None] for own in (angles.cos(), angles.sin()))
        turned = queries.clone()
        pairs = self.frequencies.shape[0]
        channels = turned[..., self.first : self.first + 2 * pairs]
        one, other = (
            (channels[..., 0::2], channels[..., 1::2])
            if self.interleaved
            else (channels[..., :pairs], channels[..., pairs:])
        )
        new_one, new_other = one * cos - other * sin, other * cos + one * sin
        one.copy_(new_one)
        other.copy_(new_other)
        return turned
