"""Callables that speak the cache protocol are run cached, whatever form their past has; others are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kvloom
import tiny
from kvloom import AttachMismatch, UnsupportedModel
from kvloom.models import CachedCallableBinding, CallableBinding


def pairs(cache: DynamicCache) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((layer.keys, layer.values) for layer in cache.layers)


class Legacy:
    """A past that only its class can take apart."""

    def __init__(self, layers: tuple[tuple[Tensor, Tensor], ...]) -> None:
        self.secret = layers

    def to_legacy_cache(self) -> tuple[tuple[Tensor, Tensor], ...]:
        return self.secret

    @classmethod
    def from_legacy_cache(cls, layers: tuple[tuple[Tensor, Tensor], ...]) -> Legacy:
        return cls(layers)


class Protocol:
    """A model of transformers behind the protocol, with a past of some form; counts the tokens that it reads."""

    def __init__(self, model: PreTrainedModel, form: str) -> None:
        self.model, self.form = model, form
        self.read: list[int] = []

    def __call__(self, ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        if use_cache:
            self.read.append(ids.numel())
        cache = past_key_values
        if self.form != "cache" and use_cache:
            given = () if past_key_values is None else self.layers_of(past_key_values)
            cache = DynamicCache(given or None)
        out = self.model(ids, past_key_values=cache, use_cache=use_cache)
        if not use_cache or self.form == "cache":
            return out
        own = pairs(out.past_key_values)
        past = {
            "pairs": own,
            "lists": [list(pair) for pair in own],
            "stacked layers": tuple(torch.stack(pair) for pair in own),
            "tensor": torch.stack([torch.stack(pair) for pair in own]),
            "legacy": Legacy(own),
        }[self.form]
        return SimpleNamespace(logits=out.logits, past_key_values=past)

    def layers_of(self, past: Any) -> tuple[tuple[Tensor, Tensor], ...]:
        if self.form == "legacy":
            assert isinstance(past, Legacy)
            return past.secret
        return tuple((layer[0], layer[1]) for layer in past)


FORMS = ("pairs", "lists", "stacked layers", "tensor", "legacy", "cache")


@pytest.mark.parametrize("form", FORMS)
def test_a_callable_decodes_as_the_model_behind_it(form: str) -> None:
    model = tiny.tiny_model("llama")
    function = Protocol(model, form)
    lm = kvloom.attach(function)
    assert isinstance(lm.binding, CachedCallableBinding) and lm.vocab_size == 131
    reference = kvloom.attach(model)
    prompts = [tiny.random_ids(model, tokens=tokens, seed=tokens) for tokens in (3, 20, 20)]
    function.read.clear()
    greedy = lm.generate(prompts, max_new_tokens=7)
    assert [own.token_ids for own in greedy] == [own.token_ids for own in reference.generate(prompts, max_new_tokens=7)]
    assert sum(function.read) == sum(map(len, prompts)) + 3 * 6, "every token is read once, but the last"
    found, expected = (
        each.beam_search(prompts[1], num_beams=4, num_return_sequences=4, max_new_tokens=9) for each in (lm, reference)
    )
    assert [own.token_ids for own in found] == [own.token_ids for own in expected]
    assert found[0].score == pytest.approx(expected[0].score, abs=1e-4)
    uncached = lm.generate(prompts[1], max_new_tokens=7, use_cache=False)
    assert uncached.token_ids == greedy[1].token_ids


def test_a_callable_may_write_into_the_past_that_it_is_handed() -> None:
    model = tiny.tiny_model("llama")
    protocol = Protocol(model, "pairs")

    def consuming(ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        out = protocol(ids, past_key_values, use_cache)
        for keys, values in past_key_values or ():
            keys.zero_(), values.zero_()
        return out

    lm = kvloom.attach(consuming)
    ids = tiny.random_ids(model, tokens=30)
    expected = kvloom.attach(model).generate(ids, max_new_tokens=8).token_ids
    context = lm.prefill(ids[:20])
    for _ in range(2):
        assert lm.generate(ids[20:], context=context, max_new_tokens=8).token_ids == expected


def test_contexts_of_a_callable_are_forked_and_cut() -> None:
    model = tiny.tiny_model("gpt2")
    function = Protocol(model, "pairs")
    lm = kvloom.attach(function)
    ids = tiny.random_ids(model, tokens=30)
    context = lm.prefill(ids)
    function.read.clear()
    answers = [lm.generate([token], context=context.truncate(25), max_new_tokens=4) for token in (3, 4)]
    assert sum(function.read) == 2 * (1 + 3)
    for token, answer in zip((3, 4), answers, strict=True):
        assert answer.token_ids == lm.generate([*ids[:25], token], max_new_tokens=4, use_cache=False).token_ids


def test_weights_that_a_function_closes_over_are_watched() -> None:
    model = tiny.tiny_model("llama")
    lm = kvloom.attach(
        lambda ids, past_key_values=None, use_cache=True: model(
            ids, past_key_values=past_key_values, use_cache=use_cache
        )
    )
    ids = tiny.random_ids(model, tokens=40)
    before = lm.generate(ids, max_new_tokens=5).token_ids
    assert lm.generate(ids, max_new_tokens=5).usage.cached_prompt_tokens == 32
    model.model.layers[0].self_attn.v_proj.weight.mul_(-3)
    after = lm.generate(ids, max_new_tokens=5)
    assert after.usage.cached_prompt_tokens == 0 and after.token_ids != before
    model.train()
    with pytest.raises(UnsupportedModel, match="training mode"):
        lm.generate(ids, max_new_tokens=5)


def test_a_past_that_cannot_be_read_is_refused() -> None:
    model = tiny.tiny_model("llama")

    def opaque(ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        return SimpleNamespace(logits=model(ids).logits, past_key_values=object())

    with pytest.raises(UnsupportedModel, match="is a object, of which keys and values cannot be read"):
        kvloom.attach(opaque)

    def windowed(ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        out = Protocol(model, "pairs")(ids, past_key_values)
        out.past_key_values = tuple((k[:, :, -2:], v[:, :, -2:]) for k, v in out.past_key_values)
        return out

    with pytest.raises(UnsupportedModel, match="holds 2 tokens where it has read 3"):
        kvloom.attach(windowed)

    def mixed(ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        out = Protocol(model, "pairs")(ids)
        out.past_key_values = tuple((keys.double(), values) for keys, values in out.past_key_values)
        return out

    with pytest.raises(
        UnsupportedModel, match=r"holds tensors of torch.float32 and torch.float64; the cache keeps one"
    ):
        kvloom.attach(mixed)

    def one_row(ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        if len(ids) > 1:
            raise ValueError("one row at a time")
        return Protocol(model, "pairs")(ids, past_key_values)

    with pytest.raises(UnsupportedModel, match="it raised ValueError: one row at a time"):
        kvloom.attach(one_row)

    def no_object(ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Tensor:
        return model(ids).logits

    with pytest.raises(UnsupportedModel, match="must return an object with `logits` and `past_key_values`"):
        kvloom.attach(no_object)


def test_a_callable_that_forgets_its_past_is_refused() -> None:
    model = tiny.tiny_model("llama")

    def forgets(ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        out = Protocol(model, "pairs")(ids)
        if past_key_values is not None:
            joined = zip(past_key_values, out.past_key_values, strict=True)
            out.past_key_values = tuple(
                (torch.cat([k, own_k], 2), torch.cat([v, own_v], 2)) for (k, v), (own_k, own_v) in joined
            )
        return out

    with pytest.raises(AttachMismatch, match="first in the logits"):
        kvloom.attach(forgets)


def test_a_function_of_the_ids_alone_is_decoded_without_a_cache() -> None:
    model = tiny.tiny_model("llama")
    lm = kvloom.attach(lambda ids: model(ids).logits, vocab_size=131)
    assert type(lm.binding) is CallableBinding and lm.engine.cache is None
