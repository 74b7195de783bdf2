"""Caches of transformers become contexts, and contexts become caches of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import kvloom
from kvloom.errors import InvalidRequest
from tiny import random_ids, tiny_model

TOLERANCE = 1e-4


def own_cache(model: PreTrainedModel, token_ids: list[int]) -> DynamicCache:
    return model(torch.tensor([token_ids]), past_key_values=DynamicCache(config=model.config)).past_key_values


def as_tuple(cache: DynamicCache) -> tuple[Any, ...]:
    return tuple((layer.keys, layer.values) for layer in cache.layers)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_an_imported_cache_is_continued_as_if_it_had_been_computed_here(family: str) -> None:
    model = tiny_model(family)
    lm = kvloom.attach(model)
    token_ids = random_ids(model, tokens=37)
    plain = lm.generate(token_ids, max_new_tokens=6, use_cache=False)
    for cache in (own_cache(model, token_ids[:30]), as_tuple(own_cache(model, token_ids[:30]))):
        context = lm.import_cache(token_ids[:30], cache)
        assert (context.tokens, context.cached_tokens) == (30, 30)
        out = lm.generate(token_ids[30:], context=context, max_new_tokens=6)
        assert out.token_ids == plain.token_ids
        assert (out.usage.cached_prompt_tokens, out.usage.computed_prompt_tokens) == (30, 7)
    # Token ids may go on beyond what the cache holds.
    longer = lm.import_cache(token_ids, own_cache(model, token_ids[:30]))
    assert lm.beam_search(context=longer, num_beams=3, max_new_tokens=6)[0].token_ids == (
        lm.beam_search(token_ids, num_beams=3, max_new_tokens=6)[0].token_ids
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_an_exported_cache_is_continued_by_the_model_itself(family: str) -> None:
    model = tiny_model(family)
    lm = kvloom.attach(model)
    token_ids = random_ids(model, tokens=37)
    cache = lm.prefill(token_ids[:30]).export_cache()
    assert cache.get_seq_length() == 30
    expected = model(torch.tensor([token_ids])).logits[0, 30:]
    got = model(torch.tensor([token_ids[30:]]), past_key_values=cache).logits[0]
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)
    back = lm.import_cache(token_ids, lm.prefill(token_ids).export_cache())
    assert lm.inspect(back).keys(1).equal(lm.inspect(lm.prefill(token_ids)).keys(1))


def test_nothing_of_an_imported_cache_is_found_by_other_prompts() -> None:
    model = tiny_model("llama")
    lm = kvloom.attach(model)
    token_ids = random_ids(model, tokens=40)
    wrong = [
        (torch.randn_like(keys), torch.randn_like(values)) for keys, values in as_tuple(own_cache(model, token_ids))
    ]
    expected = lm.generate(token_ids, max_new_tokens=20, use_cache=False).token_ids
    context = lm.import_cache(token_ids, wrong)
    led_astray = lm.generate(context.token_ids[:1], context=context, max_new_tokens=20)
    lm.generate([5, 6], context=led_astray.context, max_new_tokens=20)
    lm.extend(context.fork(), [1, 2, 3])
    out = lm.generate(token_ids, max_new_tokens=20)
    assert out.token_ids == expected
    assert out.usage.cached_prompt_tokens == 0


def test_windows_take_what_they_need_of_a_cache_that_holds_everything() -> None:
    model = tiny_model("gemma2")
    lm = kvloom.attach(model)
    token_ids = random_ids(model, tokens=37)
    # Without a config, a cache of transformers keeps what windows have left behind.
    cache = DynamicCache()
    model(torch.tensor([token_ids[:30]]), past_key_values=cache)
    out = lm.generate(token_ids[30:], context=lm.import_cache(token_ids[:30], cache), max_new_tokens=6)
    assert out.token_ids == lm.generate(token_ids, max_new_tokens=6, use_cache=False).token_ids
    with pytest.raises(InvalidRequest, match="does not hold tokens"):
        lm.prefill(token_ids).export_cache()
    with pytest.raises(InvalidRequest, match="the same tokens in each layer"):
        lm.import_cache(token_ids[:30], own_cache(model, token_ids[:30]))


def test_a_cache_that_does_not_fit_the_model_is_refused_and_nothing_is_held() -> None:
    model = tiny_model("llama")
    lm = kvloom.attach(model)
    token_ids = random_ids(model, tokens=9)
    pairs = as_tuple(own_cache(model, token_ids))
    keys, values = pairs[0]
    bad: list[Any] = [
        None,
        (),
        "text",
        DynamicCache(),
        pairs[:2],
        ((keys, values, keys), *pairs[1:]),
        ((keys[:, :1], values), *pairs[1:]),
        ((keys[:, :, :4], values[:, :, :4]), *pairs[1:]),
        ((keys.double(), values.double()), *pairs[1:]),
        tuple((k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)) for k, v in pairs),
    ]
    for cache in bad:
        with pytest.raises(InvalidRequest):
            lm.import_cache(token_ids, cache)
    with pytest.raises(InvalidRequest, match="the cache holds 9 tokens, and 4 token ids"):
        lm.import_cache(token_ids[:4], pairs)
    with pytest.raises(InvalidRequest, match="no cache can be imported"):
        kvloom.attach(tiny_model("phi3_longrope")).import_cache(token_ids, pairs)
    small = kvloom.attach(model, budget_bytes=lm.engine.cache.layout.bytes_per_row_of_blocks)
    long = random_ids(model, tokens=40)
    with pytest.raises(kvloom.CacheFull, match="a cache for 40 tokens"):
        small.import_cache(long, own_cache(model, long))
    for own in (lm, small):
        assert own.engine.cache.groups[0].pool.referenced == 0


def test_an_imported_context_cannot_be_saved(tmp_path: Any) -> None:
    model = tiny_model("llama")
    lm = kvloom.attach(model)
    token_ids = random_ids(model, tokens=9)
    with pytest.raises(InvalidRequest, match="imported"):
        lm.import_cache(token_ids, own_cache(model, token_ids)).save(tmp_path / "context.kv")
    assert not list(tmp_path.iterdir())
