"""Linear layers over packed weights: for one row to a whole prompt, with one order of additions.

A weight is packed once, into tiles of 16 outputs that the CPU reads as fast as its memory allows. Each output is a sum
over k from first to last, in one float32 accumulator: whatever the number of rows, projections or threads, an
output's bits depend on its own row and weights alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvloom.native.library import Library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""As `Dtype` in packing.h."""

LANES = 16
ALIGNED_BYTES = 64
"""Packed weights begin at multiples of it: a line of a tile is one line of the CPU's caches."""

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class ProjectionArguments(ctypes.Structure):
    """`Projection` in linear.h."""

    _fields_ = (
        ("weights", _POINTER),
        ("bias", _POINTER),
        ("residual", _POINTER),
        ("output", _POINTER),
        ("outputs", _LONG),
        ("residual_stride", _LONG),
        ("output_stride", _LONG),
    )


class LinearArguments(ctypes.Structure):
    """`LinearCall` in linear.h."""

    _fields_ = (
        ("inputs", _POINTER),
        ("rows", _LONG),
        ("inner", _LONG),
        ("input_stride", _LONG),
        ("projections", ctypes.POINTER(ProjectionArguments)),
        ("projection_count", _INT),
        ("dtype", _INT),
    )


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [outputs, inner] in packed form.

    Attributes:
        data: [elements], of the weight's dtype; see packing.h for their order.
    """

    data: Tensor
    outputs: int
    inner: int


@dataclass(frozen=True, eq=False)
class Projection:
    """A weight to multiply with: the product is `inputs @ weight.T + bias`, rounded, and then `+ residual`, rounded.

    Attributes:
        bias: [outputs].
        residual: [rows, outputs].
    """

    weight: PackedWeight
    bias: Tensor | None = None
    residual: Tensor | None = None


class LinearKernels:
    """What the library does with packed weights. All threads of PyTorch work on it.

    Args:
        library: see `kvloom.native.native`.
    """

    def __init__(self, library: Library) -> None:
        self.dtypes = library.dtypes
        self._linear = library.function("kvloom_linear", ctypes.POINTER(LinearArguments), _INT)
        self._pack = library.function("kvloom_pack", _INT, _POINTER, _LONG, _LONG, _POINTER, _INT)
        self._look_up = library.function(
            "kvloom_look_up", _INT, _POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT, restype=_INT
        )
        self._ask_for_large_pages = library.function("kvloom_ask_for_large_pages", _POINTER, _LONG)

    def make_room(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Memory for packed weights, on large pages where the system has them; none is taken before it is written."""
        room = torch.empty(elements, dtype=dtype)
        self._ask_for_large_pages(room.data_ptr(), room.nbytes)
        return room

    def pack(self, weight: Tensor, room: Tensor | None = None) -> PackedWeight:
        """Pack a weight [outputs, inner].

        Args:
            room: where to, [packed_elements], aligned; by default new memory.
        """
        outputs, inner = weight.shape
        elements = packed_elements(outputs, inner, weight.dtype)
        data = self.make_room(elements, weight.dtype) if room is None else room
        assert data.dtype == weight.dtype and data.shape == (elements,) and data.is_contiguous(), (
            f"{elements} elements of {weight.dtype} are needed, not {tuple(data.shape)} of {data.dtype}"
        )
        plain = weight.detach().contiguous()
        self._pack(DTYPES[weight.dtype], plain.data_ptr(), outputs, inner, data.data_ptr(), torch.get_num_threads())
        return PackedWeight(data, outputs, inner)

    def unpack(self, weight: PackedWeight) -> Tensor:
        """The plain weight [outputs, inner], bit for bit."""
        return self.look_up(weight, torch.arange(weight.outputs))

    def look_up(self, weight: PackedWeight, ids: Tensor) -> Tensor:
        """Rows of the plain weight, as an embedding looks them up.

        Args:
            ids: int64[...], each below `weight.outputs`.

        Returns:
            [..., inner]

        Raises:
            IndexError: an id is not below `weight.outputs`, or is negative.
        """
        ids = ids.to(torch.int64).contiguous()
        rows = torch.empty(*ids.shape, weight.inner, dtype=weight.data.dtype)
        wrong = self._look_up(
            DTYPES[weight.data.dtype],
            weight.data.data_ptr(),
            weight.outputs,
            weight.inner,
            ids.data_ptr(),
            ids.numel(),
            rows.data_ptr(),
            torch.get_num_threads(),
        )
        if wrong:
            raise IndexError(f"ids must be 0 to {weight.outputs - 1}; got {int(ids.min())} to {int(ids.max())}.")
        return rows

    def linear(self, inputs: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
        """The products of the same rows with several weights, which are read once.

        Args:
            inputs: [..., inner], of the weights' dtype.

        Returns:
            [..., outputs] for each projection, of the same dtype.
        """
        inner, dtype = projections[0].weight.inner, inputs.dtype
        if inputs.shape[-1] != inner or any(own.weight.data.dtype != dtype for own in projections):
            raise ValueError(
                f"rows of {inputs.shape[-1]} numbers in {dtype} cannot be multiplied with weights of {inner} in "
                f"{projections[0].weight.data.dtype}."
            )
        rows = _as_rows(inputs)
        outputs = [torch.empty(*inputs.shape[:-1], own.weight.outputs, dtype=dtype) for own in projections]
        arguments = (ProjectionArguments * len(projections))()
        kept = []  # what the arguments point at must outlive the call
        for own, output, fields in zip(projections, outputs, arguments, strict=True):
            assert own.weight.inner == inner, "projections of one call share their rows"
            fields.weights, fields.output = own.weight.data.data_ptr(), output.data_ptr()
            fields.outputs = fields.output_stride = own.weight.outputs
            if own.bias is not None:
                kept.append(own.bias.detach().contiguous())
                fields.bias = kept[-1].data_ptr()
            if own.residual is not None:
                kept.append(_as_rows(own.residual))
                fields.residual, fields.residual_stride = kept[-1].data_ptr(), kept[-1].stride(0)
        call = LinearArguments(
            rows.data_ptr(), rows.shape[0], inner, rows.stride(0), arguments, len(arguments), DTYPES[dtype]
        )
        self._linear(call, torch.get_num_threads())
        return outputs


class ReferenceLinear:
    """The same, slow and readable."""

    def pack(self, weight: Tensor, room: Tensor | None = None) -> PackedWeight:
        """[outputs/16][inner/depth][16][depth], filled up with zeros."""
        depth, (outputs, inner) = lines_depth(weight.dtype), weight.shape
        whole = pad(weight.detach(), (0, -inner % depth, 0, -outputs % LANES))
        tiles = whole.view(whole.shape[0] // LANES, LANES, whole.shape[1] // depth, depth).transpose(1, 2)
        data = tiles.flatten() if room is None else room.copy_(tiles.flatten())
        return PackedWeight(data, outputs, inner)

    def unpack(self, weight: PackedWeight) -> Tensor:
        """Back, without the zeros."""
        depth = lines_depth(weight.data.dtype)
        tiles = weight.data.view(-(-weight.outputs // LANES), -1, LANES, depth).transpose(1, 2)
        return tiles.reshape(tiles.shape[0] * LANES, -1)[: weight.outputs, : weight.inner]

    def look_up(self, weight: PackedWeight, ids: Tensor) -> Tensor:
        """Rows by their index."""
        return self.unpack(weight)[ids]

    def linear(self, inputs: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
        """Sums in float64, rounded at the same places."""
        return [self._project(inputs, own) for own in projections]

    def _project(self, inputs: Tensor, own: Projection) -> Tensor:
        product = inputs.double() @ self.unpack(own.weight).double().T
        if own.bias is not None:
            product = product + own.bias.double()
        rounded = product.to(inputs.dtype)
        return rounded if own.residual is None else rounded + own.residual


def lines_depth(dtype: torch.dtype) -> int:
    """How many neighbouring k lie side by side."""
    return 2 if dtype == torch.bfloat16 else 1


def packed_elements(outputs: int, inner: int, dtype: torch.dtype) -> int:
    """Elements of a packed weight: whole tiles of whole lines."""
    depth = lines_depth(dtype)
    return -(-outputs // LANES) * LANES * -(-inner // depth) * depth


def _as_rows(tensor: Tensor) -> Tensor:
    """[rows, width], each row contiguous; a copy only where that cannot be a view."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
