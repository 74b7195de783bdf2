"""How weights of linear layers are packed for the CPU: by the native kernels, or by oneDNN where these are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvloom.native import Library, native
from kvloom.native.linear import ALIGNED_BYTES, LANES, LinearKernels, PackedWeight, Projection, packed_elements

Look = Callable[[Tensor, Any], None]

PIECE_BYTES = 16 << 20
"""Of plain weights that are packed before the next look: what is in memory twice while a mapped file is packed."""


class Packing(Protocol):
    """A layout of weights and the product with it. What `pack` returns is the packing's own affair.

    Attributes:
        dtypes: of weights that it takes.
        min_weights: below this many a plain product serves as well.
        is_native: whether it is the native kernels'. Then rows of the plain weight can be looked up.
    """

    dtypes: tuple[torch.dtype, ...]
    min_weights: int
    is_native: bool

    def reserve(self, weights: Iterable[Tensor]) -> None:
        """Weights that are going to be packed, in this order."""
        ...

    def pack(self, weight: Tensor, look: Look | None = None) -> Any:
        """Pack a weight [outputs, inner], piece by piece; after each piece call `look(rows, packed rows)`."""
        ...

    def unpack(self, packed: Any) -> Tensor:
        """The plain weight, bit for bit."""
        ...

    def look_up(self, packed: Any, ids: Tensor) -> Tensor:
        """Rows of the plain weight."""
        ...

    def linear(self, inputs: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        """What `nn.functional.linear` gives for the plain weight."""
        ...

    def packed_bytes(self, weight: Tensor) -> int:
        """Bytes of a weight that is packed."""
        ...


def choose_packing() -> Packing | None:
    """The native kernels' packing, else oneDNN's, else None. Kernels may have to be compiled."""
    library = native()
    if isinstance(library, Library):
        return NativePacking(LinearKernels(library))
    return OneDnnPacking() if OneDnnPacking.exists() else None


class NativePacking:
    """Tiles for the native kernels (`kvloom.native.linear`): one order of additions for any number of rows."""

    min_weights = 0  # small ones too: a model is bit-identical if all of it is native
    is_native = True

    def __init__(self, kernels: LinearKernels) -> None:
        self._kernels = kernels
        self.dtypes = kernels.dtypes
        self._rooms: dict[torch.dtype, Tensor] = {}

    def reserve(self, weights: Iterable[Tensor]) -> None:
        """One room for all weights of a dtype, so that large pages fit in. It takes memory only as it is filled."""
        needed: dict[torch.dtype, int] = {}
        for weight in weights:
            needed[weight.dtype] = needed.get(weight.dtype, 0) + self._elements(weight)
        self._rooms = {dtype: self._kernels.make_room(elements, dtype) for dtype, elements in needed.items()}

    def pack(self, weight: Tensor, look: Look | None = None) -> PackedWeight:
        """Into what is left of the room, else into new memory."""
        outputs, inner = weight.shape
        room = self._rooms.get(weight.dtype)
        if room is None or len(room) < self._elements(weight):
            room = self._kernels.make_room(self._elements(weight), weight.dtype)
        else:
            self._rooms[weight.dtype] = room[self._elements(weight) :]
        tiles = max(1, PIECE_BYTES // (LANES * inner * weight.element_size()))
        for first in range(0, outputs, tiles * LANES):
            rows = weight.detach()[first : first + tiles * LANES]
            start = packed_elements(first, inner, weight.dtype)
            piece = self._kernels.pack(rows, room[start : start + packed_elements(len(rows), inner, weight.dtype)])
            if look is not None:
                look(rows, piece)
        return PackedWeight(room[: packed_elements(outputs, inner, weight.dtype)], outputs, inner)

    def unpack(self, packed: PackedWeight) -> Tensor:
        """See `Packing`."""
        return self._kernels.unpack(packed)

    def look_up(self, packed: PackedWeight, ids: Tensor) -> Tensor:
        """See `Packing`."""
        return self._kernels.look_up(packed, ids)

    def linear(self, inputs: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        """See `Packing`."""
        return self._kernels.linear(inputs, [Projection(packed, bias)])[0]

    def packed_bytes(self, weight: Tensor) -> int:
        """See `Packing`."""
        return self._elements(weight) * weight.element_size()

    def _elements(self, weight: Tensor) -> int:
        aligned = ALIGNED_BYTES // weight.element_size()
        return -(-packed_elements(weight.shape[0], weight.shape[1], weight.dtype) // aligned) * aligned


class OneDnnPacking:
    """oneDNN's own layout, by two operators that `torch.compile` uses on CPUs. They are no public API of PyTorch.

    It reads weights about twice as fast as `nn.functional.linear` does for one to eight rows.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    min_weights = 1 << 16
    is_native = False
    # The number of rows that packing favours; measured, one hint serves 1 to 512 rows alike.
    rows_hint = 512

    @staticmethod
    def exists() -> bool:
        """Whether this PyTorch has the operators."""
        available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return available and all(
            hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
        )

    def reserve(self, weights: Iterable[Tensor]) -> None:
        """Nothing: each packed weight has memory of its own."""

    def pack(self, weight: Tensor, look: Look | None = None) -> Tensor:
        """In one piece."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), self.rows_hint)
        if look is not None:
            look(weight.detach(), packed)
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """See `Packing`."""
        return packed.to_dense()

    def look_up(self, packed: Tensor, ids: Tensor) -> Tensor:
        """Never called: it is not native."""
        raise AssertionError("oneDNN's layout is not known")

    def linear(self, inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """See `Packing`."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
        return output

    def packed_bytes(self, weight: Tensor) -> int:
        """See `Packing`."""
        return weight.nbytes


def is_right(packing: Packing, packed: Any, weight: Tensor) -> bool:
    """Whether the packed product equals the plain one on a small input, up to rounding."""
    probe = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype).view(2, -1)
    plain = nn.functional.linear(probe, weight.detach()).float()
    error = (packing.linear(probe, packed, None).float() - plain).norm()
    return bool(error <= 1e-2 * plain.norm())
