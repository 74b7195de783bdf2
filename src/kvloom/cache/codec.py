"""How keys and values are kept: in the model's own dtype ("native"), or full blocks at 8 bits ("int8").

Under int8 a block is sealed once, when it is full: a key's channels get a scale each, over the block's tokens, and
each token's value gets one. A few channels of keys are large for all tokens, while values have no such channels
(Liu et al. 2024, KIVI, section 3.1), so a scale meets numbers of like size. Codes are symmetric: a number is its
code, from -127 to 127, times its scale, and misses what was encoded by at most half a scale.

What is no number (NaN, infinity) makes the scale NaN, so that it is not hidden.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from kvloom.errors import InvalidRequest

Codec = Literal["native", "int8"]
CODECS: tuple[str, ...] = get_args(Codec)

SCALE_DTYPE = torch.bfloat16
"""The range of float32 in half its bytes. A scale is rounded before it is used, so that costs next to nothing."""

LARGEST_CODE = 127


def check_codec(codec: object) -> Codec:
    """`codec` if it is one. Raises `InvalidRequest`."""
    if codec not in CODECS:
        raise InvalidRequest(f"`codec={codec}` does not exist. Pass {' or '.join(map(repr, CODECS))}.")
    return codec  # type: ignore[return-value]


def sealed_bytes(*, key_dim: int, value_dim: int, block_tokens: int) -> int:
    """Bytes of one head's sealed block: codes, a scale for each channel of the keys and for each token's value."""
    return block_tokens * (key_dim + value_dim) + SCALE_DTYPE.itemsize * (key_dim + block_tokens)


def encode_keys(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Seal keys, float[heads, blocks, tokens, dim].

    Returns:
        codes, int8 of the same shape, and scales, [heads, blocks, dim].
    """
    codes, scales = _encode(blocks, dim=2)
    return codes, scales[:, :, 0]


def encode_values(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Seal values, float[heads, blocks, tokens, dim].

    Returns:
        codes, int8 of the same shape, and scales, [heads, blocks, tokens].
    """
    codes, scales = _encode(blocks, dim=3)
    return codes, scales[..., 0]


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes times scales, which broadcast to their shape, rounded once to `dtype`."""
    if dtype == SCALE_DTYPE:
        return codes.to(dtype) * scales
    return (codes.float() * scales.float()).to(dtype)  # exact but for the last step


def _encode(blocks: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    """Codes, and scales that are shared along `dim`, which stays with length 1."""
    numbers = blocks.float()
    scales = (numbers.abs().amax(dim, keepdim=True) / LARGEST_CODE).to(SCALE_DTYPE)
    scales = scales.masked_fill(scales.isinf(), torch.nan)
    # Of a block of zeros the scale is 0, and 0 / 0 is no number: its codes are 0.
    codes = (numbers / scales.float()).round().nan_to_num(0.0).clamp(-LARGEST_CODE, LARGEST_CODE)
    return codes.to(torch.int8), scales
