"""Attention weights and hidden states with the cache on: those of the own uncached forward, and of transformers."""

from __future__ import annotations

import pickle
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from x_transformers import Decoder, TransformerWrapper

import families
import kvloom
import tiny
from kvloom import Generation, InvalidRequest, LanguageModel
from kvloom.errors import UnsupportedOption
from tiny import left_padded, random_ids, tiny_model
from tiny_vision import QWEN, Picture, prompt, tiny_vision_model

TOLERANCE = 1e-4
PAD = 0
NEW_TOKENS = 5
LOOK = {"output_attentions": True, "output_hidden_states": True}
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, **LOOK}
AS_DICT = {"return_dict_in_generate": True, **LOOK}
FAMILIES = ("llama", "gemma2", "gpt_oss", "gpt2", "bloom", "falcon")
"""Whole native, soft-capped, with sinks and windows, learned positions, and two on the cache interface."""


@cache
def model_named(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    model.generation_config.pad_token_id = PAD
    return model


@cache
def attached(family: str) -> LanguageModel:
    return kvloom.attach(model_named(family), budget_bytes=1 << 22)


@torch.no_grad()
def own_inside(model: PreTrainedModel, ids: list[int], **inputs: Any) -> dict[str, tuple[Tensor, ...]]:
    """Of the model's own forward over a whole sequence: each layer's weights [heads, n, n] and states [n, hidden]."""
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    output = model(**{name: torch.tensor([ids])}, **inputs, use_cache=False, **LOOK)
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    shown = {"attentions": output[f"{prefix}attentions"], "hidden_states": output[f"{prefix}hidden_states"]}
    if model.config.is_encoder_decoder:
        shown["cross_attentions"] = output.cross_attentions
    return {key: tuple(layer[0] for layer in layers) for key, layers in shown.items()}


def assert_shows(found: Any, step: int | None, own: dict[str, tuple[Tensor, ...]], rows: slice) -> None:
    """What a result shows (of one of its steps) is some rows of the own forward, with as many columns as these see."""
    for name, expected in own.items():
        layers = getattr(found, name) if step is None else getattr(found, name)[step]
        assert len(layers) == len(expected), name
        for layer, (got, whole) in enumerate(zip(layers, expected, strict=True)):
            columns = slice(rows.stop) if name == "attentions" else slice(None)
            want = whole[..., rows, columns]
            assert got.shape == want.shape, (name, layer)
            torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE, msg=f"{name} of layer {layer}")


def assert_generation_shows(out: Generation, model: PreTrainedModel, prompt: list[int], first: int = 0) -> None:
    own = own_inside(model, prompt + out.token_ids)
    assert len(out.attentions or ()) == len(out.hidden_states or ()) == len(out.token_ids)
    for step in range(len(out.token_ids)):
        end = len(prompt) + step
        assert_shows(out, step, own, slice(end - 1 if step else first, end))


# ---- results of a LanguageModel --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_each_token_of_a_ragged_batch_shows_what_the_own_forward_shows(family: str) -> None:
    model, lm = model_named(family), attached(family)
    prompts = [random_ids(model, tokens=n, seed=n) for n in (21, 3, 12)]
    for ids, out in zip(prompts, lm.generate(prompts, **GREEDY), strict=True):
        assert_generation_shows(out, model, ids)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_a_beam_shows_its_own_path_through_all_forks(family: str) -> None:
    model, lm = model_named(family), attached(family)
    ids = random_ids(model, tokens=19, seed=7)
    beams = lm.beam_search(ids, num_beams=4, num_return_sequences=4, **GREEDY)
    assert len({tuple(beam.token_ids) for beam in beams}) == 4
    for beam in beams:
        assert_generation_shows(beam, model, ids)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_without_a_cache_the_same_is_shown_in_the_same_shape(family: str) -> None:
    model, lm = model_named(family), attached(family)
    ids = random_ids(model, tokens=11, seed=3)
    cached, uncached = (lm.generate(ids, use_cache=use, **GREEDY) for use in (True, False))
    for name in ("attentions", "hidden_states"):
        for ours, own in zip(getattr(cached, name), getattr(uncached, name), strict=True):
            torch.testing.assert_close(ours, own, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_prompt_in_chunks_and_one_that_the_cache_knows_show_all_their_rows() -> None:
    model = model_named("mistral")
    lm = kvloom.attach(model, budget_bytes=1 << 22, block_tokens=4)
    lm.engine.step_tokens = 7
    ids = random_ids(model, tokens=30, seed=4)
    for _ in range(2):
        assert_generation_shows(lm.generate(ids, **GREEDY), model, ids)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_behind_a_context_the_new_rows_are_shown(family: str) -> None:
    model, lm = model_named(family), attached(family)
    begun, more = (random_ids(model, tokens=n, seed=n) for n in (9, 6))
    with lm.prefill(begun) as context:
        assert_generation_shows(lm.generate(more, context=context, **GREEDY), model, begun + more, first=9)
        # The last token runs in any case, since its logits choose the first new one.
        assert_generation_shows(lm.generate(context=context, **GREEDY), model, begun, first=8)
        step = lm.extend(context, more, **LOOK)
    own = own_inside(model, begun + more)
    assert_shows(step, None, own, slice(9, 15))
    assert_shows(lm.extend(None, begun, **LOOK), None, own_inside(model, begun), slice(0, 9))
    assert lm.extend(None, begun).attentions is None


def test_samples_show_the_prompt_and_then_each_its_own_way() -> None:
    model, lm = model_named("llama"), attached("llama")
    ids = random_ids(model, tokens=8, seed=5)
    for sample in lm.generate(ids, **GREEDY | {"do_sample": True, "num_return_sequences": 3, "seed": 1}):
        assert_generation_shows(sample, model, ids)


def test_one_of_the_two_can_be_asked_for_alone_and_only_by_those_who_ask() -> None:
    lm = attached("llama")
    plain, weights, states = (
        {"max_new_tokens": 3, "eos_token_id": None} | own for own in ({}, {"output_attentions": True}, LOOK)
    )
    del states["output_attentions"]
    requests = [lm.calls.requests([1, 2, 3], _asked(own))[0][0] for own in (plain, weights, states)]
    lm.calls.submit(requests)
    lm.engine.run(requests)
    found = [lm.calls.results(own)[0] for own in requests]
    assert [own.attentions is None for own in found] == [True, False, True]
    assert [own.hidden_states is None for own in found] == [True, True, False]


def _asked(options: dict[str, Any]) -> Any:
    from kvloom.language_model.calls import Asked

    return Asked(None, None, None, None, options)


# ---- looking changes nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_looking_changes_no_bit_of_logits_or_cache(family: str) -> None:
    lm = kvloom.attach(tiny_model(family), budget_bytes=1 << 22)
    ids = random_ids(lm.binding.model, tokens=40, seed=6)
    options: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None, "output_logits": True}
    looked = lm.generate(ids, **options, **LOOK)
    behind = lm.generate(ids, **options)
    assert behind.usage.cached_prompt_tokens > 0, "what was looked at is found again"
    fresh = kvloom.attach(tiny_model(family), budget_bytes=1 << 22).generate(ids, **options)
    assert torch.equal(looked.logits, fresh.logits)
    assert torch.equal(behind.logits, fresh.logits) or not lm.binding.bit_identical


def test_the_model_is_left_without_a_trace_and_stays_native() -> None:
    model = tiny_model("llama")
    lm = kvloom.attach(model, budget_bytes=1 << 22)
    before, native = model(torch.tensor([[1, 2, 3]])).logits, lm.binding.bit_identical
    lm.generate([1, 2, 3], **GREEDY)
    assert not any(module._forward_hooks for module in model.modules())
    assert pickle.dumps(model), "transformers' capturing hooks cannot be pickled"
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before)
    assert lm.binding.bit_identical == native
    # The owner's own call installs such hooks for good.
    model(torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert lm.generate([1, 2, 3], **GREEDY).attentions is not None
    assert any(module._forward_hooks for module in model.modules())
    assert lm.binding.bit_identical == native


# ---- other caches, other models ----------------------------------------------------------------------------------


def test_an_int8_cache_shows_weights_near_the_own_ones_that_sum_to_one() -> None:
    model = model_named("llama")
    lm = kvloom.attach(model, budget_bytes=1 << 22, codec="int8", block_tokens=4)
    ids = random_ids(model, tokens=23, seed=2)
    out = lm.generate(ids, **GREEDY)
    own = own_inside(model, ids + out.token_ids)["attentions"]
    for got, want in zip(out.attentions[-1], own, strict=True):
        torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]))
        torch.testing.assert_close(got, want[:, -2:-1, :-1], atol=0.15, rtol=0.1)


def test_16_bit_models_show_in_their_own_dtype() -> None:
    lm = kvloom.attach(tiny_model("llama", dtype=torch.bfloat16), budget_bytes=1 << 22)
    out = lm.generate([5, 6, 7], **GREEDY)
    assert {own.dtype for own in (*out.attentions[1], *out.hidden_states[1])} == {torch.bfloat16}


@pytest.mark.parametrize("family", tiny.ENCODER_DECODER_FAMILIES)
def test_a_decoder_shows_its_source_too(family: str) -> None:
    model = tiny_model(family)
    lm = kvloom.attach(model, budget_bytes=1 << 22)
    sources = [tiny.random_source(model, tokens=n, seed=n) for n in (7, 4)]
    beams = {"num_beams": 2, "num_return_sequences": 2}
    results = [*([own] for own in lm.generate(sources, **GREEDY)), *lm.beam_search(sources, **beams, **GREEDY)]
    for source, hypotheses in zip([*sources, *sources], results, strict=True):
        read = torch.tensor([source]) if isinstance(source, list) else source[None]
        for out in hypotheses:
            own = own_inside(model, [2, *out.token_ids], **{model.main_input_name: read})
            for step in range(len(out.token_ids)):
                assert_shows(out, step, own, slice(step, step + 1))
    uncached = lm.generate(sources[0], use_cache=False, **GREEDY)
    torch.testing.assert_close(uncached.cross_attentions[-1], results[0][0].cross_attentions[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", QWEN)
def test_the_placeholders_of_an_image_show_what_they_are_to_the_model(family: str) -> None:
    model = tiny_vision_model(family)
    lm = kvloom.attach(model, budget_bytes=1 << 22, block_tokens=4)
    inputs = prompt(model, 5, Picture(4, 6), 7)
    token_ids = inputs["input_ids"][0].tolist()
    cached, uncached = (lm.generate(inputs, use_cache=use, **GREEDY | {"max_new_tokens": 2}) for use in (True, False))
    model.model.rope_deltas = None
    shown = {name: own for name, own in inputs.items() if name not in ("input_ids", "attention_mask")}
    own = own_inside(model, token_ids, **shown)
    assert_shows(cached, 0, own, slice(0, len(token_ids)))
    for ours, theirs in zip(cached.attentions[1], uncached.attentions[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_what_does_not_show_itself_is_refused_by_name() -> None:
    function = kvloom.attach(lambda ids: torch.zeros(*ids.shape, 7), vocab_size=7)
    wrapper = TransformerWrapper(num_tokens=11, max_seq_len=32, attn_layers=Decoder(dim=16, depth=1, heads=2)).eval()
    for lm in (function, kvloom.attach(wrapper)):
        for name in LOOK:
            with pytest.raises(UnsupportedOption, match=f"`{name}` is not supported: only the logits of a callable"):
                lm.generate([1, 2], **{name: True})
            with pytest.raises(UnsupportedOption, match=f"`{name}` is not supported"):
                lm.extend(None, [1, 2], **{name: True})
    llama = attached("llama")
    with pytest.raises(InvalidRequest, match="`output_attentions` cannot be shown under SinkWindow"):
        llama.generate([1, 2], retention=kvloom.SinkWindow(), output_attentions=True)
    assert llama.generate([1, 2], retention=kvloom.SinkWindow(), output_hidden_states=True).hidden_states
    with pytest.raises(InvalidRequest, match="`output_hidden_states` must be True or False"):
        llama.extend(None, [1, 2], output_hidden_states=[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "option", "reason"),
    [
        ("granite_swa", "output_attentions", "are not those that it calculates with"),  # they leave out the sinks
        ("gemma3n_text", "output_hidden_states", "are not rows of tokens"),  # it has several streams of them
    ],
)
def test_what_a_model_shows_otherwise_is_refused_by_name(family: str, option: str, reason: str) -> None:
    model = families.build(next(own for own in families.all_families() if own.name == family))
    lm = kvloom.attach(model, budget_bytes=1 << 22)
    with pytest.raises(UnsupportedOption, match=f"`{option}` is not supported: .*{reason}"):
        lm.generate([1, 2, 3], **{option: True})
    assert lm.generate([1, 2, 3], max_new_tokens=1, **dict.fromkeys(LOOK.keys() - {option}, True))


# ---- the drop-in -------------------------------------------------------------------------------------------------


def assert_shown_as_by_transformers(theirs: Any, ours: Any, pads: list[int], live: list[list[bool]]) -> None:
    """The same structure and values; zeros for padding, and where a row is not live. `live`: [steps][rows]."""
    assert type(ours) is type(theirs)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for name in ("attentions", "hidden_states"):
        steps = list(zip(getattr(theirs, name), getattr(ours, name), strict=True))
        assert len(steps) == len(live)
        for step, (their_layers, our_layers) in enumerate(steps):
            for their, our in zip(their_layers, our_layers, strict=True):
                assert (our.shape, our.dtype) == (their.shape, their.dtype), (name, step)
                for row, pad in enumerate(pads):
                    real = slice(pad, None) if our.shape[-2] > 1 else slice(None)
                    want, got = their[row][..., real, :], our[row][..., real, :]
                    if live[step][row]:
                        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)
                    else:
                        assert not got.any()
                    assert not our[row][..., : real.start or 0, :].any()


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2", "bloom"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}], ids=str)
def test_a_padded_batch_shows_what_transformers_shows(family: str, options: dict[str, Any]) -> None:
    model = model_named(family)
    inputs = left_padded(model, 12, 5)
    call = {**inputs, "max_new_tokens": NEW_TOKENS, **AS_DICT, **options}
    theirs, ours = model.generate(**call), kvloom.generate(attached(family), **call)
    beams = options.get("num_beams", 1)
    assert_shown_as_by_transformers(theirs, ours, [0] * beams + [7] * beams, [[True] * 2 * beams] * NEW_TOKENS)


def test_rows_that_have_ended_are_zeros() -> None:
    model = model_named("llama")
    inputs = left_padded(model, 9, 5)
    free = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[:, 9:].tolist()
    length = next(n for n in range(1, NEW_TOKENS) if free[0][n - 1] not in (*free[0][: n - 1], *free[1]))
    call = {**inputs, "max_new_tokens": NEW_TOKENS, "eos_token_id": free[0][length - 1], **AS_DICT}
    theirs, ours = model.generate(**call), kvloom.generate(attached("llama"), **call)
    assert_shown_as_by_transformers(theirs, ours, [0, 4], [[step < length, True] for step in range(NEW_TOKENS)])


def test_beams_of_a_search_that_has_ended_before_the_others_are_zeros() -> None:
    model = model_named("llama")
    inputs = left_padded(model, 9, 5, 7)
    sequences = model.generate(**inputs, max_new_tokens=8, num_beams=4, num_return_sequences=4)
    ends = sequences[:, 9:].flatten().bincount().topk(8).indices.tolist()
    call = {"max_new_tokens": 8, "num_beams": 2, "early_stopping": True, "eos_token_id": ends, **AS_DICT}
    theirs, ours = model.generate(**inputs, **call), kvloom.generate(attached("llama"), **inputs, **call)
    prompts = [row[pad:][None] for row, pad in zip(inputs["input_ids"], (0, 4, 2), strict=True)]
    ran = [len(model.generate(prompt, **call).hidden_states) for prompt in prompts]
    assert len(set(ran)) > 1, "some searches should end before others"
    live = [[step < own for own in ran for _ in range(2)] for step in range(max(ran))]
    assert_shown_as_by_transformers(theirs, ours, [0, 0, 4, 4, 2, 2], live)


def test_a_call_that_continues_a_cache_shows_the_new_rows() -> None:
    model = model_named("llama")
    ids = torch.tensor([random_ids(model, tokens=9, seed=9)])
    shown = []
    for generate in (model.generate, lambda *own, **named: kvloom.generate(attached("llama"), *own, **named)):
        past = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :6], past_key_values=past)
        shown.append(generate(ids, past_key_values=past, max_new_tokens=3, **AS_DICT))
    assert_shown_as_by_transformers(*shown, [0], [[True]] * 3)
    assert shown[1].attentions[0][0].shape[-2:] == (3, 9)


def test_without_a_dict_nothing_is_shown() -> None:
    model = model_named("llama")
    assert isinstance(kvloom.generate(attached("llama"), **left_padded(model, 4), max_new_tokens=2, **LOOK), Tensor)
