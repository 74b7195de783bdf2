"""What is sealed, and what attention reads of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.cache.codec import decode


@dataclass(frozen=True)
class Sealed:
    """The sealed keys, or values, of one layer.

    Attributes:
        codes: int8[kv_heads, slots, dim].
        scales: of keys [kv_heads, blocks, dim], of values [kv_heads, slots].
        block_tokens: slots that share a row of the keys' scales; 1 if each slot has a scale of its own.
    """

    codes: Tensor
    scales: Tensor
    block_tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def read(self, slots: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """[kv_heads, n, dim]: the numbers behind n slots, a slice or int64[n]."""
        if isinstance(slots, slice):
            return self._read_run(slots.start, slots.stop, dtype)
        scales = self.scales.index_select(1, slots // self.block_tokens)
        return decode(self.codes.index_select(1, slots), scales.view(*scales.shape[:2], -1), dtype)

    def read_by_head(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """[kv_heads, n, dim]: the same of each head's own slots, int64[kv_heads, n, 1]."""
        codes = self.codes.gather(1, slots.expand(-1, -1, self.codes.shape[-1]))
        scales = self.scales.unsqueeze(-1) if self.scales.dim() == 2 else self.scales
        scales = scales.gather(1, (slots // self.block_tokens).expand(-1, -1, scales.shape[-1]))
        return decode(codes, scales, dtype)

    def _read_run(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Consecutive slots, without gathering them: whole blocks are decoded, and cut."""
        heads, _, dim = self.codes.shape
        first, end = start // self.block_tokens, -(-stop // self.block_tokens)
        codes = self.codes.view(heads, -1, self.block_tokens, dim)[:, first:end]
        scales = self.scales[:, first:end].reshape(heads, end - first, 1, -1)
        before = first * self.block_tokens
        return decode(codes, scales, dtype).flatten(1, 2)[:, start - before : stop - before]


@dataclass(frozen=True)
class MixedKept:
    """What attention reads of one layer in one step: keys, or values.

    Attributes:
        sealed: of all sealed blocks, those that this step fills included.
        native: [kv_heads, n, dim], in the order of `Landing`: what the blocks that the step writes held before it, then
            its new tokens.
    """

    sealed: Sealed
    native: Tensor

    @property
    def shape(self) -> torch.Size:
        """[kv_heads, slots, dim], as of a native store's tensor."""
        return self.sealed.codes.shape
