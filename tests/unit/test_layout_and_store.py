"""Bytes: what the layout predicts is what the store allocates, and what does not fit is refused with numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvloom.blocks import BlockCopy
from kvloom.cache import CacheLayout, KVCache, LayerShape, Reach, Store
from kvloom.errors import CacheFull, KVLoomError

CPU = torch.device("cpu")
MiB = 1024**2


@pytest.fixture
def mixed() -> CacheLayout:
    """Unlike heads, head sizes and reaches in one model."""
    return CacheLayout(
        layers=(
            LayerShape(kv_heads=2, key_dim=8, value_dim=8, reach=Reach(window_tokens=12)),
            LayerShape(kv_heads=1, key_dim=24, value_dim=16),
            LayerShape(kv_heads=2, key_dim=8, value_dim=8, reach=Reach(window_tokens=12)),
            LayerShape(kv_heads=3, key_dim=5, value_dim=7, reach=Reach(chunk_tokens=9)),
        ),
        dtype=torch.bfloat16,
        block_tokens=4,
    )


def test_llama_7b_takes_512_mebibytes_for_1024_tokens_in_16_bits() -> None:
    layer = LayerShape(kv_heads=32, key_dim=128, value_dim=128)
    layout = CacheLayout(layers=(layer,) * 32, dtype=torch.bfloat16)
    assert layout.bytes_per_token * 1024 == 512 * MiB
    assert layout.bytes_per_row_of_blocks * layout.blocks_of(1024) == 512 * MiB
    assert layout.blocks_in(512 * MiB) == 64
    assert layout.blocks_in(512 * MiB - 1) == 63


def test_layers_of_one_reach_form_a_group_and_full_attention_comes_first(mixed: CacheLayout) -> None:
    assert [group.layers for group in mixed.groups] == [(1,), (3,), (0, 2)]
    assert [str(group.reach) for group in mixed.groups] == [
        "full attention",
        "chunks of 9 tokens",
        "window of 12 tokens",
    ]
    assert mixed.group_of_layer == (2, 0, 2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("blocks", [1, 7])
def test_the_bytes_predicted_are_the_bytes_allocated(mixed: CacheLayout, dtype: torch.dtype, blocks: int) -> None:
    layout = CacheLayout(layers=mixed.layers, dtype=dtype, block_tokens=mixed.block_tokens)
    cache = KVCache(layout, budget_bytes=blocks * layout.bytes_per_row_of_blocks + 1, device=CPU)
    assert cache.blocks == blocks
    assert cache.store.allocated_bytes == blocks * layout.bytes_per_row_of_blocks
    assert cache.store.allocated_bytes == blocks * layout.block_tokens * layout.bytes_per_token
    assert cache.bytes_of([blocks] * 3) == cache.store.allocated_bytes


def test_a_budget_below_one_block_is_refused_with_the_numbers(mixed: CacheLayout) -> None:
    need = mixed.bytes_per_row_of_blocks
    with pytest.raises(
        CacheFull, match=f"budget_bytes={need - 1:,} is below one block.* takes {need:,} bytes"
    ) as error:
        KVCache(mixed, budget_bytes=need - 1, device=CPU)
    assert isinstance(error.value, KVLoomError)
    assert "Raise budget_bytes" in str(error.value)
    assert KVCache(mixed, budget_bytes=need, device=CPU).blocks == 1


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_a_block_that_is_begun_counts_as_a_whole_one(mixed: CacheLayout, tokens: int, blocks: int) -> None:
    assert mixed.blocks_of(tokens) == blocks


def test_keys_and_values_lie_heads_first_each_layer_with_its_own_size(mixed: CacheLayout) -> None:
    store = Store(mixed, 3, CPU)
    assert [tuple(keys.shape) for keys in store.keys] == [(2, 12, 8), (1, 12, 24), (2, 12, 8), (3, 12, 5)]
    assert [tuple(values.shape) for values in store.values] == [(2, 12, 8), (1, 12, 16), (2, 12, 8), (3, 12, 7)]


def test_a_copy_moves_the_slots_it_names_in_its_own_group_only(mixed: CacheLayout) -> None:
    store = Store(mixed, 3, CPU)
    for tensor in (*store.keys, *store.values):
        tensor.copy_(torch.arange(12)[None, :, None].expand(tensor.shape))
    store.copy(mixed.groups[2], [BlockCopy(source=0, target=2, offset=1, count=2)])
    for layer in range(4):
        moved = layer in mixed.groups[2].layers
        for tensor in (store.keys[layer], store.values[layer]):
            assert tensor[-1, :, -1].tolist() == [*range(9), *([1, 2] if moved else [9, 10]), 11]


def test_tokens_are_written_to_their_slots_in_any_order(mixed: CacheLayout) -> None:
    store = Store(mixed, 3, CPU)
    keys, values = torch.randn(1, 3, 24).bfloat16(), torch.randn(1, 3, 16).bfloat16()
    store.write(1, torch.tensor([11, 0, 5]), keys, values)
    assert torch.equal(store.keys[1][:, [11, 0, 5]], keys)
    assert torch.equal(store.values[1][:, [11, 0, 5]], values)


@pytest.mark.parametrize(
    ("reach", "first"),
    [
        (Reach(), [0, 0, 0, 0, 0, 0, 0]),
        (Reach(window_tokens=1), [0, 1, 2, 3, 4, 5, 6]),
        (Reach(window_tokens=3), [0, 0, 0, 1, 2, 3, 4]),
        (Reach(chunk_tokens=1), [0, 1, 2, 3, 4, 5, 6]),
        (Reach(chunk_tokens=3), [0, 0, 0, 3, 3, 3, 6]),
    ],
    ids=str,
)
def test_a_reach_says_what_a_query_sees_and_what_a_sequence_must_keep(reach: Reach, first: list[int]) -> None:
    assert reach.first_visible(np.arange(7)).tolist() == first
    assert [reach.first_needed(length) for length in range(7)] == first


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gathered_slots_are_those_that_were_asked_for(
    dtype: torch.dtype, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVLOOM_NATIVE", native)
    layer = LayerShape(kv_heads=3, key_dim=24, value_dim=7)
    store = Store(CacheLayout(layers=(layer,), dtype=dtype, block_tokens=4), 60, CPU)
    for kept in (store.keys[0], store.values[0]):
        kept.copy_(torch.randn(kept.shape))
    # Runs, single slots, backwards, repeated, and up to the last slot.
    slots = torch.tensor([[*range(40, 100), 7, 7, 6, 5], [*range(180, 240), 0, 2, 4, 6]])
    for own, kept in zip(store.gather(0, slots), (store.keys[0], store.values[0]), strict=True):
        assert own.is_contiguous() and torch.equal(own, kept[:, slots].transpose(0, 1))
