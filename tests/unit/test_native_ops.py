"""The small operations of a decoder layer are their readable twins, whatever the rows beside a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.native import ops
from kvloom.native.library import load
from kvloom.native.ops import Operations
from native_targets import targets

# In 16 bits a number that stands on a border is rounded the other way, up to three times in a row of operations.
ULPS = {torch.float32: 8, torch.bfloat16: 3, torch.float16: 3}


every_target = pytest.mark.parametrize("target", targets())


def _operations(target: str, dtype: torch.dtype) -> Operations:
    library = load(target)
    assume(dtype in library.dtypes)
    return Operations(library, dtype)


def _near(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Equal up to a few units in the last place of `scale`."""
    unit = torch.finfo(found.dtype).eps * ULPS[found.dtype]
    return bool(((found.double() - expected.double()).abs() <= unit * scale.double().abs() + 1e-30).all())


def _rows(dtype: torch.dtype, *shape: int, seed: int, scale: float = 3.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


shapes = given(
    rows=st.integers(1, 70), columns=st.integers(1, 900), dtype=st.sampled_from(list(ULPS)), seed=st.integers(0, 99)
)
few = settings(max_examples=25, deadline=None)


@every_target
@few
@shapes
def test_norms_and_activations_are_their_twins(
    target: str, rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    own = _operations(target, dtype)
    x, up, weight = (_rows(dtype, *shape, seed=seed) for shape in ((rows, columns), (rows, columns), (columns,)))
    out, expected = torch.empty_like(x), torch.empty_like(x)
    own.rms_norm(x, weight, 1e-5, out)
    ops.rms_norm(x, weight, 1e-5, expected)
    assert _near(out, expected, expected)
    gate, expected = x.clone(), x.clone()
    own.silu_times(gate, up)
    ops.silu_times(expected, up)
    assert _near(gate, expected, expected)


@every_target
@few
@given(
    rows=st.integers(1, 40),
    heads=st.integers(1, 5),
    half=st.integers(1, 70),
    normed=st.booleans(),
    dtype=st.sampled_from(list(ULPS)),
    seed=st.integers(0, 99),
)
def test_rotary_positions_are_their_twin(
    target: str, rows: int, heads: int, half: int, normed: bool, dtype: torch.dtype, seed: int
) -> None:
    own = _operations(target, dtype)
    x = _rows(dtype, rows, heads, 2 * half, seed=seed)
    weight = _rows(dtype, 2 * half, seed=seed + 1) if normed else None
    positions = torch.randint(40_000, (rows,), generator=torch.Generator().manual_seed(seed))
    frequencies = 1 / 10_000 ** (torch.arange(half) / half)
    factors = own.rotary_factors(positions, frequencies, 1.25)
    for found, expected in zip(factors, ops.rotary_factors(positions, frequencies, 1.25, dtype), strict=True):
        assert _near(found.to(dtype), expected.to(dtype), torch.ones(()))
    expected = x.clone()
    own.rotate(x, weight, 1e-6, *factors)
    ops.rotate(expected, weight, 1e-6, *factors)
    assert _near(x, expected, expected.float().abs().amax(-1, keepdim=True) + 3)


@every_target
@few
@shapes
def test_a_row_is_the_same_bits_alone_and_among_others(
    target: str, rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    own = _operations(target, dtype)
    rows *= 40  # enough for two threads
    x, weight = _rows(dtype, rows, columns, seed=seed), _rows(dtype, columns, seed=seed + 1)
    together, gate = torch.empty_like(x), x.clone()
    own.rms_norm(x, weight, 1e-6, together)
    own.silu_times(gate, together)
    for row in {0, rows // 3, rows - 1}:
        alone, gate_alone = torch.empty_like(x[:1]), x[row : row + 1].clone()
        own.rms_norm(x[row : row + 1], weight, 1e-6, alone)
        own.silu_times(gate_alone, alone)
        assert torch.equal(alone[0], together[row]) and torch.equal(gate_alone[0], gate[row])


@every_target
def test_extreme_numbers_are_treated_as_pytorch_treats_them(target: str) -> None:
    own = Operations(load(target), torch.float32)
    gate = torch.tensor([[-torch.inf, -200.0, -90.0, -87.0, 0.0, 88.0, 89.0, 200.0, torch.inf, torch.nan]])
    expected = gate.clone()
    up = torch.ones_like(gate)
    own.silu_times(gate, up)
    ops.silu_times(expected, up)
    torch.testing.assert_close(gate, expected, rtol=1e-6, atol=1e-36, equal_nan=True)
