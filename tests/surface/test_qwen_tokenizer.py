"""Qwen's tokenizer and special tokens: several EOS ids, a PAD of its own, characters that span tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessor

import kvloom
import tiny
from kvloom import LanguageModel

IM_END, END_OF_TEXT = 151_645, 151_643
STORY = "从前有座山，山里有座庙。🧶 Once upon a time… ☃️ naïve façade 👩🏽‍🚀!"


class Dictated(LogitsProcessor):
    """Makes the model say given tokens, one after the other."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self.start: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.start is None:
            self.start = input_ids.shape[1]
        token = self.token_ids[input_ids.shape[1] - self.start]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


@pytest.fixture(scope="module")
def lm(qwen2_tokenizer: Path) -> LanguageModel:
    model = tiny.tiny_model("qwen2", vocab_size=151_936, num_hidden_layers=1)
    # A chat model's config: the turn's end and the text's end both stop it.
    model.generation_config = GenerationConfig(eos_token_id=[IM_END, END_OF_TEXT], pad_token_id=END_OF_TEXT)
    return kvloom.attach(model, AutoTokenizer.from_pretrained(qwen2_tokenizer))


@pytest.mark.parametrize("end", [IM_END, END_OF_TEXT])
def test_each_eos_of_the_generation_config_ends_a_text(lm: LanguageModel, end: int) -> None:
    out = lm.generate("Hi", max_new_tokens=9, logits_processor=[Dictated([40, 1079, end, 40, 40])])
    assert out.token_ids == [40, 1079, end] and out.finish_reason == "eos"
    assert out.text == "I am"


def test_a_base_model_is_not_stopped_by_the_end_of_a_turn(lm: LanguageModel) -> None:
    base = GenerationConfig(eos_token_id=END_OF_TEXT, pad_token_id=END_OF_TEXT)
    said = [40, IM_END, 1079, END_OF_TEXT, 40]
    out = lm.generate("Hi", generation_config=base, max_new_tokens=9, logits_processor=[Dictated(said)])
    assert out.token_ids == said[:4]
    endless = lm.generate("Hi", eos_token_id=None, max_new_tokens=5, logits_processor=[Dictated(said)])
    assert endless.token_ids == said and endless.finish_reason == "length"


def test_short_beams_are_filled_with_pad(lm: LanguageModel) -> None:
    beams = lm.beam_search("Hi", num_beams=3, num_return_sequences=3, max_new_tokens=6)
    longest = max(len(beam.token_ids) for beam in beams)
    for beam, row in zip(beams, beams.sequences.tolist(), strict=True):
        assert row[1:] == beam.token_ids + [END_OF_TEXT] * (longest - len(beam.token_ids))


def test_a_stream_never_shows_half_a_character(lm: LanguageModel) -> None:
    said = lm.tokenizer(STORY).input_ids
    stream = lm.stream("Hi", max_new_tokens=len(said), logits_processor=[Dictated(said)])
    pieces = [piece.text for piece in stream]
    assert "".join(pieces) == STORY == stream.result.text
    assert not any("\ufffd" in piece for piece in pieces) and "" in pieces


def test_a_text_that_ends_inside_a_character_says_so(lm: LanguageModel) -> None:
    said = lm.tokenizer("ok 👩🏽‍🚀").input_ids
    cut = next(n for n in range(1, len(said)) if lm.tokenizer.decode(said[:n]).endswith("\ufffd"))
    stream = lm.stream("Hi", max_new_tokens=cut, logits_processor=[Dictated(said)])
    text = "".join(piece.text for piece in stream)
    assert text.endswith("\ufffd") and text == stream.result.text


def test_text_behind_a_context_is_tokenized_as_it_stands(lm: LanguageModel) -> None:
    context = lm.prefill("从前有座山，")
    out = lm.generate("山里有座庙。", context=context, max_new_tokens=2)
    whole = lm.tokenizer("从前有座山，").input_ids + lm.tokenizer("山里有座庙。").input_ids
    assert list(out.context.token_ids[:-2]) == whole
