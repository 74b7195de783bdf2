"""Planted facts and the texts around them."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvloom.bench.quality.facts import OWNERS, VALUES, draw_facts
from kvloom.bench.quality.texts import cut_passages, find_borders, plant_facts, read_text
from kvloom.errors import InvalidRequest
from kvloom.loading.checkpoint import DEMO_MODEL


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def sample() -> str:
    return read_text(None)


def test_what_measurements_use_is_never_trained_on() -> None:
    for phrases in (OWNERS, VALUES):
        assert not set(phrases[True]) & set(phrases[False])
        share = len(phrases[True]) / (len(phrases[True]) + len(phrases[False]))
        assert 0.2 < share < 0.3


@given(st.integers(0, 10_000), st.integers(1, 8), st.booleans())
def test_a_fact_tells_its_value_once_and_its_question_never(seed: int, count: int, unseen: bool) -> None:
    facts = draw_facts(Random(seed), count, unseen=unseen)
    assert len({fact.owner for fact in facts}) == len({fact.value for fact in facts}) == count
    for fact in facts:
        assert fact.statement.count(fact.value) == 1 and fact.owner in fact.statement
        assert fact.value not in fact.question and fact.question.endswith(f"{fact.owner} is")
        assert fact.owner in OWNERS[unseen] and fact.value in VALUES[unseen]


def test_passages_have_the_lengths_asked_for_and_follow_each_other_in_the_text(
    tokenizer: PreTrainedTokenizerBase, sample: str
) -> None:
    passages = cut_passages(sample, tokenizer, count=99, context_tokens=300, new_tokens=20)
    assert {(len(own.context_ids), len(own.continuation_ids)) for own in passages} == {(300, 20)}
    texts = [tokenizer.decode(own.context_ids + own.continuation_ids) for own in passages]
    places = [sample.index(text) for text in texts]
    assert all(place + len(text) <= later for place, text, later in zip(places, texts, places[1:], strict=False))
    assert len(places) >= 8


def test_texts_hold_two_facts_at_depths_spread_over_all_of_them(
    tokenizer: PreTrainedTokenizerBase, sample: str
) -> None:
    planted = plant_facts(sample, tokenizer, count=8, context_tokens=400, seed=3)
    for own in planted:
        assert 340 <= len(own.context_ids) <= 400
        text = tokenizer.decode(own.context_ids)
        story = text
        for question in own.questions:
            assert text.count(question.fact.statement) == 1
            assert tokenizer.decode(question.token_ids) == f"\n\n{question.fact.question}"
            assert tokenizer.decode(question.answer_ids) == question.fact.answer
            story = story.replace(f" {question.fact.statement}", "")
        assert story in sample
    for index in range(2):
        depths = sorted(own.questions[index].depth for own in planted)
        assert depths[0] < 0.25 and depths[-1] > 0.75


def test_the_same_seed_plants_the_same_facts_and_another_one_others(
    tokenizer: PreTrainedTokenizerBase, sample: str
) -> None:
    same, again, other = (plant_facts(sample, tokenizer, count=2, context_tokens=200, seed=seed) for seed in (1, 1, 2))
    assert same == again != other


@pytest.mark.parametrize("text", ["One. Two. Three.", "one two three four", "一二三四", "a"])
def test_every_text_has_borders_inside_of_it(text: str) -> None:
    borders = find_borders(text)
    assert borders == sorted(set(borders)) and all(0 <= own <= len(text) for own in borders) and borders


def test_a_text_that_is_too_short_is_refused_with_what_is_needed(
    tokenizer: PreTrainedTokenizerBase, tmp_path: object
) -> None:
    with pytest.raises(InvalidRequest, match=r"the text has 5 tokens, but 40 are needed"):
        cut_passages("Once upon a time.", tokenizer, count=1, context_tokens=30, new_tokens=10)
    with pytest.raises(InvalidRequest, match="leaves no room"):
        plant_facts("Once upon a time.", tokenizer, count=1, context_tokens=10, seed=0)


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(InvalidRequest, match="not text in UTF-8"):
        read_text(tmp_path / "binary")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InvalidRequest, match="empty"):
        read_text(tmp_path / "empty.txt")
