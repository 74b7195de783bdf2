"""Models and layers in native kernels: recognised by structure, proven by numbers, left alone when anything changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kvloom
from kvloom.native import Library, native
from tiny import random_ids, tiny_model

if not isinstance(native(), Library):
    pytest.skip("there are no native kernels here", allow_module_level=True)

KNOWN = ("llama", "qwen2", "qwen3", "mistral")


def _attach(model: Any, **options: Any) -> kvloom.LanguageModel:
    return kvloom.attach(model, budget_bytes=1 << 22, **options)


def _not_native(lm: kvloom.LanguageModel) -> dict[str, str]:
    return {own.name: own.reason for own in lm.engine.binding.native.operations() if not own.native}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", KNOWN)
def test_the_native_model_gives_the_logits_of_the_models_own_forward(family: str, dtype: torch.dtype) -> None:
    if dtype not in native().dtypes:
        pytest.skip("this CPU does not convert float16")
    model = tiny_model(family, dtype=dtype)
    binding = _attach(model).engine.binding
    assert binding.bit_identical
    ids = torch.tensor([random_ids(model, tokens=40, seed=seed) for seed in (1, 2)])
    own, found = binding.forward_own(ids, last=None).float(), binding.forward_uncached(ids, last=None).float()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}[dtype]
    assert float((found - own).norm() / own.norm()) < tolerance


def test_whatever_is_put_together_in_another_way_is_left_to_its_modules() -> None:
    expected = {
        "granite": "gives other numbers",  # the same modules, with multipliers between them
        "gemma2": "besides",
        "mixtral": "has no `gate_proj`",
        "gpt2": "has no attention",
    }
    for family, reason in expected.items():
        lm = _attach(tiny_model(family))
        assert not lm.engine.binding.bit_identical
        assert reason in next(iter(_not_native(lm).values())), family


def test_one_layer_that_differs_leaves_the_others_native_and_the_output_right() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = nn.GELU().eval()
    ids = random_ids(model, tokens=20)
    lm = _attach(model)
    assert set(_not_native(lm)) == {"model.layers.1", "embeddings, last norm and output layer"}
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, 20:].tolist()
    assert lm.generate(ids, max_new_tokens=8, eos_token_id=None).token_ids == expected


def test_a_hook_fires_and_can_change_what_its_module_gives() -> None:
    model = tiny_model("qwen2")
    ids = random_ids(model, tokens=12)
    lm = _attach(model)
    before = lm.generate(ids, max_new_tokens=4, eos_token_id=None, output_logits=True)
    seen = []
    handle = model.model.layers[2].mlp.register_forward_hook(lambda *_: seen.append(1))
    hooked = lm.generate(ids, max_new_tokens=4, eos_token_id=None, output_logits=True)
    assert seen and not lm.engine.binding.bit_identical
    assert "model.layers.2" in _not_native(lm)
    torch.testing.assert_close(hooked.logits, before.logits, rtol=1e-4, atol=1e-4)
    handle.remove()
    handle = model.model.norm.register_forward_hook(lambda module, given, output: output * 0.5)
    halved = lm.generate(ids, max_new_tokens=1, eos_token_id=None, output_logits=True)
    torch.testing.assert_close(halved.logits, before.logits[:1] / 2, rtol=1e-4, atol=1e-4)
    handle.remove()
    after = lm.generate(ids, max_new_tokens=4, eos_token_id=None, output_logits=True)
    assert lm.engine.binding.bit_identical and torch.equal(after.logits, before.logits)


def test_a_patched_forward_is_run_from_the_next_request_on() -> None:
    model = tiny_model("llama")
    ids = random_ids(model, tokens=12)
    lm = _attach(model)
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: torch.zeros_like(x)
    expected = model(torch.tensor([ids])).logits[0, -1]
    found = lm.generate(ids, max_new_tokens=1, eos_token_id=None, output_logits=True).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    del mlp.forward
    assert lm.generate(ids, max_new_tokens=1, eos_token_id=None).usage and lm.engine.binding.bit_identical


def test_changed_weights_are_used_from_the_next_request_on() -> None:
    model = tiny_model("qwen3")
    ids = random_ids(model, tokens=12)
    lm = _attach(model)
    lm.generate(ids, max_new_tokens=1, eos_token_id=None)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.5)  # packed: read anew
        model.model.layers[0].input_layernorm.weight.mul_(0.7)  # read where it lies
        model.model.layers[2].post_attention_layernorm.weight = nn.Parameter(torch.rand(48), requires_grad=False)
    expected = model(torch.tensor([ids])).logits[0, -1]
    found = lm.generate(ids, max_new_tokens=1, eos_token_id=None, output_logits=True).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert lm.engine.binding.bit_identical


def test_an_exclusive_model_is_native_and_comes_back_whole() -> None:
    model = tiny_model("qwen2")  # tied embeddings
    ids = random_ids(model, tokens=12)
    expected = model(torch.tensor([ids])).logits
    plain = _attach(model).generate(ids, max_new_tokens=4, eos_token_id=None, output_logits=True).logits
    lm = _attach(model, exclusive=True)
    assert lm.engine.binding.bit_identical
    assert torch.equal(lm.generate(ids, max_new_tokens=4, eos_token_id=None, output_logits=True).logits, plain)
    lm.detach()
    assert torch.equal(model(torch.tensor([ids])).logits, expected)


def test_a_token_beyond_the_vocabulary_is_an_error_and_no_memory_is_read() -> None:
    binding = _attach(tiny_model("llama")).engine.binding
    with pytest.raises(IndexError, match="0 to 130"):
        binding.forward_uncached(torch.tensor([[5, 131]]))
    with pytest.raises(IndexError):
        binding.forward_uncached(torch.tensor([[-1]]))


def test_verify_says_bit_identical_and_compares_with_the_models_own_forward() -> None:
    report = _attach(tiny_model("mistral")).verify(max_new_tokens=6)
    *others, own = report.checks
    assert report.ok and report.bit_identical
    assert (own.reference, own.verdict) in {("own forward", "equal"), ("own forward", "near tie")}
    assert {check.verdict for check in others} == {"bit-identical"}
    assert "bit-identical" in str(report)
