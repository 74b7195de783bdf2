"""`lm.inspect`: what it says of blocks is what happened to them, and its keys and values are the model's own."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import kvloom
from kvloom.errors import ContextClosed, InvalidRequest
from tiny import WINDOW_TOKENS, random_ids, tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_keys_and_values_are_those_that_the_model_itself_caches(family: str) -> None:
    model = tiny_model(family)
    lm = kvloom.attach(model)
    token_ids = random_ids(model, tokens=37)
    own = model(torch.tensor([token_ids]), past_key_values=DynamicCache(config=model.config)).past_key_values
    seen = lm.inspect(lm.prefill(token_ids))
    for layer, cached in enumerate(own.layers):
        torch.testing.assert_close(seen.keys(layer), cached.keys[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(seen.values(layer), cached.values[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(seen.keys(layer, 14, 19), cached.keys[0, :, 14:19], atol=1e-4, rtol=1e-4)


def test_blocks_and_their_holders_are_counted() -> None:
    model = tiny_model("llama")
    lm = kvloom.attach(model)
    context = lm.prefill(random_ids(model, tokens=37))
    seen = lm.inspect(context)
    (group,) = seen.groups
    assert [(block.first, block.tokens) for block in group.blocks] == [(0, 16), (16, 16), (32, 5)]
    # The context, and for full blocks the prefix index.
    assert [block.references for block in group.blocks] == [2, 2, 1]
    with context.fork() as fork:
        assert [block.references for block in lm.inspect(fork).groups[0].blocks] == [3, 3, 2]
        assert [block.id for block in lm.inspect(fork).groups[0].blocks] == [block.id for block in group.blocks]
    assert [block.references for block in lm.inspect(context).groups[0].blocks] == [2, 2, 1]
    # 3 blocks of 16 tokens, 2 heads of 12 numbers, keys and values, 4 bytes each.
    assert seen.bytes_by_layer == (3 * 16 * 2 * 12 * 2 * 4,) * 3
    assert (seen.cached_tokens, group.tokens, len(seen.token_ids), group.layers) == (37, 37, 37, (0, 1, 2))


def test_layers_with_a_window_say_what_they_have_let_go_of() -> None:
    model = tiny_model("gemma2")
    lm = kvloom.attach(model)
    seen = lm.inspect(lm.prefill(random_ids(model, tokens=50)))
    full, window = seen.groups
    assert full.tokens == 50 and window.tokens < 50
    assert f"{WINDOW_TOKENS} tokens" in window.reach
    first = window.blocks[0].first
    assert seen.keys(window.layers[0], first).shape[1] == 50 - first
    with pytest.raises(InvalidRequest, match=f"first at position {first}"):
        seen.values(window.layers[0])


def test_what_cannot_be_read_is_refused() -> None:
    model = tiny_model("llama")
    lm = kvloom.attach(model)
    context = lm.prefill(random_ids(model, tokens=5))
    seen = lm.inspect(context)
    for layer, first, end in ((3, 0, 5), (-1, 0, 5), (0, 0, 6), (0, 3, 3), (0, -1, 2)):
        with pytest.raises(InvalidRequest):
            seen.keys(layer, first, end)
    for no_context in (lm.generate([1, 2], max_new_tokens=2), None, "text"):
        with pytest.raises(InvalidRequest):
            lm.inspect(no_context)
    context.close()
    with pytest.raises(ContextClosed):
        seen.keys(0)
    with pytest.raises(ContextClosed):
        lm.inspect(context)


def test_a_model_that_keeps_no_cache_holds_nothing() -> None:
    lm = kvloom.attach(lambda token_ids: torch.zeros(*token_ids.shape, 7), vocab_size=7)
    seen = lm.inspect(lm.prefill([1, 2, 3]))
    assert (seen.groups, seen.bytes_by_layer, seen.cached_tokens) == ((), (), 0)
    with pytest.raises(InvalidRequest, match="holds nothing"):
        seen.keys(0)
