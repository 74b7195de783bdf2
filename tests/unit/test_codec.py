"""The int8 codec: how far a code is from what it stands for, what it takes, and what it does not hide."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from kvloom.cache import CacheLayout, KVCache, LayerShape, Reach
from kvloom.cache.codec import check_codec, decode, encode_keys, encode_values, sealed_bytes
from kvloom.errors import InvalidRequest

CPU = torch.device("cpu")


def blocks(seed: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    """[heads, blocks, tokens, dim], with channels of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 3, 24) ** spread
    return (torch.randn(2, 3, 16, 24, generator=generator) * sizes).to(dtype)


def decoded_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = encode_keys(keys)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.int8, keys.shape, (2, 3, 24))
    return decode(codes, scales[:, :, None], torch.float32), scales[:, :, None].float().expand(keys.shape)


def decoded_values(values: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = encode_values(values)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.int8, values.shape, (2, 3, 16))
    return decode(codes, scales[..., None], torch.float32), scales[..., None].float().expand(values.shape)


@pytest.mark.parametrize("decoded", [decoded_keys, decoded_values])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@given(seed=st.integers(0, 1_000), spread=st.sampled_from([0.0, 0.3, 1.0]))
def test_a_number_is_missed_by_at_most_half_a_scale(decoded, dtype: torch.dtype, seed: int, spread: float) -> None:
    numbers = blocks(seed, dtype, spread)
    found, scales = decoded(numbers)
    assert ((found - numbers.float()).abs() <= 0.5001 * scales).all()


def test_keys_have_a_scale_a_channel_and_values_one_a_token() -> None:
    numbers = blocks(1)
    _, of_keys = encode_keys(numbers)
    _, of_values = encode_values(numbers)
    torch.testing.assert_close(of_keys.float(), numbers.abs().amax(2) / 127, rtol=2**-8, atol=0)
    torch.testing.assert_close(of_values.float(), numbers.abs().amax(3) / 127, rtol=2**-8, atol=0)


def test_zeros_stay_zeros_and_what_is_no_number_is_not_hidden() -> None:
    numbers = torch.zeros(2, 3, 16, 24)
    assert (decoded_keys(numbers)[0] == 0).all() and (decoded_values(numbers)[0] == 0).all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        numbers[1, 2, 3, 4] = bad
        assert decoded_keys(numbers)[0].isnan().nonzero().tolist() == [[1, 2, token, 4] for token in range(16)]
        assert decoded_values(numbers)[0].isnan().nonzero().tolist() == [[1, 2, 3, channel] for channel in range(24)]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_sealed_blocks_take_at_most_0_56_of_bfloat16(head_dim: int) -> None:
    native = 16 * 2 * head_dim * torch.bfloat16.itemsize
    assert sealed_bytes(key_dim=head_dim, value_dim=head_dim, block_tokens=16) <= 0.56 * native
    layer = LayerShape(kv_heads=3, key_dim=head_dim, value_dim=head_dim)
    layout = CacheLayout(layers=(layer,), dtype=torch.bfloat16, codec="int8")
    assert layout.bytes_per_block(layout.groups[0]) <= 0.56 * layout.bytes_per_open_block(layout.groups[0])
    assert layout.bytes_per_open_block(layout.groups[0]) == 3 * native


@given(
    blocks=st.integers(1, 3_000),
    block_tokens=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    extra=st.integers(0, 10_000),
)
def test_a_budget_is_allocated_to_the_planned_byte_and_never_exceeded(
    blocks: int, block_tokens: int, dtype: torch.dtype, extra: int
) -> None:
    layers = (
        LayerShape(kv_heads=2, key_dim=8, value_dim=6),
        LayerShape(kv_heads=1, key_dim=4, value_dim=4, reach=Reach(window_tokens=9)),
    )
    layout = CacheLayout(layers=layers, dtype=dtype, block_tokens=block_tokens, codec="int8")
    smallest = layout.budget_for(blocks)
    assert layout.blocks_in(smallest) == blocks and layout.blocks_in(smallest - 1) == blocks - 1
    cache = KVCache(layout, budget_bytes=smallest + extra, device=CPU)
    assert cache.store.allocated_bytes == layout.total_bytes(cache.blocks) <= smallest + extra
    assert layout.total_bytes(cache.blocks + 1) > smallest + extra
    assert cache.open_blocks == layout.open_blocks(cache.blocks)


@given(blocks=st.integers(1, 500), open_blocks=st.integers(1, 200))
def test_a_budget_for_open_blocks_is_the_smallest_that_has_them(blocks: int, open_blocks: int) -> None:
    layer = LayerShape(kv_heads=1, key_dim=4, value_dim=4)
    layout = CacheLayout(layers=(layer,), dtype=torch.float32, codec="int8")
    budget = layout.budget_for(blocks, open_blocks=open_blocks)

    def serves(size: int) -> bool:
        own = layout.blocks_in(size)
        return own >= blocks and layout.open_blocks(own) >= open_blocks

    assert serves(budget) and not serves(budget - 1)


def test_an_unknown_codec_is_refused_by_name() -> None:
    assert check_codec("int8") == "int8"
    with pytest.raises(InvalidRequest, match="codec=int4"):
        check_codec("int4")
