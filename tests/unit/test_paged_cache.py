"""`PagedCache` does what transformers' own tests ask of a cache, and moves no keys and values where it need not."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import kvloom
import tiny
from kvloom import CacheFull, CacheMismatch, PagedCache, UnsupportedModel
from kvloom.cache import LayerShape

SHAPES = (LayerShape(kv_heads=2, key_dim=4, value_dim=4), LayerShape(kv_heads=1, key_dim=3, value_dim=5))


def paged(*, budget_tokens: int = 4_096, block_tokens: int = 4) -> PagedCache:
    token_bytes = 4 * sum(shape.elements_per_token() for shape in SHAPES)
    return PagedCache(SHAPES, dtype=torch.float32, budget_bytes=budget_tokens * token_bytes, block_tokens=block_tokens)


def states(generator: torch.Generator, batch: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """New keys and values for every layer."""
    return [
        (
            torch.randn(batch, shape.kv_heads, tokens, shape.key_dim, generator=generator),
            torch.randn(batch, shape.kv_heads, tokens, shape.value_dim, generator=generator),
        )
        for shape in SHAPES
    ]


def update(cache: Any, new: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [tensor for layer, pair in enumerate(new) for tensor in cache.update(*pair, layer)]


def assert_equal(ours: PagedCache, theirs: DynamicCache) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    for (keys, values, _), (own_keys, own_values, _) in zip(theirs, ours, strict=True):
        assert (keys is None or not keys.numel()) == (own_keys is None)
        if own_keys is not None:
            assert torch.equal(keys, own_keys) and torch.equal(values, own_values)


Action = tuple[str, int]
ACTIONS: st.SearchStrategy[list[Action]] = st.lists(
    st.tuples(st.sampled_from(["update", "reorder", "crop", "repeat", "select", "fork", "reset"]), st.integers(0, 99)),
    max_size=14,
)


@settings(max_examples=60)
@given(ACTIONS)
def test_any_sequence_of_operations_leaves_what_a_dynamic_cache_holds(actions: list[Action]) -> None:
    ours, theirs = paged(), DynamicCache()
    generator = torch.Generator().manual_seed(0)
    batch = 2
    for name, number in [("update", 5), *actions]:
        if name == "update":
            new = states(generator, batch, 1 + number % 7)
            for got, expected in zip(update(ours, new), update(theirs, new), strict=True):
                assert torch.equal(got, expected)
        elif name == "reset":
            ours.reset()
            theirs.reset()
            batch = 1 + number % 3
        elif not ours.get_seq_length():
            continue
        elif name == "reorder":
            order = torch.randint(batch, (batch,), generator=generator)
            ours.reorder_cache(order)
            theirs.reorder_cache(order)
        elif name == "crop":
            count = min(number % 6, ours.get_seq_length())
            ours.crop(-count)
            theirs.crop(-count)
        elif name == "repeat" and batch < 5:
            ours.batch_repeat_interleave(2)
            theirs.batch_repeat_interleave(2)
            batch *= 2
        elif name == "select":
            kept = torch.arange(batch)[: 1 + number % batch]
            ours.batch_select_indices(kept)
            theirs.batch_select_indices(kept)
            batch = len(kept)
        elif name == "fork":
            ours, abandoned = ours.fork(), ours
            update(abandoned, states(generator, batch, 3))  # the one must not notice the other
        assert_equal(ours, theirs)
    ours.reset()
    pool = ours._rows.cache.groups[0].pool
    assert pool.free + pool.referenced == pool.total


def test_it_has_layers_and_lengths_as_other_caches_do() -> None:
    cache = paged()
    assert len(cache) == len(cache.layers) == 2 and cache.is_initialized and not cache.is_compileable
    assert cache.is_croppable and cache.is_sliding == [False, False]
    assert [cache.get_seq_length(layer) for layer in (0, 1, 7)] == [0, 0, 0]
    assert cache.get_mask_sizes(5, 0) == (5, 0) and cache.batch_size == -1
    update(cache, states(torch.Generator(), 3, 6))
    assert cache.get_seq_length(1) == 6 and cache.get_mask_sizes(2, 1) == (8, 0) and cache.get_query_offset() == 6
    assert cache.batch_size == 3 and cache.get_max_length() == -1
    assert [tuple(keys.shape) for keys, _, _ in cache] == [(3, 2, 6, 4), (3, 1, 6, 3)]
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(3)
    with pytest.raises(NotImplementedError, match="in all layers at once"):
        cache.layers[0].reorder_cache(torch.tensor([0]))


def test_forks_and_beams_share_blocks_until_they_write() -> None:
    cache = paged(block_tokens=4)
    update(cache, states(torch.Generator(), 1, 10))
    assert cache.blocks_in_use == 3
    cache.batch_repeat_interleave(4)
    fork, copied = cache.fork(), copy.deepcopy(cache)
    assert cache.blocks_in_use == 3
    update(cache, states(torch.Generator(), 4, 1))
    # Each row but the last holder of the partial block copies it; the forks still hold the old one.
    assert cache.blocks_in_use == 3 + 4
    del fork, copied
    assert cache.blocks_in_use == 2 + 4
    cache.reset()
    assert cache.blocks_in_use == 0


def test_the_budget_is_never_exceeded() -> None:
    cache = paged(budget_tokens=16, block_tokens=4)
    update(cache, states(torch.Generator(), 2, 8))
    with pytest.raises(CacheFull, match=r"2 rows of 9 tokens: 1 blocks are needed and 0 are free, of 4 in a budget"):
        update(cache, states(torch.Generator(), 2, 1))
    assert cache.get_seq_length() == 8
    with pytest.raises(CacheMismatch, match="holds 2 rows, and was given keys of 3"):
        update(cache, states(torch.Generator(), 3, 1))
    with pytest.raises(CacheFull, match="below one block"):
        paged(budget_tokens=3)


def test_a_fork_that_the_garbage_collector_drops_in_the_middle_of_a_change_is_closed_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = paged(budget_tokens=32, block_tokens=4)
    update(cache, states(torch.Generator(), 1, 10))
    forks = [cache.fork()]
    update(forks[0], states(torch.Generator(), 1, 1))
    store = cache._rows.cache.store
    in_use = []
    gc.disable()
    try:
        forks.append(forks)  # type: ignore[arg-type]
        forks = []

        def collecting(*copies: Any) -> None:
            gc.collect()
            in_use.append(cache.blocks_in_use)

        monkeypatch.setattr(store, "copy", collecting)
        update(cache, states(torch.Generator(), 1, 3))
    finally:
        gc.enable()
    # Ten tokens and three more are four blocks; of its own the fork had the third.
    assert (in_use, cache.blocks_in_use) == ([5], 4)


def test_forks_in_reference_cycles_do_not_keep_the_pool_full() -> None:
    cache = paged(budget_tokens=16, block_tokens=4)
    gc.disable()
    try:
        cycle: list[object] = [cache.fork()]
        update(cycle[0], states(torch.Generator(), 1, 16))
        cycle.append(cycle)
        with pytest.raises(CacheFull):
            update(cache, states(torch.Generator(), 1, 5))
        del cycle
        update(cache, states(torch.Generator(), 1, 5))
    finally:
        gc.enable()
    assert cache.blocks_in_use == 2


def test_forks_decode_on_several_threads_as_on_one() -> None:
    cache = paged(block_tokens=4)
    update(cache, states(torch.Generator().manual_seed(1), 1, 10))
    held: dict[int, Any] = {}

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            own = cache.fork()
            own.batch_repeat_interleave(2)
            for _ in range(3):
                update(own, states(generator, 2, 3))
        held[seed] = own

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        alone, generator = DynamicCache(), torch.Generator().manual_seed(seed)
        update(alone, states(torch.Generator().manual_seed(1), 1, 10))
        alone.batch_repeat_interleave(2)
        for _ in range(29 * 3):
            states(generator, 2, 3)
        for _ in range(3):
            update(alone, states(generator, 2, 3))
        assert_equal(held[seed], alone)
    held.clear()
    del alone
    assert cache.blocks_in_use == 3


def test_a_pass_that_was_cut_short_is_taken_back_before_the_next() -> None:
    cache = paged()
    update(cache, states(torch.Generator(), 1, 6))
    lost = states(torch.Generator(), 1, 4)
    cache.update(*lost[0], 0)  # and then the model raised
    with pytest.raises(CacheMismatch, match=r"over 4 tokens was cut short.*crop\(-4\)"):
        cache.update(*lost[0], 0)
    cache.crop(-4)
    update(cache, lost)
    assert cache.get_seq_length(0) == cache.get_seq_length(1) == 10


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "bloom", "falcon"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_generate_of_transformers_gives_the_same_with_it(family: str, options: dict[str, int]) -> None:
    model = tiny.tiny_model(family)
    ids = torch.tensor([tiny.random_ids(model, tokens=12, seed=seed) for seed in (1, 2)])
    call: Callable[..., Tensor] = model.generate
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, **options}
    expected = call(ids, attention_mask=torch.ones_like(ids), **options)
    cache = PagedCache.for_model(model, budget_bytes=2**22)
    assert torch.equal(call(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options), expected)
    assert cache.get_seq_length() == 12 + 13


def test_a_prompt_that_is_computed_once_is_continued_in_several_ways() -> None:
    model = tiny.tiny_model("llama")
    prompt = tiny.random_ids(model, tokens=40)
    cache = kvloom.PagedCache.for_model(model, budget_bytes=2**22)
    model(torch.tensor([prompt]), past_key_values=cache)
    for seed in (1, 2, 3):
        ids = torch.tensor([prompt + tiny.random_ids(model, tokens=3, seed=seed)])
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, past_key_values=cache.fork(), **options), expected)
    assert cache.get_seq_length() == 40 and cache.blocks_in_use == 3


def test_a_model_that_keeps_more_than_one_cache_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="encoder-decoder model, which wants two caches"):
        PagedCache.for_model(tiny.tiny_model("t5"), budget_bytes=2**20)
