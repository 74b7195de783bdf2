"""Image-text models: cached decoding against transformers alone, and against the model's own uncached forward.

`reference` is `model.generate` on a model made anew, because transformers keeps state of a call on the model. In two
cases that state is wrong even so; each has a test that shows it, and compares with `greedy_by_own_forward` instead.
"""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import kvloom
from kvloom import LanguageModel
from tiny_vision import PLACEHOLDERS, QWEN, Picture, prompt, tiny_vision_model

NEW = 10
WIDE, TALL, SMALL = Picture(4, 6), Picture(8, 4, seed=1), Picture(4, 4, seed=2)
CLIP = Picture(4, 4, frames=2, seed=3)
LONG_CLIP = Picture(4, 4, frames=6, seed=4, seconds=2.0)
"""Six temporal patches of 2 x 2 features: its extent in time exceeds that in space."""

FIRST_TURN = {"max_new_tokens": 2, "suppress_tokens": PLACEHOLDERS}
SECOND_TURN = {"max_new_tokens": NEW, "suppress_tokens": PLACEHOLDERS}

PROMPTS = {
    "text": (7,),
    "one image": (5, WIDE, 7),
    "two images": (3, WIDE, 2, TALL, 4),
    "video": (4, CLIP, 5),
    "long video": (4, LONG_CLIP, 5),
    "video and image": (2, CLIP, 3, SMALL, 3),
}


@pytest.fixture(scope="module", params=QWEN)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def lm(family: str) -> LanguageModel:
    return kvloom.attach(tiny_vision_model(family), block_tokens=4)


def model_of(lm: LanguageModel) -> PreTrainedModel:
    return lm.binding.model


def reference(family: str, inputs: dict[str, torch.Tensor], **options: object) -> list[list[int]]:
    """What transformers writes on a fresh model."""
    output = tiny_vision_model(family).generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW} | options)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def own_logits(
    family: str, inputs: dict[str, torch.Tensor], token_ids: list[int], model: PreTrainedModel | None = None
) -> torch.Tensor:
    """float[tokens, vocab]: a fresh model's own forward, without a cache, over a sequence that begins with inputs."""
    model = model or tiny_vision_model(family)
    model.model.rope_deltas = None
    types = inputs["mm_token_type_ids"]
    types = torch.nn.functional.pad(types, (0, len(token_ids) - types.shape[1]))
    shown = {name: own for name, own in inputs.items() if name not in ("attention_mask", "input_ids")}
    own = shown | {"mm_token_type_ids": types, "input_ids": torch.tensor([token_ids])}
    return model(**own, use_cache=False).logits[0]


def greedy_by_own_forward(family: str, inputs: dict[str, torch.Tensor], count: int = NEW) -> list[int]:
    """Token by token, each by an uncached forward of a fresh model over all that came before, from pixels on."""
    model, token_ids = tiny_vision_model(family), inputs["input_ids"][0].tolist()
    for _ in range(count):
        logits = own_logits(family, inputs, token_ids, model)[-1]
        logits[PLACEHOLDERS] = -torch.inf
        token_ids.append(int(logits.argmax()))
    return token_ids[-count:]


def together(*turns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of a whole conversation."""
    along = {"input_ids": 1, "attention_mask": 1, "mm_token_type_ids": 1}
    names = dict.fromkeys(name for turn in turns for name in turn)
    return {name: torch.cat([turn[name] for turn in turns if name in turn], along.get(name, 0)) for name in names}


def words(token_ids: list[int]) -> dict[str, torch.Tensor]:
    """Text as a part of a conversation."""
    ids = torch.tensor([token_ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids)}


# ---- one turn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_are_those_of_transformers_and_of_the_uncached_run(
    lm: LanguageModel, family: str, name: str
) -> None:
    inputs = prompt(model_of(lm), *PROMPTS[name])
    expected = reference(family, inputs)[0]
    cached = lm.generate(inputs, max_new_tokens=NEW, output_logits=True)
    uncached = lm.generate(inputs, max_new_tokens=NEW, output_logits=True, use_cache=False)
    assert cached.token_ids == uncached.token_ids == expected
    torch.testing.assert_close(cached.logits, uncached.logits, atol=2e-4, rtol=1e-4)


def test_a_ragged_batch_of_text_images_and_video_equals_each_alone(lm: LanguageModel, family: str) -> None:
    prompts = [prompt(model_of(lm), *parts) for parts in PROMPTS.values()]
    for out, inputs in zip(lm.generate(prompts, max_new_tokens=NEW), prompts, strict=True):
        assert out.token_ids == reference(family, inputs)[0]


def test_a_prompt_in_chunks_that_cut_through_its_images_gives_the_same_logits(lm: LanguageModel, family: str) -> None:
    inputs = prompt(model_of(lm), *PROMPTS["two images"])
    chunked = kvloom.attach(tiny_vision_model(family), block_tokens=4)
    chunked.engine.step_tokens = 3
    whole = lm.generate(inputs, max_new_tokens=NEW, output_logits=True)
    parts = chunked.generate(inputs, max_new_tokens=NEW, output_logits=True)
    assert parts.token_ids == whole.token_ids
    torch.testing.assert_close(parts.logits, whole.logits, atol=2e-4, rtol=1e-4)


def test_samples_are_the_same_cached_uncached_and_in_a_batch(lm: LanguageModel) -> None:
    one, other = (prompt(model_of(lm), *PROMPTS[name]) for name in ("one image", "video"))
    options = {"do_sample": True, "seed": 5, "max_new_tokens": NEW, "top_k": 20}
    alone = [lm.generate(inputs, **options).token_ids for inputs in (one, other)]
    assert [out.token_ids for out in lm.generate([one, other], **options)] == alone
    assert [lm.generate(inputs, use_cache=False, **options).token_ids for inputs in (one, other)] == alone


def test_beams_and_their_scores_are_those_of_transformers(lm: LanguageModel, family: str) -> None:
    prompts = [prompt(model_of(lm), *PROMPTS[name]) for name in ("two images", "video and image")]
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": NEW, "suppress_tokens": PLACEHOLDERS}
    for hypotheses, inputs in zip(lm.beam_search(prompts, **options), prompts, strict=True):
        details = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        expected = tiny_vision_model(family).generate(**inputs, **options, **details)
        assert hypotheses.sequences.tolist() == expected.sequences.tolist()
        found = torch.tensor([own.score for own in hypotheses])
        torch.testing.assert_close(found, expected.sequences_scores, atol=1e-4, rtol=1e-4)
        assert hypotheses[0].usage.computed_prompt_tokens + hypotheses[0].usage.cached_prompt_tokens == len(
            inputs["input_ids"][0]
        )


def test_placeholders_that_the_model_writes_itself_are_words_with_and_without_the_cache(lm: LanguageModel) -> None:
    inputs = prompt(model_of(lm), *PROMPTS["one image"])
    written = [*inputs["input_ids"][0].tolist(), *PLACEHOLDERS]
    context = lm.prefill(inputs)
    cached = lm.extend(context, [*PLACEHOLDERS, 7]).logits
    media = context.media
    own = lm.binding.forward_uncached(torch.tensor([[*written, 7], [*written, 7]]), last=3, media=media)
    torch.testing.assert_close(cached, own[0], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(own[1], own[0], atol=1e-5, rtol=1e-5)


def test_llava_shows_pictures_of_one_size_at_positions_that_count_tokens() -> None:
    lm = kvloom.attach(tiny_vision_model("llava"), block_tokens=4)
    prompts = [prompt(model_of(lm), *parts) for parts in ((7,), (5, WIDE, 7), (3, WIDE, 2, TALL, 4))]
    for out, inputs in zip(lm.generate(prompts, max_new_tokens=NEW), prompts, strict=True):
        assert out.token_ids == reference("llava", inputs)[0]
        assert lm.generate(inputs, max_new_tokens=NEW, use_cache=False).token_ids == out.token_ids


# ---- several turns -----------------------------------------------------------------------------------------------


def test_a_second_turn_with_another_image_equals_the_whole_conversation(lm: LanguageModel, family: str) -> None:
    first = prompt(model_of(lm), 5, WIDE, 6)
    answer = lm.generate(first, max_new_tokens=5)
    second = prompt(model_of(lm), 3, TALL, 4, seed=1)
    out = lm.generate(second, context=answer.context, max_new_tokens=NEW)
    whole = together(first, words(answer.token_ids), second)
    assert out.token_ids == reference(family, whole)[0]
    assert out.token_ids == lm.generate(whole, max_new_tokens=NEW).token_ids
    assert out.usage.computed_prompt_tokens == len(second["input_ids"][0]) + 1, "the answer's last token was not run"
    again = lm.generate(prompt(model_of(lm), 4, seed=2), context=out.context, max_new_tokens=4, use_cache=False)
    assert (
        again.token_ids == lm.generate(prompt(model_of(lm), 4, seed=2), context=out.context, max_new_tokens=4).token_ids
    )


def second_turn_of_transformers(
    family: str, first: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], between: dict[str, torch.Tensor] | None
) -> list[int]:
    """The second turn on the first one's `past_key_values`, as transformers has it, with a request between the two."""
    conversation, details = tiny_vision_model(family), {"do_sample": False, "return_dict_in_generate": True}
    before = conversation.generate(**first, **FIRST_TURN, **details)
    assert before.sequences.tolist() == whole["input_ids"][:, : before.sequences.shape[1]].tolist()
    if between is not None:
        conversation.generate(**between, do_sample=False, max_new_tokens=2)
    text = {name: whole[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    turn = conversation.generate(**text, past_key_values=before.past_key_values, **SECOND_TURN, **details)
    return turn.sequences[0, whole["input_ids"].shape[1] :].tolist()


def test_an_unrelated_request_between_two_turns_changes_nothing(family: str) -> None:
    """transformers keeps the distance between token index and rotary position of the last call on the model.

    A second turn on the first one's `past_key_values` finds the distance that the other request left there. So the
    reference is the model's own forward, uncached and fresh, over the whole conversation: transformers agrees with it
    as long as nothing comes between, and not any more when something does.
    """
    model = tiny_vision_model(family)
    lm = kvloom.attach(model, block_tokens=4)
    first, second = prompt(model, 5, Picture(16, 16), 6), prompt(model, 4, seed=1)
    unrelated = prompt(model, 9, seed=2)
    answer = lm.generate(first, **FIRST_TURN)
    lm.generate(unrelated, max_new_tokens=2)
    model.generate(**unrelated, do_sample=False, max_new_tokens=2)
    out = lm.generate(second, context=answer.context, **SECOND_TURN)
    whole = together(first, words(answer.token_ids), second)
    assert out.token_ids == greedy_by_own_forward(family, whole)
    assert second_turn_of_transformers(family, first, whole, None) == out.token_ids
    assert second_turn_of_transformers(family, first, whole, unrelated) != out.token_ids, "transformers is right now"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_text_behind_a_video_whose_extent_in_time_exceeds_that_in_space_stands_where_the_own_forward_has_it(
    family: str,
) -> None:
    """Text behind a video begins where its extent in space ends, by the model's own forward over a whole sequence.

    For text that comes later, on a cache, transformers goes by one number instead: the largest rotary position + 1 -
    the number of tokens. In a video whose extent in time exceeds that in space the largest position is that of time,
    so the next turn stands too far away. The reference is the model's own forward, uncached and fresh; transformers
    agrees with it on a short video. (Qwen3-VL's frames have no extent in time: it writes a time before each.)
    """
    model = tiny_vision_model(family)
    lm = kvloom.attach(model, block_tokens=4)
    second = prompt(model, 4, seed=1)
    for clip, transformers_is_right in ((Picture(8, 8, frames=2, seconds=0.5), True), (LONG_CLIP, False)):
        first = prompt(model, 4, clip, 1)
        answer = lm.generate(first, **FIRST_TURN)
        out = lm.generate(second, context=answer.context, **SECOND_TURN)
        whole = together(first, words(answer.token_ids), second)
        assert answer.token_ids == greedy_by_own_forward(family, first, len(answer.token_ids))
        assert out.token_ids == greedy_by_own_forward(family, whole)
        theirs = second_turn_of_transformers(family, first, whole, None)
        assert (theirs == out.token_ids) is transformers_is_right


# ---- the cache ---------------------------------------------------------------------------------------------------


def test_two_images_behind_the_same_placeholders_share_the_text_before_them_and_nothing_else(family: str) -> None:
    model = tiny_vision_model(family)
    lm = kvloom.attach(model, block_tokens=4)
    one, other = (prompt(model, 9, Picture(8, 8, seed=seed), 9) for seed in (0, 1))
    assert one["input_ids"].tolist() == other["input_ids"].tolist()
    tokens = one["input_ids"].shape[1]
    lm.generate(one, max_new_tokens=1)
    out = lm.generate(other, max_new_tokens=NEW)
    assert out.usage.cached_prompt_tokens == 8, "nine words and <start> stand before the image: two blocks of four"
    assert out.token_ids == reference(family, other)[0]
    again = lm.generate(other, max_new_tokens=1)
    assert again.usage.cached_prompt_tokens == (tokens - 1) // 4 * 4
    as_text = lm.generate(one["input_ids"], max_new_tokens=1)
    assert as_text.usage.cached_prompt_tokens == 8, "the same ids without an image are something else"


def test_the_encoder_runs_once_an_image_over_chunks_beams_requests_and_turns(family: str) -> None:
    model = tiny_vision_model(family)
    lm = kvloom.attach(model, block_tokens=4)
    lm.engine.step_tokens = 5
    runs: list[int] = []
    model.model.visual.register_forward_hook(lambda *_: runs.append(1))
    first = prompt(model, 5, WIDE, 2, TALL, 6)
    answer = lm.generate(first, max_new_tokens=3)
    lm.beam_search(first, num_beams=3, max_new_tokens=3)
    lm.generate(prompt(model, 3, TALL, 2, seed=1), max_new_tokens=3)
    lm.generate(prompt(model, 3, seed=2), context=answer.context, max_new_tokens=3)
    lm.score([[3, 4], [5]], prompt=first)
    assert len(runs) == 2


def test_features_of_changed_weights_are_computed_anew(family: str) -> None:
    model = tiny_vision_model(family)
    lm = kvloom.attach(model)
    inputs = prompt(model, 5, WIDE, 6)
    lm.generate(inputs, max_new_tokens=2)
    for parameter in model.model.visual.parameters():
        parameter.mul_(1.5)
    found = lm.generate(inputs, max_new_tokens=4, output_logits=True)
    expected = lm.generate(inputs, max_new_tokens=4, output_logits=True, use_cache=False)
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-4, rtol=1e-4)


def test_contexts_with_images_are_extended_forked_and_cut(lm: LanguageModel, family: str) -> None:
    inputs = prompt(model_of(lm), 5, WIDE, 7, TALL, 3)
    ids = inputs["input_ids"][0].tolist()
    expected = own_logits(family, inputs, ids)
    context = lm.prefill(inputs)
    step = lm.extend(context, [7, 8, 9], start=context.tokens)
    torch.testing.assert_close(step.logits, own_logits(family, inputs, [*ids, 7, 8, 9])[-3:], atol=2e-4, rtol=1e-4)
    between = int(context.media.items[1].places[0]) - 3
    short = context.truncate(between)
    assert len(short.media.items) == 1 and len(context.fork().media.items) == 2
    again = lm.extend(short, ids[between : between + 2])
    torch.testing.assert_close(again.logits, expected[between : between + 2], atol=2e-4, rtol=1e-4)
    with pytest.raises(kvloom.InvalidRequest, match="goes through the image"):
        context.truncate(int(context.media.items[0].places[2]))
    assert context.truncate(4).media is None


def test_scores_behind_an_image_are_those_of_the_own_forward(lm: LanguageModel, family: str) -> None:
    inputs = prompt(model_of(lm), *PROMPTS["one image"])
    ids, labels = inputs["input_ids"][0].tolist(), [[3, 4, 5], [6], [7, 8]]
    for scores in (
        lm.score(labels, prompt=inputs),
        lm.score(labels, context=lm.prefill(inputs)),
        lm.score(labels, prompt=inputs, use_cache=False),
    ):
        for label, score in zip(labels, scores, strict=True):
            logprobs = own_logits(family, inputs, ids + label).log_softmax(-1)[len(ids) - 1 : -1]
            expected = logprobs.gather(1, torch.tensor(label)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(score.token_logprobs), expected, atol=2e-4, rtol=1e-4)


def test_verify_proves_prompts_with_images(lm: LanguageModel) -> None:
    prompts = [prompt(model_of(lm), *PROMPTS[name]) for name in ("two images", "video")]
    report = lm.verify(prompts, max_new_tokens=6)
    assert report.ok and report.prompt_tokens == tuple(own["input_ids"].shape[1] for own in prompts), str(report)


# ---- attaching ---------------------------------------------------------------------------------------------------


def test_the_owners_calls_give_the_same_bits_and_find_their_own_state(family: str) -> None:
    model = tiny_vision_model(family)
    inputs = prompt(model, *PROMPTS["two images"])
    before = model.generate(
        **inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
    )
    state = model.model.rope_deltas.clone()
    lm = kvloom.attach(model)
    lm.generate(prompt(model, 9, CLIP, 2), max_new_tokens=3)
    lm.generate(prompt(model, 9, CLIP, 2), max_new_tokens=3, use_cache=False)
    assert torch.equal(model.model.rope_deltas, state)
    after = model.generate(
        **inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
    )
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


def test_a_model_whose_weights_were_given_up_for_packed_copies_sees_the_same(family: str) -> None:
    model = tiny_vision_model(family)
    inputs = prompt(model, *PROMPTS["two images"])
    expected = reference(family, inputs)[0]
    lm = kvloom.attach(model, exclusive=True)
    assert lm.generate(inputs, max_new_tokens=NEW).token_ids == expected
    assert lm.generate(inputs, max_new_tokens=NEW, use_cache=False).token_ids == expected


BROKEN = [*[(family, what) for family in QWEN for what in ("positions", "places", "features")], ("qwen3_vl", "deep")]


@pytest.mark.parametrize(("family", "broken"), BROKEN)
def test_attach_finds_what_is_wrong_with_images_and_refuses_them_alone(
    family: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvloom.models.images.features import Features
    from kvloom.models.images.media import Media, Medium
    from kvloom.models.images.vision import Vision

    if broken == "positions":
        monkeypatch.setattr(
            Media, "positions_of", lambda self, first, count: torch.arange(first, first + count).expand(3, -1)
        )
    elif broken == "places":
        monkeypatch.setattr(Medium, "between", lambda self, first, end: slice(0, 0))
    elif broken == "features":
        encode = Vision.encode
        monkeypatch.setattr(Vision, "encode", lambda self, medium: Features(encode(self, medium).rows.flip(0)))
    else:
        encode = Vision.encode
        monkeypatch.setattr(Vision, "encode", lambda self, medium: Features(encode(self, medium).rows))
    model = tiny_vision_model(family)
    lm = kvloom.attach(model)
    with pytest.raises(kvloom.InvalidRequest, match="cannot be decoded on the cache"):
        lm.generate(prompt(model, *PROMPTS["one image"]))
    assert lm.generate([1, 2, 3], max_new_tokens=2).token_ids


def test_a_model_whose_image_tokens_see_later_ones_is_decoded_on_text_and_refuses_images() -> None:
    model = tiny_vision_model("gemma3")
    lm = kvloom.attach(model)
    text = prompt(model, 6)["input_ids"]
    assert (
        lm.generate(text, max_new_tokens=5).token_ids == reference("gemma3", {"input_ids": text}, max_new_tokens=5)[0]
    )
    with pytest.raises(kvloom.InvalidRequest, match="images of Gemma3ForConditionalGeneration cannot be decoded"):
        lm.generate(prompt(model, 5, SMALL, 3))


# ---- wrong use ---------------------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit_together_are_refused(lm: LanguageModel) -> None:
    inputs = prompt(model_of(lm), 5, WIDE, 7)
    twice = inputs | {name: torch.cat([inputs[name]] * 2) for name in ("pixel_values", "image_grid_thw")}
    with pytest.raises(kvloom.InvalidRequest, match="6 image placeholders, but its 2 images make 12 features"):
        lm.generate(twice)
    with pytest.raises(kvloom.InvalidRequest, match="cannot be split into single"):
        lm.generate(inputs | {"pixel_values": inputs["pixel_values"][:-1]})
    with pytest.raises(kvloom.InvalidRequest, match="without padding"):
        lm.generate(inputs | {"attention_mask": torch.zeros_like(inputs["attention_mask"])})
    with pytest.raises(kvloom.InvalidRequest, match="`input_features`"):
        lm.generate(inputs | {"input_features": torch.zeros(1)})
    with pytest.raises(kvloom.errors.ContextClosed, match="another model"):
        lm.generate(inputs, context=kvloom.attach(model_of(lm)).prefill(inputs))


def test_an_image_is_refused_by_a_text_model() -> None:
    import tiny

    lm = kvloom.attach(tiny.tiny_model("llama"))
    with pytest.raises(kvloom.InvalidRequest, match="takes no images"):
        lm.generate(prompt(tiny_vision_model("qwen2_vl"), 5, WIDE, 7))
