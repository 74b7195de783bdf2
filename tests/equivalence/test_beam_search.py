"""Beam search decides as transformers' `generate` does, given the same logits: tokens, fill and scores."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, PreTrainedModel

from driver import assert_raw_results, drive
from kvloom.decoding import BeamSearch, make_decoder, resolve
from tiny import random_ids, tiny_model

PENALTIES = (-1.0, 0.0, 0.5, 1.0, 1.2, 2.0)
NEW_TOKENS = 9


@cache
def model_named(family: str) -> PreTrainedModel:
    if family == "gpt2":
        return tiny_model("gpt2", n_layer=1)
    return tiny_model(family, num_hidden_layers=1)


def search(model: PreTrainedModel, prompt: list[int], beams: int, **options: Any) -> BeamSearch:
    custom = options.pop("logits_processor", None)
    resolved = resolve(model.generation_config, None, {"num_beams": beams, "max_new_tokens": NEW_TOKENS} | options)
    decoder = make_decoder(resolved, prompt, vocab_size=model.config.vocab_size, device="cpu", logits_processor=custom)
    assert isinstance(decoder, BeamSearch)
    drive(model, decoder, prompt, first_batch=beams)
    return decoder


def generate(model: PreTrainedModel, prompt: list[int], beams: int, **options: Any) -> Any:
    options = {"num_beams": beams, "max_new_tokens": NEW_TOKENS} | options
    token_ids = torch.tensor([prompt])
    return model.generate(
        token_ids,
        # Without a mask transformers guesses one: any PAD id in the prompt would be hidden.
        attention_mask=torch.ones_like(token_ids),
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **options,
    )


def assert_same(model: PreTrainedModel, prompt: list[int], beams: int, **options: Any) -> BeamSearch:
    theirs = generate(model, prompt, beams, **options)
    ours = search(model, prompt, beams, **options)
    assert ours.sequences().tolist() == theirs.sequences.tolist(), options
    scores = [found.score for found in ours.results()]
    assert scores == theirs.sequences_scores.tolist(), options
    assert ours.steps == len(theirs.scores), options
    return ours


def frequent_tokens(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """The tokens that beams over this prompt choose most: as EOS ids they end many hypotheses, early."""
    free = search(model, prompt, 6, num_return_sequences=6)
    counts = Counter(token for found in free.results() for token in found.token_ids)
    return [token for token, _ in counts.most_common(count)]


def endings(model: PreTrainedModel, prompt: list[int]) -> list[dict[str, Any]]:
    often = frequent_tokens(model, prompt, 30)
    return [
        {},
        {"eos_token_id": 130, "pad_token_id": 3},  # is never chosen
        {"eos_token_id": often[0]},
        {"eos_token_id": often[1], "pad_token_id": 0},  # transformers takes PAD 0 for unset
        {"eos_token_id": often[2:5], "pad_token_id": 7},
        {"eos_token_id": often},
    ]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("beams", [2, 3, 4, 8])
def test_beams_end_and_rank_as_in_transformers(beams: int, early_stopping: bool | str) -> None:
    model = model_named("llama")
    reasons, steps = Counter[str](), Counter[int]()
    for turn, penalty in enumerate(PENALTIES):
        prompt = random_ids(model, tokens=4 + turn, seed=10 * beams + turn)
        for case, end in enumerate(endings(model, prompt)):
            returned = (1, (beams + 1) // 2, beams)[(case + turn) % 3]
            options = {"length_penalty": penalty, "early_stopping": early_stopping, **end}
            decoder = assert_same(model, prompt, beams, num_return_sequences=returned, **options)
            reasons.update(found.finish_reason for found in decoder.results())
            steps[decoder.steps] += 1
    assert min(reasons["eos"], reasons["length"]) >= 15, "the cases should cover both endings"
    early = sum(count for length, count in steps.items() if length < NEW_TOKENS)
    assert early >= 2, "and searches that end before the length is used up"


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beams_of_another_architecture_agree_too(early_stopping: bool | str) -> None:
    model = model_named("gpt2")
    for seed in range(3):
        prompt = random_ids(model, tokens=6, seed=seed)
        for end in endings(model, prompt):
            assert_same(model, prompt, 4, num_return_sequences=3, early_stopping=early_stopping, **end)


PROCESSED: list[dict[str, Any]] = [
    {"min_new_tokens": 5},
    {"min_length": 9},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[3], [17, 4]]},
    {"forced_eos_token_id": 9},
    {"suppress_tokens": list(range(40))},
    {"exponential_decay_length_penalty": (2, 1.4)},
    {"encoder_no_repeat_ngram_size": 1},
    {"renormalize_logits": True, "repetition_penalty": 0.6},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2},
]


@pytest.mark.parametrize("options", PROCESSED, ids=lambda options: next(iter(options)))
def test_beams_under_logits_processors_agree(options: dict[str, Any]) -> None:
    model = model_named("llama")
    for beams, early_stopping in ((2, False), (4, True)):
        prompt = random_ids(model, tokens=6, seed=beams)
        end = {"eos_token_id": frequent_tokens(model, prompt, 2), "early_stopping": early_stopping}
        assert_same(model, prompt, beams, num_return_sequences=2, **end, **options)


class OnlyThese(LogitsProcessor):
    """Leaves only a few tokens possible, by writing into the scores."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)
        self.rows: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.rows.append(scores.shape[0])
        kept = scores[:, self.tokens]
        scores.fill_(-torch.inf)
        scores[:, self.tokens] = kept
        return scores


@pytest.mark.parametrize("tokens", [(5,), (5, 9), (5, 9, 2)])
def test_starved_beams_return_what_transformers_returns(tokens: tuple[int, ...]) -> None:
    model, prompt = model_named("llama"), [1, 2, 3]
    for beams in (2, 3, 4):
        options = {"num_return_sequences": beams, "eos_token_id": 5, "max_new_tokens": 4}
        theirs = generate(model, prompt, beams, logits_processor=[OnlyThese(*tokens)], **options)
        ours = search(model, prompt, beams, logits_processor=[OnlyThese(*tokens)], **options)
        assert ours.sequences().tolist() == theirs.sequences.tolist()
        assert [found.score for found in ours.results()] == theirs.sequences_scores.tolist()


def test_a_custom_processor_sees_all_beams_from_the_first_step() -> None:
    model, watcher = model_named("llama"), OnlyThese(*range(131))
    search(model, [1, 2, 3], 4, logits_processor=[watcher])
    assert watcher.rows == [4] * NEW_TOKENS


@pytest.mark.parametrize("filters", [{}, {"top_k": 12, "temperature": 1.4}, {"top_p": 0.9, "top_k": 0}])
def test_beam_sampling_draws_what_transformers_draws_from_the_same_seed(filters: dict[str, Any]) -> None:
    model = model_named("llama")
    for seed, beams in ((1, 2), (2, 3), (3, 4)):
        prompt = random_ids(model, tokens=5, seed=seed)
        end = {"eos_token_id": frequent_tokens(model, prompt, 2)}
        options = {"do_sample": True, "num_return_sequences": 2, **end, **filters}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            theirs = generate(model, prompt, beams, **options)
        ours = search(model, prompt, beams, seed=seed, **options)
        assert ours.sequences().tolist() == theirs.sequences.tolist()
        assert [found.score for found in ours.results()] == theirs.sequences_scores.tolist()


def test_a_hypothesis_reports_the_raw_logits_along_its_own_path() -> None:
    model, prompt = model_named("llama"), [4, 8, 15, 16]
    end = {"eos_token_id": frequent_tokens(model, prompt, 2)}
    extras = {"output_logits": True, "top_logprobs": 3, "repetition_penalty": 1.5}
    decoder = search(model, prompt, 4, num_return_sequences=4, **end, **extras)
    for found in decoder.results():
        assert_raw_results(model, prompt, found, top=3)


def test_without_processors_a_score_is_the_sum_of_the_logprobs_over_the_length() -> None:
    model = model_named("gpt2")
    decoder = search(model, [9, 9, 1], 3, num_return_sequences=3, length_penalty=0.5)
    for found in decoder.results():
        assert found.score == pytest.approx(sum(found.logprobs) / len(found.token_ids) ** 0.5, rel=1e-5)
