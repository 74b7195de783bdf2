"""Options: names, defaults and precedence of transformers; nothing unknown, nothing silently ignored."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from kvloom.decoding import Options, resolve
from kvloom.decoding.logits import make_processors
from kvloom.decoding.options import ALREADY_SO, CHECKS, REFUSED
from kvloom.errors import InvalidRequest, PromptTooLong, UnknownOption, UnsupportedOption


def resolved(own: dict[str, Any] | None = None, passed: dict[str, Any] | None = None, **options: Any) -> Options:
    model_config = GenerationConfig(**own) if own is not None else None
    generation_config = GenerationConfig(**passed) if passed is not None else None
    return resolve(model_config, generation_config, options, vocab_size=100)


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = resolved(), GenerationConfig._get_default_generation_params()
    for name in theirs.keys() & CHECKS.keys() - {"max_length"}:
        assert getattr(ours, name) == theirs[name], name
    assert ours.lengths(7).maximum == 7 + theirs["max_length"]


def test_every_option_of_transformers_is_either_supported_or_refused_by_name() -> None:
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert names <= CHECKS.keys() | REFUSED.keys() | set(ALREADY_SO)


def test_arguments_win_over_the_passed_config_which_wins_over_the_models() -> None:
    own = {"top_k": 1, "temperature": 2.0, "top_p": 0.5, "do_sample": True}
    options = resolved(own, {"top_k": 2, "temperature": 3.0}, top_k=3)
    assert (options.top_k, options.temperature, options.top_p, options.do_sample) == (3, 3.0, 0.5, True)


def test_an_explicit_none_switches_an_option_off() -> None:
    own = {"eos_token_id": 3, "top_k": 20, "do_sample": True, "max_new_tokens": 9}
    options = resolved(own, eos_token_id=None, top_k=None, max_new_tokens=None)
    assert (options.eos_token_id, options.top_k, options.max_new_tokens) == ((), 0, None)
    assert resolved(own).eos_token_id == (3,)


def test_several_eos_ids_and_pad_come_from_the_models_config() -> None:
    options = resolved({"eos_token_id": [5, 6], "pad_token_id": 7})
    assert (options.eos_token_id, options.pad_token_id) == ((5, 6), 7)


def test_max_new_tokens_wins_over_max_length() -> None:
    assert resolved(max_length=50).lengths(10).maximum == 50
    assert resolved({"max_length": 50}, max_new_tokens=5).lengths(10).maximum == 15
    assert resolved({"max_new_tokens": 5}, max_length=50).lengths(10).maximum == 15


def test_the_default_of_twenty_new_tokens_stops_at_the_models_context() -> None:
    options = resolve(None, None, {}, max_position_embeddings=32)
    assert [options.lengths(prompt).new_tokens for prompt in (4, 12, 31)] == [20, 20, 1]
    with pytest.raises(PromptTooLong, match=r"32 tokens .* context of 32"):
        options.lengths(32)


def test_a_max_length_that_the_prompt_uses_up_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"`max_length` of 10 .* has 10.*max_new_tokens"):
        resolved(max_length=10).lengths(10)


def test_min_new_tokens_wins_over_min_length() -> None:
    assert resolved(min_length=12).lengths(10).minimum == 12
    assert resolved(min_length=12, min_new_tokens=4).lengths(10).minimum == 14


def test_a_minimum_beyond_the_maximum_warns() -> None:
    with pytest.warns(UserWarning, match="minimum length of 40"):
        resolved(min_length=40, max_new_tokens=5).lengths(10)


@pytest.mark.parametrize("config", [False, True], ids=["argument", "generation_config"])
def test_an_unknown_name_is_an_error_with_a_suggestion(config: bool) -> None:
    with pytest.raises(UnknownOption, match=r"`max_new_token`. Did you mean `max_new_tokens`"):
        resolved(None, {"max_new_token": 5}) if config else resolved(max_new_token=5)


def test_names_that_the_caller_handles_are_suggested_and_skipped() -> None:
    with pytest.raises(UnknownOption, match="Did you mean `context`"):
        resolve(None, None, {"contex": 1}, known=["context"])
    assert resolve(None, None, {"context": 1, "prefill_chunk_size": 8}, known=["context", "prefill_chunk_size"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beam_groups", 2),
        ("diversity_penalty", 0.5),
        ("constraints", [object()]),
        ("force_words_ids", [[1]]),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("guidance_scale", 1.5),
        ("watermarking_config", {"bias": 2.0}),
        ("token_healing", True),
        ("prompt_lookup_num_tokens", 3),
        ("assistant_model", object()),
        ("num_assistant_tokens", 5),
        ("cache_implementation", "static"),
        ("prefix_allowed_tokens_fn", print),
        ("streamer", object()),
    ],
)
def test_an_unsupported_option_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UnsupportedOption, match=f"`{name}` is not supported: "):
        resolved(**{name: value})


def test_an_unsupported_option_in_the_passed_config_is_refused_too() -> None:
    with pytest.raises(UnsupportedOption, match="`guidance_scale`"):
        resolved(None, {"guidance_scale": 1.5})


def test_unsupported_options_at_their_neutral_value_are_accepted() -> None:
    resolved(num_beam_groups=1, guidance_scale=None, num_assistant_tokens=20, use_mtp=False, low_memory=False)
    resolved(None, {"diversity_penalty": 0.0, "return_dict_in_generate": True})


def test_the_models_own_config_may_hold_what_cannot_change_the_tokens() -> None:
    own = {"cache_implementation": "hybrid", "num_assistant_tokens": 5, "chat_format": "chatml"}
    assert resolved(own) == resolved()
    with pytest.raises(UnsupportedOption, match="The model's generation config sets it"):
        resolved({"guidance_scale": 3.0})
    assert resolved({"guidance_scale": 3.0}, guidance_scale=None) == resolved()


def test_an_edited_copy_of_the_models_config_is_held_to_its_changes_alone() -> None:
    own = GenerationConfig(cache_implementation="hybrid", chat_format="chatml", eos_token_id=2)
    edited = copy.deepcopy(own)
    edited.num_beams = 4
    assert resolve(own, edited, {}).num_beams == 4
    edited.cache_implementation = "static"
    with pytest.raises(UnsupportedOption, match="cache_implementation"):
        resolve(own, edited, {})


WRONG: list[dict[str, Any]] = [
    {"temperature": -1.0, "do_sample": True},
    {"temperature": 0, "do_sample": True},
    {"temperature": 0.0},
    {"temperature": "hot"},
    {"temperature": float("nan")},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_k": -1},
    {"top_k": 2.5},
    {"top_k": True},
    {"min_p": 1.5},
    {"typical_p": 0.0},
    {"epsilon_cutoff": 1.0},
    {"repetition_penalty": 0.0},
    {"num_beams": 0},
    {"max_new_tokens": 0},
    {"max_new_tokens": "10"},
    {"min_new_tokens": 1.5},
    {"early_stopping": "sometimes"},
    {"early_stopping": 1},
    {"length_penalty": float("inf")},
    {"do_sample": 1},
    {"eos_token_id": 100},
    {"eos_token_id": [3, -1]},
    {"eos_token_id": "</s>"},
    {"pad_token_id": 100},
    {"pad_token_id": -2},
    {"eos_token_id": -2},
    {"pad_token_id": True},
    {"bad_words_ids": [[1], []]},
    {"bad_words_ids": [[100]]},
    {"sequence_bias": {(100,): 1.0}},
    {"suppress_tokens": [100]},
    {"stop_strings": [""]},
    {"stop_strings": 3},
    {"seed": -1},
    {"top_logprobs": -1},
    {"exponential_decay_length_penalty": (2, 1.1)},
    {"forced_eos_token_id": 4, "suppress_tokens": [4]},
    {"num_return_sequences": 2},
    {"num_return_sequences": 3, "num_beams": 2},
]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_a_wrong_value_is_refused_in_one_sentence_that_names_it(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolved(**options)
    assert any(f"`{name}" in str(caught.value) for name in options)


def test_values_below_those_that_do_something_switch_an_option_off_as_in_transformers() -> None:
    off = {"min_length": -1, "min_new_tokens": -1, "no_repeat_ngram_size": -1, "encoder_no_repeat_ngram_size": -1}
    cutoffs = {"epsilon_cutoff": -1.0, "eta_cutoff": -1.0}
    options = resolved(**off, **cutoffs, eos_token_id=-1, pad_token_id=-1, do_sample=True)
    assert [getattr(options, name) for name in off] == [0] * 4
    assert (options.eos_token_id, options.pad_token_id) == ((), None)
    assert options.lengths(3).minimum <= 3
    assert not make_processors(replace(options, top_k=0), prompt_ids=[1, 2, 3], device=torch.device("cpu"))


def test_temperature_zero_says_how_to_decode_greedily() -> None:
    with pytest.raises(InvalidRequest, match=r"above 0, but is 0.*do_sample=False"):
        resolved(temperature=0, do_sample=True)


def test_sampling_options_without_sampling_warn_and_decode_greedily() -> None:
    with pytest.warns(UserWarning, match="`temperature=0.7` has no effect: it needs do_sample=True"):
        assert not resolved(temperature=0.7).do_sample
    with pytest.warns(UserWarning, match="`length_penalty=2.0` has no effect"):
        resolved(length_penalty=2.0)


def test_sampling_options_of_the_models_config_do_not_disturb_greedy_decoding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = resolve(GenerationConfig(temperature=0.6, top_p=0.9, do_sample=True), None, {"do_sample": False})
    assert not options.do_sample


def test_odd_values_of_the_models_config_that_have_no_effect_are_passed_over() -> None:
    own = GenerationConfig(do_sample=False)
    own.temperature, own.pad_token_id = 0.0, -1
    assert resolve(own, None, {}) == resolve(GenerationConfig(do_sample=False), None, {})
    with pytest.raises(InvalidRequest, match="temperature"):
        resolve(own, None, {"do_sample": True})


def test_a_generation_config_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"must be a transformers.GenerationConfig"):
        resolve(None, {"top_k": 3}, {})  # type: ignore[arg-type]


def test_integers_are_taken_for_numbers() -> None:
    assert isinstance(resolved(temperature=2, do_sample=True).temperature, float)
