"""`kvloom.generate` on encoder-decoder models: the call of `model.generate`, and what it returns.

The reference runs with `use_cache=False`; see test_encoder_decoder.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvloom
from kvloom.errors import InvalidRequest, UnsupportedOption
from tiny import random_ids, random_source, tiny_model

FAMILIES = ("t5", "bart", "marian")
PAD, START = 0, 2
TOLERANCE = 1e-4
DETAILS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@cache
def model_named(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    model.generation_config.pad_token_id = PAD
    return model


def padded(model: PreTrainedModel, *lengths: int) -> dict[str, Tensor]:
    """A batch of random sources, padded on the right."""
    sources = [random_ids(model, tokens=n, seed=n) for n in lengths]
    width = max(lengths)
    return {
        "input_ids": torch.tensor([own + [PAD] * (width - len(own)) for own in sources]),
        "attention_mask": torch.tensor([[1] * len(own) + [0] * (width - len(own)) for own in sources]),
    }


def both(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> tuple[Any, Any]:
    options = {"max_new_tokens": 8, **options}
    return model.generate(**inputs, use_cache=False, **options), kvloom.generate(model, **inputs, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_and_details_of_a_padded_batch_are_those_of_transformers(family: str) -> None:
    model = model_named(family)
    inputs = padded(model, 9, 5, 12)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        theirs, ours = both(model, inputs, **options, **DETAILS)
        assert type(ours) is type(theirs)
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        assert (ours.sequences[:, 0] == START).all()
        for name in ("scores", "logits"):
            for own, its in zip(getattr(ours, name), getattr(theirs, name), strict=True):
                torch.testing.assert_close(own, its, atol=TOLERANCE, rtol=TOLERANCE)
        if options:
            assert ours.beam_indices.tolist() == theirs.beam_indices.tolist()
            torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_that_end_and_lengths_are_those_of_transformers(beams: int) -> None:
    model = model_named("bart")
    inputs = padded(model, 9, 5, 7)
    ends = model.generate(**inputs, use_cache=False, max_new_tokens=8)[0, 4].item()
    for options in ({"eos_token_id": ends}, {"max_new_tokens": None, "max_length": 6}, {"max_new_tokens": None}):
        theirs, ours = both(model, inputs, num_beams=beams, **options)
        assert ours.tolist() == theirs.tolist()


def test_without_a_mask_every_token_of_a_source_counts() -> None:
    model = model_named("t5")
    inputs = padded(model, 9, 5)
    masked = kvloom.generate(model, **inputs, max_new_tokens=8)
    theirs, ours = both(model, {"inputs": inputs["input_ids"]})
    assert ours.tolist() == theirs.tolist() != masked.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_token_is_put_before_decoder_ids_where_transformers_does(family: str) -> None:
    model = model_named(family)
    inputs = padded(model, 9, 5)
    for begun in ([[START, 9], [START, 8]], [[7, 9], [6, 8]], [[START, 9], [6, 8]]):
        theirs, ours = both(model, inputs, decoder_input_ids=torch.tensor(begun))
        assert ours.tolist() == theirs.tolist()


def test_samples_processors_and_streamers_work_on_sources() -> None:
    model = model_named("bart")
    inputs = padded(model, 9, 5)
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = kvloom.generate(model, **inputs, **options)
        torch.manual_seed(1)
        assert kvloom.generate(model, **inputs, **options).tolist() == first.tolist()
    assert first.shape == (4, 6)
    theirs, ours = both(model, inputs, prefix_allowed_tokens_fn=lambda index, _: [11, 12] if index else [13, 14, 15])
    assert ours.tolist() == theirs.tolist()


def test_a_source_is_encoded_once_over_calls() -> None:
    lm = kvloom.attach(tiny_model("bart"))
    inputs = padded(lm.binding.model, 9, 5)
    runs: list[int] = []
    lm.binding.model.get_encoder().register_forward_hook(lambda *_: runs.append(1))
    kvloom.generate(lm, **inputs, max_new_tokens=4, num_beams=4)
    kvloom.generate(lm, **inputs, max_new_tokens=4)
    assert len(runs) == 2


def test_what_would_change_the_output_unseen_is_refused() -> None:
    model = model_named("bart")
    good = padded(model, 6, 6)
    ids = good["input_ids"]
    for inputs, message in [
        ({"attention_mask": good["attention_mask"]}, "nothing to decode from. Pass `input_ids`"),
        ({"input_ids": ids, "inputs": ids}, "the same argument"),
        ({"input_ids": ids[0]}, r"shape \[batch, tokens\]"),
        ({"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]] * 2)}, "padding_side='right'"),
        ({"input_ids": ids, "decoder_input_ids": torch.tensor([[2, 3]])}, "1 rows for 2 sources"),
        ({"input_ids": ids, "decoder_input_ids": torch.tensor([[2, 500]] * 2)}, "outside the vocabulary"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            kvloom.generate(model, **inputs)
    begun = {
        "decoder_input_ids": torch.tensor([[2, 7], [0, 2]]),
        "decoder_attention_mask": torch.tensor([[1, 1], [0, 1]]),
    }
    for arguments, name in [
        (begun, "decoder_attention_mask"),
        ({"encoder_outputs": (torch.zeros(2, 6, 48),)}, "encoder_outputs"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"retention": kvloom.SinkWindow()}, "retention"),
    ]:
        with pytest.raises(UnsupportedOption, match=f"`{name}` is not supported"):
            kvloom.generate(model, **good, **arguments)


def test_a_checkpoint_that_asks_to_look_inside_is_decoded_where_nothing_can_be_shown() -> None:
    model = tiny_model("bart")
    model.generation_config.output_attentions = True
    ids = torch.tensor([random_ids(model, tokens=6)])
    assert kvloom.generate(model, ids, max_new_tokens=5).tolist() == model.generate(ids, max_new_tokens=5).tolist()


# ---- Whisper -----------------------------------------------------------------------------------------------------

END, FIRST_TIMESTAMP = 100, 109


@pytest.fixture(scope="module")
def whisper() -> PreTrainedModel:
    """It reads 40 frames at a time; the last tokens of its vocabulary are timestamps."""
    model = tiny_model("whisper")
    config = model.generation_config
    config.eos_token_id = config.pad_token_id = END
    config.no_timestamps_token_id = FIRST_TIMESTAMP - 1
    config.lang_to_id, config.is_multilingual = {"<|en|>": 90, "<|de|>": 91}, True
    config.task_to_id = {"transcribe": 92, "translate": 93}
    config.prev_sot_token_id, config.max_initial_timestamp_index = 94, 5
    config.suppress_tokens, config.begin_suppress_tokens = [3, 4], [5, END]
    return model


def features(*, recordings: int, frames: int) -> Tensor:
    return torch.randn((recordings, 6, frames), generator=torch.Generator().manual_seed(3))


def told(result: Any) -> Any:
    """Whatever Whisper's `generate` returns, to be compared."""
    if isinstance(result, Tensor):
        return result.tolist()
    segments = [[(float(own["start"]), own["tokens"].tolist()) for own in one] for one in result.get("segments", [])]
    return result["sequences"].tolist(), segments


SHORT: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "num_return_sequences": 2},
    {"return_timestamps": True},
    {"language": "de", "task": "translate"},
    {"language": ["de", "en"]},
    {"decoder_input_ids": torch.tensor([[2, 90, 92], [2, 91, 92]])},
    {"return_dict_in_generate": True, "output_scores": True},
]
LONG: list[dict[str, Any]] = [
    {"return_segments": True},
    {"num_beams": 3},
    {"prompt_ids": torch.tensor([94, 20, 21])},
    {"condition_on_prev_tokens": True, "return_segments": True},
    {"temperature": (0.0,), "logprob_threshold": -1.0, "compression_ratio_threshold": 1.35},
]


@pytest.mark.parametrize("options", SHORT, ids=lambda own: "-".join(own))
def test_short_recordings_are_transcribed_as_by_whispers_own_generate(
    whisper: PreTrainedModel, options: dict[str, Any]
) -> None:
    recordings = features(recordings=2, frames=40)
    theirs = whisper.generate(recordings, max_new_tokens=8, use_cache=False, **options)
    ours = kvloom.generate(whisper, input_features=recordings, max_new_tokens=8, **options)
    assert type(ours) is type(theirs)
    assert told(ours) == told(theirs)


@pytest.mark.parametrize("options", LONG, ids=lambda own: "-".join(own))
@pytest.mark.parametrize("recordings", [1, 2])
def test_long_recordings_are_cut_as_by_whispers_own_generate(
    whisper: PreTrainedModel, options: dict[str, Any], recordings: int
) -> None:
    sound = features(recordings=recordings, frames=130)
    mask = torch.ones((recordings, 130), dtype=torch.int64)
    mask[-1, 90:] = recordings == 1
    options = {"max_new_tokens": 10, "attention_mask": mask, "return_timestamps": True, **options}
    theirs = whisper.generate(sound, use_cache=False, **options)
    ours = kvloom.generate(whisper, sound, **options)
    assert told(ours) == told(theirs)


def test_what_whispers_generate_is_not_given_is_refused_by_name(whisper: PreTrainedModel) -> None:
    sound = features(recordings=2, frames=40)
    for options, name in [
        ({"return_token_timestamps": True}, "return_token_timestamps"),
        ({"no_speech_threshold": 0.5}, "no_speech_threshold"),
    ]:
        with pytest.raises(UnsupportedOption, match=f"`{name}` is not supported"):
            kvloom.generate(whisper, sound, **options)
    with pytest.raises(InvalidRequest, match=r"\[batch, bins, frames\]; got \[6, 40\]"):
        kvloom.generate(whisper, sound[0])
    with pytest.raises(ValueError, match="Unsupported language: xx"):
        kvloom.generate(whisper, sound, language="xx")


def test_a_recording_is_encoded_once_for_all_temperatures(whisper: PreTrainedModel) -> None:
    torch.manual_seed(0)  # else it may draw a timestamp, behind which a second piece of the recording begins
    runs: list[int] = []
    lm = kvloom.attach(whisper)
    handle = whisper.get_encoder().register_forward_hook(lambda *_: runs.append(1))
    options = {"temperature": (0.0, 0.4, 0.8), "logprob_threshold": 0.0, "language": "en"}
    kvloom.generate(lm, random_source(whisper, tokens=0, seed=9)[None], max_new_tokens=6, **options)
    handle.remove()
    assert len(runs) == 1
