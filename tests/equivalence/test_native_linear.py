"""Products with packed weights: right, and of the same bits whatever is computed beside them."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.native.library import load
from kvloom.native.linear import LinearKernels, PackedWeight, Projection, ReferenceLinear
from native_targets import targets
from thread_counts import on_threads

pytestmark = pytest.mark.skipif(not targets(), reason="no C++ compiler")

REFERENCE = ReferenceLinear()
# Of the largest output: float32 adds up rounding errors; the others may round to the neighbour, which lies one unit of
# the last place away, and that is 2**-7 or 2**-10 of the number at most.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def cases() -> list[tuple[str, torch.dtype]]:
    return [(target, dtype) for target in targets() for dtype in load(target).dtypes]


@st.composite
def layers(draw: st.DrawFn) -> tuple[int, list[int], int, bool, bool]:
    """inner, outputs of each projection, rows, biased, with a residual; some at borders of tiles and pieces of k."""
    inner = draw(st.one_of(st.integers(1, 70), st.sampled_from([111, 224, 225, 448, 500])))
    outputs = draw(st.lists(st.one_of(st.integers(1, 70), st.sampled_from([16, 64, 128])), min_size=1, max_size=3))
    rows = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 191, 192, 193, 400])))
    return inner, outputs, rows, draw(st.booleans()), draw(st.booleans())


def projections(
    kernels: LinearKernels | ReferenceLinear, sizes: tuple[int, list[int], int, bool, bool], dtype: torch.dtype
) -> list[Projection]:
    inner, outputs, rows, biased, residual = sizes
    generator = torch.Generator().manual_seed(inner)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return [
        Projection(
            kernels.pack(random(own, inner)), random(own) if biased else None, random(rows, own) if residual else None
        )
        for own in outputs
    ]


@pytest.mark.parametrize("target, dtype", cases())
@given(sizes=layers())
@settings(max_examples=20)
def test_a_product_is_the_references(
    target: str, dtype: torch.dtype, sizes: tuple[int, list[int], int, bool, bool]
) -> None:
    kernels = LinearKernels(load(target))
    inputs = torch.randn(sizes[2], sizes[0]).to(dtype)
    found = kernels.linear(inputs, projections(kernels, sizes, dtype))
    expected = REFERENCE.linear(inputs, projections(REFERENCE, sizes, dtype))
    for own, right in zip(found, expected, strict=True):
        torch.testing.assert_close(own, right, rtol=0, atol=TOLERANCE[dtype] * (1 + float(right.abs().max())))


@pytest.mark.parametrize("target, dtype", cases())
@given(sizes=layers(), data=st.data())
@settings(max_examples=20)
def test_a_row_has_the_same_bits_alone_and_in_any_company(
    target: str, dtype: torch.dtype, sizes: tuple[int, list[int], int, bool, bool], data: st.DataObject
) -> None:
    kernels = LinearKernels(load(target))
    inputs = torch.randn(sizes[2], sizes[0]).to(dtype)
    together = projections(kernels, sizes, dtype)
    whole = kernels.linear(inputs, together)
    first = data.draw(st.integers(0, sizes[2] - 1))
    last = data.draw(st.integers(first + 1, sizes[2]))
    with on_threads(data.draw(st.integers(1, 3))):
        for own, right in zip(together, whole, strict=True):
            residual = None if own.residual is None else own.residual[first:last]
            alone = kernels.linear(inputs[first:last], [Projection(own.weight, own.bias, residual)])[0]
            assert torch.equal(alone.view(torch.uint8), right[first:last].contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(outputs=st.integers(1, 70), inner=st.integers(1, 70))
@settings(max_examples=20)
def test_packing_moves_every_bit_to_its_place_and_back(dtype: torch.dtype, outputs: int, inner: int) -> None:
    kernels = LinearKernels(load("portable"))
    bits = torch.randint(-(2**15), 2**15, (outputs, inner * dtype.itemsize // 2), dtype=torch.int16)
    weight = bits.view(dtype)
    packed = kernels.pack(weight)
    assert torch.equal(packed.data.view(torch.int16), REFERENCE.pack(weight).data.view(torch.int16))
    assert torch.equal(kernels.unpack(packed).view(torch.int16), bits)
    ids = torch.randint(outputs, (2, 3))
    assert torch.equal(kernels.look_up(packed, ids).view(torch.int16), bits[ids])


@pytest.fixture
def before_a_wall() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Copies a tensor to the very end of readable memory: reading on is a crash."""
    libc, rooms = ctypes.CDLL(None), []

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        room = mmap.mmap(-1, (-(-tensor.nbytes // mmap.PAGESIZE) + 1) * mmap.PAGESIZE)
        whole = np.frombuffer(room, np.uint8)
        start = len(whole) - mmap.PAGESIZE - tensor.nbytes
        whole[start : start + tensor.nbytes] = tensor.flatten().view(torch.uint8)
        wall = whole.ctypes.data + len(whole) - mmap.PAGESIZE
        assert libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        rooms.append(room)
        return torch.from_numpy(whole[start : start + tensor.nbytes]).view(tensor.dtype).view(tensor.shape)

    yield copy


@pytest.mark.skipif(sys.platform != "linux", reason="pages are made unreadable as Linux does it")
@pytest.mark.parametrize("target, dtype", cases())
def test_nothing_beyond_the_last_element_is_read(
    target: str, dtype: torch.dtype, before_a_wall: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    kernels = LinearKernels(load(target))
    for inner in (2, 3, 112, 225, 500):
        packed = kernels.pack(torch.randn(70, inner).to(dtype))
        packed = PackedWeight(before_a_wall(packed.data), 70, inner)
        bias, residual = (before_a_wall(torch.randn(shape).to(dtype)) for shape in ([70], [17, 70]))
        for rows in (1, 3, 5, 8, 9, 14, 16, 17):
            inputs = before_a_wall(torch.randn(rows, inner).to(dtype))
            kernels.linear(inputs, [Projection(packed, bias, residual[17 - rows :])])


def test_rows_that_are_not_contiguous_are_read_where_they_lie() -> None:
    kernels = LinearKernels(load("native"))
    packed = kernels.pack(torch.randn(40, 24))
    wide = torch.randn(2, 5, 30)
    for inputs in (wide[..., :24], wide[:, ::2, 3:27], wide.transpose(1, 2)[:, :24].transpose(1, 2), wide[:0, :, :24]):
        (found,) = kernels.linear(inputs, [Projection(packed)])
        assert torch.equal(found, kernels.linear(inputs.contiguous(), [Projection(packed)])[0])
        assert found.shape == (*inputs.shape[:-1], 40)


def test_rows_of_the_wrong_width_or_dtype_are_refused() -> None:
    kernels = LinearKernels(load("native"))
    projection = Projection(kernels.pack(torch.randn(40, 24)))
    for inputs in (torch.randn(3, 23), torch.randn(3, 24, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="cannot be multiplied"):
            kernels.linear(inputs, [projection])


@pytest.mark.parametrize("id", [-1, 40, 2**40])
def test_an_id_outside_the_weight_is_refused(id: int) -> None:
    kernels = LinearKernels(load("native"))
    packed: PackedWeight = kernels.pack(torch.randn(40, 24))
    with pytest.raises(IndexError, match="0 to 39"):
        kernels.look_up(packed, torch.tensor([3, id]))


def test_infinities_and_nan_stay_where_they_are() -> None:
    for target, dtype in cases():
        kernels = LinearKernels(load(target))
        inputs = torch.ones(3, 10, dtype=dtype)
        inputs[1, 4], inputs[2, 4] = float("inf"), float("nan")
        (found,) = kernels.linear(inputs, [Projection(kernels.pack(torch.ones(20, 10, dtype=dtype)))])
        assert found[0].isfinite().all() and found[1].isposinf().all() and found[2].isnan().all(), (target, dtype)
