"""The small operations of a decoder layer, row by row: norms, rotary positions, activation, residual.

`Operations` are those of the compiled library; the functions of the same names below are their readable twins. Both
work in place or into `out`, on contiguous CPU tensors of one dtype, and round where the modules of transformers do.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from kvloom.native.library import Library
from kvloom.native.linear import DTYPES


class Operations:
    """The compiled ones.

    Args:
        library: of `native()`.
        dtype: of all rows; one of `library.dtypes`.
    """

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        assert dtype in library.dtypes, f"the library takes no {dtype}"
        self._dtype = dtype
        self._code = DTYPES[dtype]
        sizes, pointers = [c_int64, c_int64], [c_void_p, c_void_p, c_void_p]
        self._rms_norm = library.function("kvloom_rms_norm", c_int, *pointers, *sizes, c_float, c_int)
        self._silu_times = library.function("kvloom_silu_times", c_int, c_void_p, c_void_p, *sizes, c_int)
        self._rotary_factors = library.function(
            "kvloom_rotary_factors", c_int, c_void_p, c_void_p, c_float, c_void_p, c_void_p, *sizes, c_int
        )
        self._rotate = library.function(
            "kvloom_rotate", c_int, c_void_p, c_void_p, c_float, c_void_p, c_void_p, *sizes, c_int64, c_int
        )

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
        """See the twin."""
        self._rms_norm(self._code, *self._at(x, weight, out), *x.shape, epsilon, torch.get_num_threads())

    def silu_times(self, gate: Tensor, up: Tensor) -> None:
        """See the twin."""
        self._silu_times(self._code, *self._at(gate, up), *gate.shape, torch.get_num_threads())

    def rotary_factors(self, positions: Tensor, frequencies: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """See the twin."""
        rows, half = len(positions), len(frequencies)
        cosines, sines = torch.empty(rows, half), torch.empty(rows, half)
        pointers = [_pointer(positions, torch.int64), _pointer(frequencies, torch.float32)]
        factors = [_pointer(own, torch.float32) for own in (cosines, sines)]
        self._rotary_factors(self._code, *pointers, scaling, *factors, rows, half, torch.get_num_threads())
        return cosines, sines

    def rotate(self, x: Tensor, weight: Tensor | None, epsilon: float, cosines: Tensor, sines: Tensor) -> None:
        """See the twin."""
        assert x.shape[2] == 2 * cosines.shape[1], "one factor for each pair of numbers"
        factors = [_pointer(own, torch.float32) for own in (cosines, sines)]
        norm = None if weight is None else _pointer(weight, self._dtype)
        self._rotate(self._code, *self._at(x), norm, epsilon, *factors, *x.shape, torch.get_num_threads())

    def _at(self, *tensors: Tensor) -> list[int]:
        return [_pointer(tensor, self._dtype) for tensor in tensors]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
    """out = weight * (x / rms(x)): float32 inside, rounded before the weight and after it.

    Args:
        x, out: [rows, columns], which may be the same. weight: [columns].
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    out.copy_(weight * normed.to(x.dtype))


def silu_times(gate: Tensor, up: Tensor) -> None:
    """gate = silu(gate) * up, both [rows, columns]."""
    gate.copy_(torch.nn.functional.silu(gate) * up)


def rotary_factors(
    positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * frequency, times `scaling`, rounded to `dtype`.

    Args:
        positions: int64[rows]. frequencies: float32[half].

    Returns:
        float32[rows, half] twice.
    """
    angles = positions[:, None].float() * frequencies
    return (angles.cos() * scaling).to(dtype).float(), (angles.sin() * scaling).to(dtype).float()


def rotate(x: Tensor, weight: Tensor | None, epsilon: float, cosines: Tensor, sines: Tensor) -> None:
    """Turn each head of x[rows, heads, dim] by its row's position, after an RMS norm of the head if there is a weight.

    Args:
        weight: [dim]. cosines, sines: float32[rows, dim / 2]; number i turns together with number dim / 2 + i.
    """
    if weight is not None:
        rms_norm(x, weight, epsilon, x)
    cosine, sine = cosines[:, None].to(x.dtype), sines[:, None].to(x.dtype)
    low, high = x.chunk(2, dim=-1)
    x.copy_(torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1))


def _pointer(tensor: Tensor, dtype: torch.dtype) -> int:
    assert tensor.dtype == dtype and tensor.is_contiguous(), f"contiguous {dtype} is wanted"
    return tensor.data_ptr()
