"""Whole generations through the engine, against transformers and against the model's own uncached forward.

Random weights tie now and then, so tokens are compared where the margin between the two best candidates is
above the tolerance: `assert_same_tokens` asks the uncached model for it at the first divergence.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import PreTrainedModel

import kvloom
import tiny
from kvloom import Generation, Hypotheses, LanguageModel

TOLERANCE = 1e-4
PENALTIES = (-1.0, 0.0, 0.5, 1.0, 1.2, 2.0)
STOPPING = (False, True, "never")


def attach(model: PreTrainedModel, **options: object) -> LanguageModel:
    return kvloom.attach(model, **options)


def alone(model: PreTrainedModel, prompt: list[int], **options: object):
    """transformers on a single unpadded prompt, with the details."""
    return model.generate(
        torch.tensor([prompt]), do_sample=False, return_dict_in_generate=True, output_scores=True, **options
    )


def assert_same_tokens(lm: LanguageModel, prompt: list[int], got: list[int], expected: list[int]) -> None:
    """Equal, or first unequal where the model itself is undecided."""
    if got == expected:
        return
    same = next((i for i, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), None)
    assert same is not None, f"one is a beginning of the other: {got} and {expected}"
    logits = lm.binding.forward_uncached(torch.tensor([prompt + got[:same]]))[0, -1].float()
    best = logits.topk(2).values
    assert best[0] - best[1] < TOLERANCE, f"token {same}: {got[same]} instead of {expected[same]}"


def random_prompts(model: PreTrainedModel, *lengths: int) -> list[list[int]]:
    return [tiny.random_ids(model, tokens=n, seed=n) for n in lengths]


@pytest.mark.parametrize("family", tiny.SUPPORTED_FAMILIES)
def test_cached_decoding_equals_uncached_decoding(family: str) -> None:
    model = tiny.tiny_model(family)
    lm = attach(model)
    prompts = random_prompts(model, 5, 38, 17)
    options = {"max_new_tokens": 16, "output_logits": True}
    for cached, prompt in zip(lm.generate(prompts, **options), prompts, strict=True):
        uncached = lm.generate(prompt, use_cache=False, **options)
        assert_same_tokens(lm, prompt, cached.token_ids, uncached.token_ids)
        if cached.token_ids == uncached.token_ids:
            assert (cached.logits - uncached.logits).abs().max() < TOLERANCE * max(1, uncached.logits.abs().max())


@pytest.mark.parametrize("family", [f for f in tiny.SUPPORTED_FAMILIES if "dynamic" not in f])
def test_greedy_tokens_are_those_of_transformers_in_a_ragged_batch(family: str) -> None:
    # Dynamic factors are left out: with its cache transformers keeps keys that older factors have rotated.
    model = tiny.tiny_model(family)
    lm = attach(model)
    prompts = random_prompts(model, 3, 20, 33)
    for out, prompt in zip(lm.generate(prompts, max_new_tokens=6), prompts, strict=True):
        expected = alone(model, prompt, max_new_tokens=6).sequences[0, len(prompt) :].tolist()
        assert_same_tokens(lm, prompt, out.token_ids, expected)


@pytest.mark.parametrize("family", tiny.SUPPORTED_FAMILIES)
def test_beam_search_returns_the_hypotheses_of_the_uncached_model(family: str) -> None:
    model = tiny.tiny_model(family)
    lm = attach(model)
    prompt = random_prompts(model, 21)[0]
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 24}
    cached, uncached = lm.beam_search(prompt, **options), lm.beam_search(prompt, use_cache=False, **options)
    torch.testing.assert_close(scores(cached), scores(uncached), atol=TOLERANCE, rtol=TOLERANCE)
    assert [h.token_ids for h in cached] == [h.token_ids for h in uncached]


def scores(hypotheses: list[Generation]) -> torch.Tensor:
    return torch.tensor([h.score for h in hypotheses])


def early_ids(lm: LanguageModel, prompt: list[int]) -> list[int]:
    """Tokens that hypotheses choose early on: as EOS ids they end some of them."""
    seen = [
        token
        for h in lm.beam_search(prompt, num_beams=4, num_return_sequences=4, max_new_tokens=9)
        for token in h.token_ids[2:]
    ]
    return list(dict.fromkeys(seen))[:2]


def compare_with_transformers(lm: LanguageModel, model: PreTrainedModel, prompts: list[list[int]], **options) -> None:
    """Sequences and scores of a ragged batch, each prompt against transformers alone."""
    results = lm.beam_search(prompts, **options)
    for hypotheses, prompt in zip(results, prompts, strict=True):
        expected = alone(model, prompt, **options)
        assert isinstance(hypotheses, Hypotheses)
        if expected.get("sequences_scores") is not None:
            torch.testing.assert_close(scores(hypotheses), expected.sequences_scores, atol=1e-4, rtol=1e-4)
        assert hypotheses.sequences.tolist() == expected.sequences.tolist(), (prompt, options)


def grid() -> list[tuple[int, float, object]]:
    """Every combination that means something: one beam has neither penalty nor early stopping."""
    return [(1, 1.0, False), *product((2, 3, 4, 8), PENALTIES, STOPPING)]


@pytest.fixture(scope="module")
def stories(stories260k) -> tuple[LanguageModel, PreTrainedModel]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories260k).eval()
    return kvloom.attach(model, AutoTokenizer.from_pretrained(stories260k)), model


def check_grid(lm: LanguageModel, model: PreTrainedModel, prompts: list[list[int]], cells: list) -> None:
    ends = early_ids(lm, prompts[0])
    never = [next(token for token in range(lm.vocab_size) if token not in ends)]
    for cell, (beams, penalty, early) in enumerate(cells):
        eos = (None, ends[:1], ends, never)[cell % 4]
        options = {} if beams == 1 else {"length_penalty": penalty, "early_stopping": early}
        compare_with_transformers(
            lm,
            model,
            prompts,
            num_beams=beams,
            num_return_sequences=(1, beams)[cell // 4 % 2] if beams > 1 else 1,
            max_new_tokens=12,
            eos_token_id=eos,
            pad_token_id=None if eos is None else (0, 5)[cell % 2],
            **options,
        )


def test_beam_search_on_a_real_model_is_that_of_transformers(stories) -> None:
    lm, model = stories
    prompts = [lm.tokenizer(text).input_ids for text in ("Once upon a time", "The big dog", "Lily and Tom saw a")]
    check_grid(lm, model, prompts, grid()[::7])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral"])
def test_beam_search_on_random_models_is_that_of_transformers(family: str) -> None:
    model = tiny.tiny_model(family)
    check_grid(attach(model), model, random_prompts(model, 4, 19), grid()[3::9])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["stories", "llama", "qwen2", "gpt2", "mistral"])
def test_beam_search_is_that_of_transformers_over_the_whole_grid(family: str, request) -> None:
    if family == "stories":
        lm, model = request.getfixturevalue("stories")
        prompts = [lm.tokenizer(text).input_ids for text in ("Once upon a time", "The big dog")]
    else:
        model = tiny.tiny_model(family)
        lm, prompts = attach(model), random_prompts(model, 4, 19)
    cells = grid()
    for shift in range(4):
        check_grid(lm, model, prompts, cells[shift:] + cells[:shift])


def test_greedy_ids_on_a_real_model_are_the_golden_ones(stories, stories260k) -> None:
    import json

    lm, _ = stories
    for golden in json.loads((stories260k / "golden_greedy.json").read_text()):
        out = lm.generate(golden["prompt_ids"], max_new_tokens=len(golden["greedy_ids"]), eos_token_id=None)
        assert out.token_ids == golden["greedy_ids"]


def test_a_model_without_tokenizer_decodes_token_ids(gpt2_capp) -> None:
    lm = kvloom.load(gpt2_capp)
    out = lm.generate([1, 2, 3], max_new_tokens=8)
    assert out.text == "" and out.token_ids == lm.generate([1, 2, 3], max_new_tokens=8, use_cache=False).token_ids


def test_the_same_seed_gives_the_same_tokens_alone_and_in_any_batch() -> None:
    model = tiny.tiny_model("qwen2")
    lm = attach(model)
    prompts = random_prompts(model, 7, 30, 15)
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 11, "max_new_tokens": 20}
    batch = lm.generate(prompts, **options)
    assert [out.token_ids for out in batch] == [lm.generate(prompt, **options).token_ids for prompt in prompts]
    assert lm.generate(prompts[0], **{**options, "seed": 12}).token_ids != batch[0].token_ids
    assert lm.generate(prompts[0], use_cache=False, **options).token_ids == batch[0].token_ids


@pytest.mark.parametrize("family", tiny.LENGTH_DEPENDENT_ROPE_FAMILIES)
def test_rotary_factors_belong_to_a_request(family: str) -> None:
    model = tiny.tiny_model(family)
    lm = attach(model)
    short, long = random_prompts(model, 10, 70)
    together = lm.generate([short, long, short], max_new_tokens=8)
    assert together[0].token_ids == together[2].token_ids
    for out, prompt in zip(together[:2], (short, long), strict=True):
        fresh = kvloom.attach(tiny.tiny_model(family))
        expected = fresh.generate(prompt, max_new_tokens=8, use_cache=False)
        assert_same_tokens(fresh, prompt, out.token_ids, expected.token_ids)


@pytest.mark.parametrize("family", tiny.LENGTH_DEPENDENT_ROPE_FAMILIES)
def test_a_request_that_outgrows_its_rotary_factors_is_computed_anew(family: str) -> None:
    model = tiny.tiny_model(family)
    lm = attach(model)
    prompt = random_prompts(model, 36)[0]
    for options in ({}, {"num_beams": 3}):
        cached = lm.generate(prompt, max_new_tokens=20, **options)
        uncached = lm.generate(prompt, max_new_tokens=20, use_cache=False, **options)
        assert_same_tokens(lm, prompt, cached.token_ids, uncached.token_ids)


def test_a_chunked_prompt_gives_what_a_whole_one_gives() -> None:
    model = tiny.tiny_model("gemma3")
    prompt = random_prompts(model, 60)[0]
    whole = attach(model).generate(prompt, max_new_tokens=10, output_logits=True)
    chunked = attach(model)
    chunked.engine.step_tokens = 7
    parts = chunked.generate(prompt, max_new_tokens=10, output_logits=True)
    assert parts.token_ids == whole.token_ids
    assert (parts.logits - whole.logits).abs().max() < TOLERANCE * whole.logits.abs().max()


def test_beams_sample_as_transformers_does_and_repeat_with_their_seed() -> None:
    lm = attach(model := tiny.tiny_model("llama"))
    prompt = random_prompts(model, 9)[0]
    options = {"num_beams": 3, "do_sample": True, "seed": 5, "max_new_tokens": 10}
    assert lm.generate(prompt, **options).token_ids == lm.generate(prompt, **options).token_ids
