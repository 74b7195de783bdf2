"""When sequences end: EOS, stop strings, the caller's criteria, length; and what the reason is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EosTokenCriteria,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)

from driver import drive
from kvloom.decoding import Hypothesis, make_decoder, resolve
from kvloom.decoding.stopping import make_stopping
from kvloom.errors import InvalidRequest

CPU = torch.device("cpu")
PROMPT = "Once upon a time, Tim and Lily"


@pytest.fixture(scope="module")
def stories(stories260k: Path) -> tuple[PreTrainedModel, Any]:
    model = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(stories260k)


def ours(stories: tuple[PreTrainedModel, Any], criteria: Any = None, **options: Any) -> tuple[Any, list[Hypothesis]]:
    model, tokenizer = stories
    resolved = resolve(model.generation_config, None, {"max_new_tokens": 30} | options)
    prompt = tokenizer(PROMPT)["input_ids"]
    decoder = make_decoder(
        resolved,
        prompt,
        vocab_size=model.config.vocab_size,
        device="cpu",
        tokenizer=tokenizer,
        stopping_criteria=criteria,
    )
    return decoder, drive(model, decoder, prompt, first_batch=resolved.num_beams)


def theirs(stories: tuple[PreTrainedModel, Any], criteria: Any = None, **options: Any) -> list[list[int]]:
    model, tokenizer = stories
    options = {"max_new_tokens": 30} | options
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    criteria = StoppingCriteriaList(criteria or [])
    return model.generate(
        **inputs, tokenizer=tokenizer, use_cache=False, stopping_criteria=criteria, **options
    ).tolist()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("strings", [["."], "play", ["zzz", " to the"], ["zzz"]], ids=str)
def test_stop_strings_end_where_transformers_ends(stories: Any, strings: Any, beams: int) -> None:
    options = {"stop_strings": strings, "num_beams": beams, "num_return_sequences": beams}
    decoder, found = ours(stories, **options)
    assert decoder.sequences().tolist() == theirs(stories, **options)
    text = stories[1].decode(found[0].token_ids)
    stopped = any(string in text for string in ([strings] if isinstance(strings, str) else strings))
    assert found[0].finish_reason == ("stop" if stopped else "length")


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    options = resolve(None, None, {"stop_strings": "END"})
    with pytest.raises(InvalidRequest, match=r"`stop_strings` needs .* no tokenizer"):
        make_decoder(options, [1], vocab_size=9, device="cpu")


class AfterComma:
    """Ends a sequence with the token that follows a comma."""

    def __init__(self, comma: int) -> None:
        self.comma = comma

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids[:, -2] == self.comma


@pytest.mark.parametrize("beams", [1, 3])
def test_a_callers_criterion_ends_sequences(stories: Any, beams: int) -> None:
    comma = stories[1](",")["input_ids"][-1]
    options = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": 40}
    decoder, found = ours(stories, [AfterComma(comma)], **options)
    assert decoder.sequences().tolist() == theirs(stories, [AfterComma(comma)], **options)
    assert "stop" in {hypothesis.finish_reason for hypothesis in found}


def test_a_criterion_of_a_built_in_kind_takes_its_place_as_in_transformers(stories: Any) -> None:
    comma = stories[1](",")["input_ids"][-1]
    period = stories[1](".")["input_ids"][-1]
    decoder, found = ours(stories, [EosTokenCriteria(comma)], eos_token_id=period, max_new_tokens=60)
    assert decoder.sequences().tolist() == theirs(
        stories, [EosTokenCriteria(comma)], eos_token_id=period, max_new_tokens=60
    )
    assert period in found[0].token_ids and found[0].token_ids[-1] == comma
    assert found[0].finish_reason == "eos"


def stopping(criteria: Any = None, **options: Any) -> Any:
    resolved = resolve(None, None, {"max_new_tokens": 4} | options)
    return make_stopping(resolved, prompt_tokens=2, device=CPU, custom=criteria)


def check(conditions: Any, sequences: torch.Tensor) -> Any:
    return conditions.check(sequences[:, -1], length=sequences.shape[1], sequences=lambda: sequences)


def test_eos_is_named_before_stop_and_stop_before_length() -> None:
    conditions = stopping([lambda ids, scores: ids[:, -1] >= 5], eos_token_id=[5, 6])
    last = torch.tensor([[1, 2, 0, 0, 0, token] for token in (5, 7, 3)])
    stops = check(conditions, last)
    assert stops.finished.tolist() == [True, True, True]
    reasons = [conditions.reason(t, s) for t, s in zip((5, 7, 3), stops.stopped.tolist(), strict=True)]
    assert reasons == ["eos", "stop", "length"]
    assert check(conditions, last[:, 1:]).finished.tolist() == [True, True, False]


@pytest.mark.parametrize("answer", [True, torch.tensor([True, True]), torch.tensor([[True], [True]])], ids=str)
def test_a_criterion_may_answer_for_all_rows_or_each(answer: Any) -> None:
    assert check(stopping([lambda ids, scores: answer]), torch.tensor([[1], [2]])).finished.tolist() == [True, True]


def test_wrong_criteria_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="answered for 3 sequences; there are 2"):
        check(stopping([lambda ids, scores: torch.ones(3)]), torch.tensor([[1], [2]]))
    with pytest.raises(InvalidRequest, match="must be a list of callables"):
        stopping(lambda ids, scores: True)
    with pytest.raises(InvalidRequest, match="MaxLengthCriteria of 50 tokens exceeds the maximum of 6"):
        stopping([MaxLengthCriteria(50)])


def test_a_shorter_max_length_criterion_ends_earlier() -> None:
    conditions = stopping([MaxLengthCriteria(4)])
    assert not check(conditions, torch.ones(1, 3, dtype=torch.int64)).finished
    assert check(conditions, torch.ones(1, 4, dtype=torch.int64)).finished


def test_max_time_ends_every_sequence() -> None:
    conditions = stopping(max_time=1e-9)
    assert check(conditions, torch.ones(2, 3, dtype=torch.int64)).stopped.tolist() == [True, True]
