"""A decoder layer operation by operation, slow and readable: the twin of `layers.NativeLayers`.

It rounds where the modules of transformers round. All tensors lie on the CPU and are of one dtype, but for cosines and
sines, which are float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvloom.native.layers import LayerWeights, NormWeight, ProjectionWeight
from kvloom.native.linear import Projection, ReferenceLinear

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries [rows, heads, dim], keys and values [kv_heads, rows, dim], which it keeps, to [rows, heads, dim]."""


def run_layer(layer: LayerWeights, hidden: Tensor, factors: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
    """Take rows through one layer.

    Args:
        hidden: [rows, hidden].
        factors: cosines and sines, float32[rows, dim / 2]; see `rotary_factors`.

    Returns:
        [rows, hidden].
    """
    normed = rms_norm(hidden, layer.input_norm)
    queries, keys, values = (
        project(normed, own).view(len(hidden), -1, layer.dim) for own in (layer.query, layer.key, layer.value)
    )
    queries, keys = rotate(queries, layer.query_norm, factors), rotate(keys, layer.key_norm, factors)
    attended = attend(queries, keys.transpose(0, 1), values.transpose(0, 1))
    hidden = project(attended.flatten(1), layer.output, residual=hidden)
    normed = rms_norm(hidden, layer.post_norm)
    activated = torch.nn.functional.silu(project(normed, layer.gate)) * project(normed, layer.up)
    return project(activated, layer.down, residual=hidden)


def project(rows: Tensor, own: ProjectionWeight, *, residual: Tensor | None = None) -> Tensor:
    """[rows, outputs]: the product of [rows, inner] with a packed weight, plus its bias, plus `residual`."""
    return ReferenceLinear().linear(rows, [Projection(own.packed, own.bias, residual)])[0]


def rms_norm(rows: Tensor, own: NormWeight) -> Tensor:
    """weight * (x / rms(x)) of the last dimension: float32 inside, rounded before the weight and after it."""
    wide = rows.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + own.epsilon)
    return own.weight * normed.to(rows.dtype)


def rotate(heads: Tensor, norm: NormWeight | None, factors: tuple[Tensor, Tensor]) -> Tensor:
    """[rows, heads, dim], each head turned by its row's position, after an RMS norm of the head if there is one.

    Args:
        factors: float32[rows, dim / 2] each; number i turns together with number dim / 2 + i.
    """
    normed = heads if norm is None else rms_norm(heads, norm)
    cosines, sines = (own[:, None].to(heads.dtype) for own in factors)
    low, high = normed.chunk(2, dim=-1)
    return torch.cat([low * cosines - high * sines, high * cosines + low * sines], dim=-1)


def rotary_factors(positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * frequency, times `scaling`, rounded to `dtype`.

    Args:
        positions: int64[rows]. frequencies: float32[dim / 2].

    Returns:
        float32[rows, dim / 2] twice.
    """
    angles = positions[:, None].float() * frequencies
    return (angles.cos() * scaling).to(dtype).float(), (angles.sin() * scaling).to(dtype).float()
