"""Models with an attention of their own decode on the cache interface as they do alone; nobody has to choose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import kvloom
import tiny
from kvloom import AttachMismatch, InvalidRequest, UnsupportedModel
from kvloom.attention.source import Source as Reads
from kvloom.models import AttentionInterfaceBinding, CacheInterfaceBinding
from kvloom.models.dense import step_cache
from kvloom.models.dense.batches import _together
from kvloom.models.hosted.cache_interface import PaddingCacheBinding
from kvloom.models.proofs import selfcheck, small_windows

FAMILIES = [(family, {}) for family in tiny.OWN_ATTENTION_FAMILIES] + [
    ("falcon", {"alibi": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
]
NAMES = ["bloom", "falcon", "falcon alibi", "falcon grouped"]


@pytest.fixture(params=FAMILIES, ids=NAMES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, changes = request.param
    return tiny.tiny_model(family, **changes)


def alone(model: PreTrainedModel, prompt: list[int], **options: object):
    return model.generate(
        torch.tensor([prompt]), do_sample=False, return_dict_in_generate=True, output_scores=True, **options
    )


def prompts_of(model: PreTrainedModel, *lengths: int) -> list[list[int]]:
    return [tiny.random_ids(model, tokens=tokens, seed=tokens) for tokens in lengths]


def test_ragged_batches_beams_and_samples_are_those_of_the_model_alone(model: PreTrainedModel) -> None:
    lm = kvloom.attach(model)
    assert lm.binding.name == "transformers cache interface"
    assert "attention interface" in lm.binding.reason
    prompts = prompts_of(model, 3, 20, 20, 37)
    for out, prompt in zip(lm.generate(prompts, max_new_tokens=9), prompts, strict=True):
        assert out.token_ids == alone(model, prompt, max_new_tokens=9).sequences[0, len(prompt) :].tolist()
    beams = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 12, "length_penalty": 0.7}
    for hypotheses, prompt in zip(lm.beam_search(prompts, **beams), prompts, strict=True):
        expected = alone(model, prompt, **beams)
        assert hypotheses.sequences.tolist() == expected.sequences.tolist()
        scores = torch.tensor([own.score for own in hypotheses])
        torch.testing.assert_close(scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)
        assert hypotheses[0].usage.computed_prompt_tokens <= len(prompt), "a prompt is computed once for its beams"
    draws = {"do_sample": True, "seed": 11, "num_return_sequences": 3, "max_new_tokens": 9}
    cached, uncached = (lm.generate(prompts[2], use_cache=use, **draws) for use in (True, False))
    assert [own.token_ids for own in cached] == [own.token_ids for own in uncached]


def test_contexts_prefixes_snapshots_and_scores_work_as_on_the_other_binding(tmp_path: Path) -> None:
    model = tiny.tiny_model("bloom")
    lm = kvloom.attach(model, block_tokens=8)
    ids = tiny.random_ids(model, tokens=45)
    context = lm.prefill(ids)
    assert lm.generate(ids, max_new_tokens=2).usage.cached_prompt_tokens == 40
    cut = context.truncate(29)
    expected = lm.generate([*ids[:29], 5, 6], max_new_tokens=6, use_cache=False).token_ids
    assert lm.generate([5, 6], context=cut, max_new_tokens=6).token_ids == expected
    context.save(tmp_path / "context.kv")
    restored = kvloom.attach(tiny.tiny_model("bloom")).restore(tmp_path / "context.kv")
    assert restored.cached_tokens == 45
    extended = lm.extend(context, [7, 8, 9], start=45)
    whole = model(torch.tensor([[*ids, 7, 8, 9]])).logits[0, -3:]
    torch.testing.assert_close(extended.logits, whole, atol=1e-4, rtol=1e-4)
    continuations = [[3], [4, 5, 6], [4, 5, 7, 8]]
    scores, apart = (lm.score(continuations, context=context, use_cache=use) for use in (True, False))
    for own, other in zip(scores, apart, strict=True):
        assert own.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)
    assert scores.usage.computed_prompt_tokens == 1


def test_chunks_and_forks_of_unequal_rows_share_what_they_can() -> None:
    model = tiny.tiny_model("falcon")
    lm = kvloom.attach(model, block_tokens=8)
    lm.engine.step_tokens = 11
    report = lm.verify(max_new_tokens=6)
    assert report.ok and report.binding == "transformers cache interface"
    outs = lm.generate(prompts_of(model, 40, 3), max_new_tokens=5)
    expected = [lm.generate(own, max_new_tokens=5, use_cache=False) for own in prompts_of(model, 40, 3)]
    assert [own.token_ids for own in outs] == [own.token_ids for own in expected]


def passes_of(model: PreTrainedModel, lm: kvloom.LanguageModel, prompts: list[list[int]], new: int) -> int:
    """Calls of the model while a batch is decoded."""
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    lm.generate(prompts, max_new_tokens=new, eos_token_id=None)
    handle.remove()
    return len(calls)


def test_rows_of_unlike_lengths_decode_in_one_pass(model: PreTrainedModel) -> None:
    lm = kvloom.attach(model)
    prompts = prompts_of(model, 3, 20, 21, 37)
    prefill = passes_of(model, lm, prompts, 1)
    assert passes_of(model, lm, prompts_of(model, 4, 22, 23, 38), 8) == prefill + 7


def test_padding_must_prove_itself() -> None:
    assert selfcheck.prove(PaddingCacheBinding(tiny.tiny_model("t5"))) < 1e-4
    # Its decoder counts positions from the length of its cache, padding and all.
    with pytest.raises(AttachMismatch):
        selfcheck.prove(PaddingCacheBinding(tiny.tiny_model("bart")))


@given(
    rows=st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 5]), st.integers(0, 40)), min_size=1, max_size=12),
    padding_tokens=st.integers(0, 60),
)
def test_only_single_tokens_are_padded_and_no_batch_more_than_it_may(
    rows: list[tuple[int, int]], padding_tokens: int
) -> None:
    sources = [Reads(np.empty((0, 4), np.int32), 0, past, count) for count, past in rows]
    together = _together(sources, padding_tokens)
    assert sorted(index for members in together for index in members) == list(range(len(rows)))
    for members in together:
        counts, pasts = ({rows[index][which] for index in members} for which in (0, 1))
        assert len(counts) == 1 and members == sorted(members)
        padding = sum(max(pasts) - rows[index][1] for index in members)
        assert padding <= padding_tokens if counts == {1} else padding == 0
    if padding_tokens == 0:
        assert len(together) == len(set(rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_models_of_every_dtype_attach(dtype: torch.dtype) -> None:
    binding = kvloom.attach(tiny.tiny_model("bloom", dtype=dtype)).binding
    assert binding.dtype == dtype and isinstance(binding, CacheInterfaceBinding)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "phi3_longrope", "gpt2"])
def test_what_the_attention_interface_serves_the_cache_interface_would_serve_too(family: str) -> None:
    assert isinstance(kvloom.attach(tiny.tiny_model(family)).binding, AttentionInterfaceBinding)
    assert selfcheck.prove(CacheInterfaceBinding(tiny.tiny_model(family))) < 1e-4


def test_a_long_window_is_proven_on_a_twin_with_a_small_one() -> None:
    binding = CacheInterfaceBinding(tiny.tiny_model("mistral", sliding_window=100))
    assert binding.windows() == {100}
    twin = small_windows.with_small_windows(binding)
    assert isinstance(twin, CacheInterfaceBinding) and twin.windows() == {small_windows.SMALL_WINDOW}
    assert selfcheck.prove(binding) < 1e-4


def test_a_retention_policy_is_refused_where_every_token_is_handed_out() -> None:
    lm = kvloom.attach(tiny.tiny_model("bloom"))
    with pytest.raises(InvalidRequest, match="computes its attention itself, so it is handed every token"):
        lm.generate([1, 2, 3], retention=kvloom.SinkWindow())


# ---- refused -----------------------------------------------------------------------------------------------------


def test_a_recurrent_state_is_refused() -> None:
    config = MambaConfig(vocab_size=131, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnsupportedModel, match="keeps a recurrent state"):
        kvloom.attach(AutoModelForCausalLM.from_config(config).eval())


def test_a_model_that_fills_no_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model("bloom")
    own = type(model.transformer.h[0].self_attention).forward

    def keeps_nothing(self, *arguments: object, **named: object) -> object:
        return own(self, *arguments, **{**named, "layer_past": None})

    monkeypatch.setattr(type(model.transformer.h[0].self_attention), "forward", keeps_nothing)
    with pytest.raises(UnsupportedModel, match="BloomForCausalLM puts no keys and values into transformers' cache"):
        kvloom.attach(model)


def test_rows_that_are_handed_the_wrong_past_are_refused_by_the_first_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = step_cache._SelfLayer.update

    def rolled(self: step_cache._SelfLayer, *states: Tensor, **named: object) -> tuple[Tensor, Tensor]:
        keys, values = gather(self, *states, **named)
        return keys, values.roll(1, 0) if self._layer == 1 else values

    monkeypatch.setattr(step_cache._SelfLayer, "update", rolled)
    with pytest.raises(AttachMismatch, match=r"first in `transformer\.h\.1\.self_attention`"):
        kvloom.attach(tiny.tiny_model("bloom"))


def test_a_model_that_neither_binding_serves_is_refused_by_the_layer_that_differs() -> None:
    model = tiny.tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(
        lambda _module, _inputs, output: output * 2 if output.shape[1] < 8 else output
    )
    with pytest.raises(AttachMismatch, match=r"first in the input of `model\.layers\.2\.self_attn`"):
        kvloom.attach(model)


# ---- the owner's own calls ---------------------------------------------------------------------------------------


@torch.no_grad()
def own_calls(model: PreTrainedModel) -> Iterator[Tensor]:
    batch = torch.tensor(prompts_of(model, 12, 12))
    padding = torch.ones_like(batch)
    padding[0, :5] = 0
    yield model(batch).logits
    yield model(batch, attention_mask=padding).logits
    yield model.generate(batch, do_sample=False, max_new_tokens=5, pad_token_id=0, attention_mask=padding)


def test_the_owners_calls_give_the_same_bits_with_and_without_attaching(model: PreTrainedModel) -> None:
    before = list(own_calls(model))
    layers = DynamicLayer.update
    lm = kvloom.attach(model)
    lm.generate(prompts_of(model, 9)[0], max_new_tokens=3)
    assert all(torch.equal(own, again) for own, again in zip(before, own_calls(model), strict=True))
    assert DynamicLayer.update is layers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
