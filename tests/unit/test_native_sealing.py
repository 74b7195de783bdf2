"""Blocks that the native kernels seal are, bit by bit, what the codec makes of them."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from kvloom.cache.codec import encode_keys, encode_values
from kvloom.native.library import load
from kvloom.native.rows import BlockSealer
from native_targets import targets

every_target = pytest.mark.parametrize("target", targets())


@every_target
@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    heads=st.integers(1, 3),
    blocks=st.integers(0, 3),
    block_tokens=st.sampled_from([1, 4, 16]),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    extreme=st.sampled_from([None, 0.0, 1e-40, 1e-38, 3e38, torch.inf, -torch.inf, torch.nan]),
    seed=st.integers(0, 99),
)
def test_kernels_seal_blocks_bit_by_bit_as_the_codec_does(
    target: str,
    dtype: torch.dtype,
    heads: int,
    blocks: int,
    block_tokens: int,
    dims: tuple[int, int],
    extreme: float | None,
    seed: int,
) -> None:
    assume(dtype in load(target).dtypes)
    generator = torch.Generator().manual_seed(seed)
    tokens = blocks * block_tokens + 3

    def draw(dim: int) -> Tensor:
        numbers = torch.randn(heads, tokens, dim, generator=generator)
        if extreme is not None:
            chosen = torch.rand(heads, tokens, dim, generator=generator) < 0.1
            numbers = torch.where(chosen, torch.tensor(extreme), numbers)
            numbers[:, ::2] = extreme
        return numbers.to(dtype)

    keys, values = map(draw, dims)
    source = torch.randint(tokens, (blocks, block_tokens), generator=generator)
    places = torch.randperm(5, generator=generator)[:blocks]
    kept_keys = (
        torch.zeros(heads, 5 * block_tokens, dims[0], dtype=torch.int8),
        torch.zeros(heads, 5, dims[0]).bfloat16(),
    )
    kept_values = (
        torch.zeros(heads, 5 * block_tokens, dims[1], dtype=torch.int8),
        torch.zeros(heads, 5 * block_tokens).bfloat16(),
    )
    BlockSealer(load(target), kept_keys, kept_values, block_tokens).seal(keys, values, places, source)
    expected = encode_keys(keys[:, source]), encode_values(values[:, source])
    found = (
        (kept_keys[0].view(heads, 5, block_tokens, -1)[:, places], kept_keys[1][:, places]),
        (kept_values[0].view(heads, 5, block_tokens, -1)[:, places], kept_values[1].view(heads, 5, -1)[:, places]),
    )
    for (codes, scales), (own_codes, own_scales) in zip(found, expected, strict=True):
        assert torch.equal(codes, own_codes)
        torch.testing.assert_close(scales, own_scales, rtol=0, atol=0, equal_nan=True)
