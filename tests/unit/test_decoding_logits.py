"""Logits processors: the same classes with the same settings, in the same order, as transformers runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper
from transformers.generation import logits_process as hf

from kvloom.decoding import PresencePenalty, resolve
from kvloom.decoding.logits import make_processors
from kvloom.errors import InvalidRequest
from tiny import tiny_model

PROMPT = [5, 6, 7, 5]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1)


class Caught(Exception):
    """Ends `generate` before the processors have run, which would fill their caches."""


def theirs(model: PreTrainedModel, prompt: list[int], custom: list[Any], options: dict[str, Any]) -> list[Any]:
    """The processors that `generate` would really run, caught as it has built them."""
    original = model._get_logits_processor

    def catch(*args: Any, **kwargs: Any) -> None:
        raise Caught(list(original(*args, **kwargs)))

    model._get_logits_processor = catch
    try:
        model.generate(torch.tensor([prompt]), logits_processor=LogitsProcessorList(custom), **options)
    except Caught as caught:
        return caught.args[0]
    finally:
        del model._get_logits_processor
    raise AssertionError("generate did not ask for its processors")


def settings(processor: Any) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in vars(processor).items()
    }


SAMPLE = {"do_sample": True, "top_k": 0}
CONFIGS: list[dict[str, Any]] = [
    {},
    {"do_sample": True},
    {"do_sample": True, "eos_token_id": 3},
    {"do_sample": True, "eos_token_id": [3, 4, 9], "num_beams": 3, "top_p": 0.9, "min_p": 0.1},
    {"do_sample": True, "num_beams": 2, "top_p": 0.9, "typical_p": 0.8},
    SAMPLE | {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05, "top_h": 0.5, "typical_p": 0.9},
    SAMPLE | {"epsilon_cutoff": 0.01, "eta_cutoff": 0.02, "renormalize_logits": True},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "eos_token_id": 3},
    {"min_length": 6, "eos_token_id": 3},
    {"min_new_tokens": 2, "eos_token_id": [3, 4]},
    {"min_new_tokens": 2},
    {"min_length": 7, "min_new_tokens": 2, "eos_token_id": 3},
    {"bad_words_ids": [[1, 2], [4]], "eos_token_id": 4, "sequence_bias": {(8,): -2.0, (9, 1): 1.0}},
    {"forced_bos_token_id": 8, "forced_eos_token_id": [9], "eos_token_id": 9, "begin_suppress_tokens": [1]},
    {"suppress_tokens": [1, 2], "begin_suppress_tokens": [3, 4], "remove_invalid_values": True},
    {"exponential_decay_length_penalty": (3, 1.2), "eos_token_id": 3, "renormalize_logits": True},
    {"encoder_repetition_penalty": 1.2, "encoder_no_repeat_ngram_size": 2},
    {
        "sequence_bias": [[[8], -2.0]],
        "encoder_repetition_penalty": 1.2,
        "repetition_penalty": 0.8,
        "no_repeat_ngram_size": 2,
        "encoder_no_repeat_ngram_size": 3,
        "bad_words_ids": [[1]],
        "min_new_tokens": 1,
        "forced_bos_token_id": 7,
        "forced_eos_token_id": 3,
        "remove_invalid_values": True,
        "exponential_decay_length_penalty": (1, 1.1),
        "suppress_tokens": [2],
        "begin_suppress_tokens": [4],
        "do_sample": True,
        "temperature": 0.5,
        "top_h": 0.9,
        "top_k": 7,
        "top_p": 0.8,
        "min_p": 0.01,
        "typical_p": 0.7,
        "epsilon_cutoff": 0.001,
        "eta_cutoff": 0.001,
        "renormalize_logits": True,
        "num_beams": 2,
        "eos_token_id": [3, 11],
    },
]


@pytest.mark.parametrize("prompt", [PROMPT, [5]], ids=["prompt", "one token"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: next(iter(config), "nothing"))
def test_processors_are_those_of_transformers_in_its_order(
    model: PreTrainedModel, config: dict[str, Any], prompt: list[int]
) -> None:
    options = {"max_new_tokens": 5, "pad_token_id": 0} | config
    expected = theirs(model, prompt, [], options)
    ours = make_processors(resolve(None, None, options), prompt_ids=prompt, device=CPU)
    assert [type(processor) for processor in ours] == [type(processor) for processor in expected]
    for mine, their in zip(ours, expected, strict=True):
        assert settings(mine) == settings(their), type(mine)


def test_processors_compute_what_those_of_transformers_compute(model: PreTrainedModel) -> None:
    options = {"max_new_tokens": 5, "pad_token_id": 0} | CONFIGS[-1]
    expected = hf.LogitsProcessorList(theirs(model, PROMPT, [], options))
    ours = make_processors(resolve(None, None, options), prompt_ids=PROMPT, device=CPU)
    sequences, scores = torch.tensor([[*PROMPT, 9], [*PROMPT, 1]]), torch.randn(2, 131)
    assert torch.equal(ours(sequences, scores.clone()), expected(sequences, scores.clone()))


class Nudge(hf.LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + 1.0


def test_custom_processors_are_merged_as_transformers_merges_them(model: PreTrainedModel) -> None:
    options = {"repetition_penalty": 1.3, "suppress_tokens": [1], "do_sample": True, "temperature": 0.5}
    options |= {"max_new_tokens": 5}
    nudge = Nudge()
    custom = [nudge, hf.RepetitionPenaltyLogitsProcessor(1.9), TemperatureLogitsWarper(3.0), nudge]
    expected = theirs(model, PROMPT, custom, options)
    ours = make_processors(resolve(None, None, options), prompt_ids=PROMPT, device=CPU, custom=custom)
    assert [type(processor) for processor in ours] == [type(processor) for processor in expected]
    assert [processor in custom for processor in ours] == [processor in custom for processor in expected]


def test_custom_processors_must_be_a_list() -> None:
    with pytest.raises(InvalidRequest, match="`logits_processor` must be a list"):
        make_processors(resolve(None, None, {}), prompt_ids=PROMPT, device=CPU, custom=Nudge())  # type: ignore[arg-type]


def test_presence_penalty_lowers_each_generated_token_once_and_no_prompt_token() -> None:
    penalty = PresencePenalty(0.5, prompt_tokens=2)
    scores = penalty(torch.tensor([[1, 2, 3, 3, 4]]), torch.zeros(1, 6))
    assert scores.tolist() == [[0.0, 0.0, 0.0, -0.5, -0.5, 0.0]]


def test_presence_penalty_counts_from_the_end_of_the_requests_prompt() -> None:
    processors = make_processors(resolve(None, None, {"presence_penalty": 1.0}), prompt_ids=[4, 5], device=CPU)
    assert processors(torch.tensor([[4, 5, 3]]), torch.zeros(1, 6)).tolist() == [[0.0, 0.0, 0.0, -1.0, 0.0, 0.0]]


def test_presence_penalty_follows_repetition_penalty() -> None:
    options = resolve(None, None, {"presence_penalty": 0.5, "repetition_penalty": 1.2, "bad_words_ids": [[1]]})
    kinds = [type(processor) for processor in make_processors(options, prompt_ids=PROMPT, device=CPU)]
    assert kinds == [hf.RepetitionPenaltyLogitsProcessor, PresencePenalty, hf.NoBadWordsLogitsProcessor]
