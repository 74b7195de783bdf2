"""`kvloom.generate` returns what `model.generate` returns: sequences, scores, logits and beam indices."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, PreTrainedModel, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import kvloom
from counting import available_blocks
from kvloom.errors import EmptyPrompt, InvalidRequest, UnknownOption, UnsupportedOption
from tiny import left_padded, random_ids, tiny_model

FAMILIES = ("llama", "gpt2", "qwen2")
PAD = 0
NEW_TOKENS = 8
TOLERANCE = 1e-4
DETAILS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@cache
def model_named(family: str) -> PreTrainedModel:
    model = tiny_model(family)
    model.generation_config.pad_token_id = PAD
    return model


def frequent_tokens(model: PreTrainedModel, inputs: dict[str, Tensor], count: int) -> list[int]:
    """The tokens that this batch generates most: as EOS ids they end some sequences early."""
    sequences = model.generate(**inputs, max_new_tokens=NEW_TOKENS, num_beams=4, num_return_sequences=4)
    counts = Counter(sequences[:, inputs["input_ids"].shape[1] :].flatten().tolist())
    return [token for token, _ in counts.most_common(count)]


def both(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> tuple[Any, Any]:
    options = {"max_new_tokens": NEW_TOKENS, **options}
    return model.generate(**inputs, **options), kvloom.generate(model, **inputs, **options)


def assert_rows_are_equal(theirs: tuple[Tensor, ...], ours: tuple[Tensor, ...], live: list[list[bool]]) -> None:
    """Equal where a row is live, zeros where it is not. `live`: [steps][rows]."""
    assert len(ours) == len(live)
    for step, rows in enumerate(live):
        assert ours[step].shape == theirs[step].shape
        index = torch.tensor(rows)
        torch.testing.assert_close(ours[step][index], theirs[step][index], atol=TOLERANCE, rtol=TOLERANCE)
        assert not ours[step][~index].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_sequences_of_a_padded_batch_are_those_of_transformers(family: str) -> None:
    model = model_named(family)
    inputs = left_padded(model, 9, 5, 1)
    for ends in (None, frequent_tokens(model, inputs, 2)):
        theirs, ours = both(model, inputs, eos_token_id=ends)
        assert ours.tolist() == theirs.tolist()
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_details_are_those_of_transformers(family: str) -> None:
    model = model_named(family)
    inputs = left_padded(model, 9, 5)
    free = model.generate(**inputs, max_new_tokens=NEW_TOKENS, repetition_penalty=1.3)[:, 9:].tolist()
    length = next(n for n in range(1, NEW_TOKENS) if free[0][n - 1] not in (*free[0][: n - 1], *free[1]))
    options = {"repetition_penalty": 1.3, "eos_token_id": free[0][length - 1]}
    theirs, ours = both(model, inputs, **options, **DETAILS)
    assert type(ours) is type(theirs)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    live = [[step < length, True] for step in range(NEW_TOKENS)]
    assert_rows_are_equal(theirs.logits, ours.logits, live)
    for own, their in zip(ours.scores, theirs.scores, strict=True):
        # In the padded row transformers penalises PAD as if the sequence held it.
        their[1, PAD] = own[1, PAD]
    assert_rows_are_equal(theirs.scores, ours.scores, live)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [3, 4])
def test_beams_of_a_padded_batch_are_those_of_transformers(family: str, beams: int) -> None:
    model = model_named(family)
    inputs = left_padded(model, 9, 5, 7)
    ends = frequent_tokens(model, inputs, 8)
    lengths = set()
    for end in (None, ends[0], ends[2:5], ends):
        for returned, early in ((1, False), (2, True), (beams, "never")):
            options = {
                "num_beams": beams,
                "num_return_sequences": returned,
                "early_stopping": early,
                "eos_token_id": end,
            }
            theirs, ours = both(model, inputs, **options, **DETAILS)
            assert ours.sequences.tolist() == theirs.sequences.tolist(), options
            assert ours.beam_indices.tolist() == theirs.beam_indices.tolist(), options
            assert ours.beam_indices.dtype == theirs.beam_indices.dtype
            torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, atol=TOLERANCE, rtol=TOLERANCE)
            transitions = [
                model.compute_transition_scores(o.sequences, o.scores, o.beam_indices) for o in (theirs, ours)
            ]
            torch.testing.assert_close(*transitions, atol=TOLERANCE, rtol=TOLERANCE)
            lengths |= {int((row >= 0).sum()) for row in ours.beam_indices}
    assert len(lengths) > 2, "hypotheses should end at different lengths"


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_logits_of_all_running_beams_are_those_of_transformers(family: str) -> None:
    model = model_named(family)
    inputs = left_padded(model, 9)
    options = {"num_beams": 3, "eos_token_id": frequent_tokens(model, inputs, 2), "no_repeat_ngram_size": 2}
    theirs, ours = both(model, inputs, **options, **DETAILS)
    live = [[True] * 3] * len(theirs.scores)
    assert_rows_are_equal(theirs.scores, ours.scores, live)
    assert_rows_are_equal(theirs.logits, ours.logits, live)


def test_rows_of_prompts_whose_search_has_ended_are_zeros() -> None:
    model = model_named("llama")
    inputs = left_padded(model, 9, 5, 7)
    ends = frequent_tokens(model, inputs, 12)
    for count in range(2, 12):
        options = {"num_beams": 3, "early_stopping": True, "eos_token_id": ends[:count]}
        theirs, ours = both(model, inputs, **options, **DETAILS)
        live = [[bool(row.any()) for row in step] for step in ours.scores]
        if not all(map(all, live)):
            ended = [[not row for row in step] for step in live]
            assert all(now <= later for step, then in pairwise(ended) for now, later in zip(step, then, strict=True))
            assert_rows_are_equal(theirs.scores[: len(live)], ours.scores, live)
            return
    pytest.fail("no search ended before the others")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_details_that_were_not_asked_for_are_left_out(options: dict[str, Any]) -> None:
    model = model_named("llama")
    inputs = left_padded(model, 6, 4)
    theirs, ours = both(model, inputs, return_dict_in_generate=True, **options)
    assert type(ours) is type(theirs)
    assert ours.scores is None and ours.logits is None
    assert ours.sequences.shape == theirs.sequences.shape
    tensor = kvloom.generate(model, **inputs, max_new_tokens=2, output_scores=True, output_logits=True, **options)
    assert isinstance(tensor, Tensor), "without return_dict_in_generate there is nothing to keep details for"


def test_padding_is_inferred_from_pad_ids_as_in_transformers() -> None:
    model = model_named("llama")
    inputs = left_padded(model, 9, 5)
    del inputs["attention_mask"]
    theirs, ours = both(model, inputs)
    assert ours.tolist() == theirs.tolist()
    # A PAD that also ends sequences hides nothing.
    theirs, ours = both(model, inputs, eos_token_id=PAD)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_lengths_count_the_padding_as_in_transformers(beams: int) -> None:
    model = model_named("llama")
    inputs = left_padded(model, 9, 5)
    ends = frequent_tokens(model, inputs, 6)
    for lengths in (
        {"max_length": 13},
        {"max_length": 15, "min_length": 12},
        {"max_new_tokens": 6, "min_new_tokens": 4},
        {"max_new_tokens": 4, "min_length": 7},
        {"max_new_tokens": 6, "min_length": -1, "min_new_tokens": -1, "no_repeat_ngram_size": -1},
        {},
    ):
        options = {"max_new_tokens": None, "num_beams": beams, "eos_token_id": ends, **lengths}
        theirs, ours = both(model, inputs, **options)
        assert ours.tolist() == theirs.tolist(), lengths


def test_a_generation_config_is_taken_and_the_models_own_fills_it_up() -> None:
    model = model_named("llama")
    inputs = left_padded(model, 9, 5)
    config = GenerationConfig(num_beams=3, max_new_tokens=5, return_dict_in_generate=True, output_scores=True)
    theirs = model.generate(**inputs, generation_config=config)
    ours = kvloom.generate(model, **inputs, generation_config=config)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, atol=TOLERANCE, rtol=TOLERANCE)


def test_inputs_may_be_positional_or_missing() -> None:
    model = model_named("gpt2")
    inputs = left_padded(model, 6)["input_ids"]
    assert (
        kvloom.generate(model, inputs, max_new_tokens=3).tolist() == model.generate(inputs, max_new_tokens=3).tolist()
    )
    options = {"bos_token_id": 7, "max_new_tokens": 3}
    assert kvloom.generate(model, **options).tolist() == model.generate(**options).tolist()


def test_use_cache_false_gives_the_same() -> None:
    model = model_named("qwen2")
    theirs, ours = both(model, left_padded(model, 9, 5), use_cache=False, num_beams=3)
    assert ours.tolist() == theirs.tolist()


def test_samples_follow_the_global_seed_and_differ_between_prompts() -> None:
    model = model_named("llama")
    row = left_padded(model, 6)["input_ids"]
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 12, "top_k": 0}

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return kvloom.generate(model, row.repeat(2, 1), num_return_sequences=2, **options).tolist()

    with torch.random.fork_rng(devices=[]):
        assert sample(1) == sample(1)
        assert sample(1) != sample(2)
        assert len({tuple(own) for own in sample(1)}) == 4


def test_scores_of_samples_are_those_that_the_tokens_were_drawn_by() -> None:
    model = model_named("llama")
    inputs = left_padded(model, 6, 4)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 5, "num_return_sequences": 2, "max_new_tokens": 4}
    with torch.random.fork_rng(devices=[]):
        out = kvloom.generate(model, **inputs, **options, **DETAILS)
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        assert scores.shape == (4, model.config.vocab_size)
        kept = scores > -torch.inf
        assert (kept.sum(dim=1) == 5).all()
        torch.testing.assert_close(scores[kept], (logits / 0.7)[kept])
        assert kept[torch.arange(4), out.sequences[:, 6 + step]].all()


@pytest.mark.parametrize("beams", [1, 3])
def test_allowed_tokens_are_asked_for_each_prompt(beams: int) -> None:
    model = model_named("llama")

    def allowed(prompt: int, token_ids: Tensor) -> list[int]:
        return [11, 12, 13, int(token_ids[-1])] if prompt else [21, 22, 23, 24, 25]

    theirs, ours = both(model, left_padded(model, 6, 6), prefix_allowed_tokens_fn=allowed, num_beams=beams)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"forced_eos_token_id": 40},
        {"forced_bos_token_id": 41},
        {"forced_eos_token_id": 40, "num_beams": 3},
        {"remove_invalid_values": True, "num_beams": 3},
        {"remove_invalid_values": True, "forced_eos_token_id": 40},
    ],
)
def test_forced_tokens_come_where_they_are_not_allowed(options: dict[str, Any]) -> None:
    model = model_named("llama")
    theirs, ours = both(
        model, left_padded(model, 1), prefix_allowed_tokens_fn=lambda *_: [11, 12], **options, **DETAILS
    )
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for step, scores in enumerate(theirs.scores):
        torch.testing.assert_close(ours.scores[step], scores, atol=TOLERANCE, rtol=TOLERANCE)


def test_processors_of_the_caller_run() -> None:
    class Forbids(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.index_fill(1, input_ids[0, -1:], -torch.inf)

    model = model_named("llama")
    theirs, ours = both(model, left_padded(model, 6), logits_processor=[Forbids()])
    assert ours.tolist() == theirs.tolist()


class Recorded(BaseStreamer):
    def __init__(self) -> None:
        self.told: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.told.append(value.tolist())

    def end(self) -> None:
        self.told.append("end")


def test_a_streamer_hears_what_transformers_tells_it() -> None:
    model = model_named("llama")
    inputs = left_padded(model, 6)
    ends = frequent_tokens(model, inputs, 1)
    theirs, ours = Recorded(), Recorded()
    model.generate(**inputs, streamer=theirs, max_new_tokens=5, eos_token_id=ends)
    kvloom.generate(model, **inputs, streamer=ours, max_new_tokens=5, eos_token_id=ends)
    assert ours.told == theirs.told
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(UnsupportedOption, match="`streamer`"):
            kvloom.generate(model, **inputs, streamer=ours, max_new_tokens=5, **options)


def test_a_text_streamer_of_transformers_works() -> None:
    lm = kvloom.load()
    inputs = lm.tokenizer("Once upon a time", return_tensors="pt")
    streamer = TextIteratorStreamer(lm.tokenizer, skip_prompt=True)
    out = kvloom.generate(lm, inputs.input_ids, streamer=streamer, max_new_tokens=6, do_sample=False)
    assert "".join(streamer) == lm.tokenizer.decode(out[0, inputs.input_ids.shape[1] :])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_transformers_is_continued_and_filled_as_transformers_does(family: str) -> None:
    model = model_named(family)
    first = left_padded(model, 12)["input_ids"]
    caches = []
    for generate in (model.generate, lambda *own, **options: kvloom.generate(model, *own, **options)):
        past = DynamicCache(config=model.config)
        out = generate(first, past_key_values=past, max_new_tokens=5, return_dict_in_generate=True)
        assert out.past_key_values is past
        longer = torch.cat([out.sequences, torch.tensor([[5, 6, 7]])], dim=1)
        caches.append((generate(longer, past_key_values=past, max_new_tokens=4).tolist(), past))
    (expected, theirs), (got, ours) = caches
    assert got == expected
    assert ours.get_seq_length() == theirs.get_seq_length() == 12 + 5 + 3 + 4 - 1
    for own, their in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(own.keys, their.keys, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(own.values, their.values, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_tuple_of_keys_and_values_and_a_streamer_go_together() -> None:
    model = model_named("llama")
    token_ids = left_padded(model, 12)["input_ids"]
    cache = model(token_ids[:, :9], past_key_values=DynamicCache(config=model.config)).past_key_values
    past = tuple((layer.keys, layer.values) for layer in cache.layers)
    plain = kvloom.generate(model, token_ids, max_new_tokens=5)
    options = {"max_new_tokens": 5, "streamer": Recorded(), "return_dict_in_generate": True}
    out = kvloom.generate(model, token_ids, past_key_values=past, **options)
    assert out.sequences.tolist() == plain.tolist()
    assert out.past_key_values.get_seq_length() == 16
    assert cache.get_seq_length() == 9, "the caller's tensors are as they were"


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}, {"use_cache": False}]
)
def test_a_cache_that_could_not_be_given_back_is_refused_by_name(options: dict[str, Any]) -> None:
    model = model_named("llama")
    with pytest.raises(UnsupportedOption, match="`past_key_values` is not supported"):
        kvloom.generate(model, **left_padded(model, 5), past_key_values=DynamicCache(), **options)
    with pytest.raises(UnsupportedOption, match="`past_key_values` is not supported"):
        kvloom.generate(model, **left_padded(model, 5, 3), past_key_values=DynamicCache())
    window = tiny_model("mistral")
    with pytest.raises(UnsupportedOption, match="`past_key_values`"):
        kvloom.generate(window, **left_padded(window, 5), past_key_values=DynamicCache())
    prompt = left_padded(model, 5)
    whole = model(**prompt, past_key_values=DynamicCache()).past_key_values
    with pytest.raises(UnsupportedOption, match="of the first tokens of a prompt, and this one holds all 5"):
        kvloom.generate(model, **prompt, past_key_values=whole)
    assert whole.get_seq_length() == 5


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("assistant_model", object()),
        ("penalty_alpha", 0.6),
        ("inputs_embeds", torch.zeros(1, 3, 48)),
        ("position_ids", torch.arange(3)[None]),
        ("cache_implementation", "static"),
        ("logits_to_keep", 3),
        ("labels", torch.zeros(1, 3)),
        ("seed", 3),
        ("retention", None),
        ("decoder_input_ids", torch.zeros(1, 3)),
        ("negative_prompt_ids", torch.zeros(1, 3)),
    ],
)
def test_an_unsupported_argument_is_refused_by_name(name: str, value: Any) -> None:
    model = model_named("llama")
    with pytest.raises(UnsupportedOption, match=f"`{name}` is not supported"):
        kvloom.generate(model, **left_padded(model, 3), **{name: value})


def test_an_argument_that_does_not_exist_is_an_error_with_a_suggestion() -> None:
    model = model_named("llama")
    with pytest.raises(UnknownOption, match="Did you mean `num_beams`"):
        kvloom.generate(model, **left_padded(model, 3), num_beam=3)


def test_arguments_that_are_none_change_nothing() -> None:
    model = model_named("llama")
    inputs = left_padded(model, 5)
    plain = kvloom.generate(model, **inputs, max_new_tokens=3)
    none = dict.fromkeys(("position_ids", "past_key_values", "streamer", "assistant_model", "labels", "synced_gpus"))
    assert kvloom.generate(model, **inputs, max_new_tokens=3, **none).tolist() == plain.tolist()


@pytest.mark.parametrize("hidden", [[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 1]])
def test_padding_elsewhere_than_on_the_left_is_refused(hidden: list[int]) -> None:
    model = model_named("llama")
    inputs = left_padded(model, 4)["input_ids"]
    with pytest.raises(InvalidRequest, match="padding_side='left'"):
        kvloom.generate(model, inputs, attention_mask=torch.tensor([hidden]))


def test_inputs_of_a_wrong_shape_or_type_are_refused() -> None:
    model = model_named("llama")
    good = left_padded(model, 4)["input_ids"]
    for bad in (good[0], good.float(), good.tolist(), good[:, :0], good[:0], "text"):
        with pytest.raises(InvalidRequest):
            kvloom.generate(model, bad)
    with pytest.raises(EmptyPrompt):
        kvloom.generate(model, good, attention_mask=torch.zeros_like(good))
    for mask in (good[:, :2], good * 0 + 2, [1, 1, 1, 1]):
        with pytest.raises(InvalidRequest, match="attention_mask"):
            kvloom.generate(model, good, attention_mask=mask)
    with pytest.raises(InvalidRequest, match="the same argument"):
        kvloom.generate(model, good, input_ids=good)
    with pytest.raises(InvalidRequest, match="LanguageModel"):
        kvloom.generate(lambda token_ids: token_ids, good)


def test_caches_of_encoder_decoder_models_are_refused() -> None:
    lm = kvloom.attach(tiny_model("t5"))
    source = torch.tensor([[5, 6, 7]])
    with pytest.raises(UnsupportedOption, match="`past_key_values` is not supported"):
        kvloom.generate(lm, source, past_key_values=DynamicCache())
    context = lm.prefill([1, 2, 3])
    with pytest.raises(InvalidRequest, match="encoder-decoder"):
        context.export_cache()
    with pytest.raises(InvalidRequest, match="encoder-decoder"):
        lm.import_cache([1, 2], DynamicCache())
    seen = lm.inspect(context)
    assert [seen.keys(layer).shape[1] for layer in (0, 3)] == [context.cached_tokens, 3]


# ---- how a model is remembered ----------------------------------------------------------------------------------


def test_a_model_is_attached_once_and_forgotten_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvloom.dropin import remembering

    attached = []
    monkeypatch.setattr(remembering, "attach", lambda model: attached.append(kvloom.attach(model)) or attached[-1])
    model = tiny_model("llama")
    inputs = left_padded(model, 5)
    first = kvloom.generate(model, **inputs, max_new_tokens=3)
    assert kvloom.generate(model, **inputs, max_new_tokens=3).tolist() == first.tolist()
    assert len(attached) == 1
    gone = weakref.ref(model)
    attached.clear()
    del model
    gc.collect()
    assert gone() is None


def test_copies_and_pickles_of_a_model_remember_nothing() -> None:
    model = tiny_model("gpt2")
    inputs = left_padded(model, 5)
    kvloom.generate(model, **inputs, max_new_tokens=2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.get_input_embeddings().weight.mul_(-1.5)
        assert kvloom.generate(other, **inputs).tolist() == other.generate(**inputs).tolist()
    assert kvloom.generate(model, **inputs).tolist() == model.generate(**inputs).tolist()


def test_a_model_that_has_changed_its_dtype_is_attached_again() -> None:
    model = tiny_model("llama")
    inputs = left_padded(model, 5)
    kvloom.generate(model, **inputs, max_new_tokens=2)
    model.double()
    assert kvloom.generate(model, **inputs).tolist() == model.generate(**inputs).tolist()


def test_a_generation_keeps_the_scores_along_its_own_path() -> None:
    lm = kvloom.attach(model_named("llama"))
    prompt = random_ids(lm.binding.model, tokens=7)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "no_repeat_ngram_size": 2}):
        found = lm.generate(prompt, max_new_tokens=6, output_scores=True, **options)
        for own in found if options else [found]:
            chosen = own.scores[torch.arange(6), own.token_ids]
            if options:
                torch.testing.assert_close(chosen.sum(), torch.tensor(own.score), atol=TOLERANCE, rtol=TOLERANCE)
            else:
                assert chosen.tolist() == own.scores.amax(dim=1).tolist()
    assert lm.generate(prompt, max_new_tokens=2).scores is None


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}])
def test_keeping_scores_changes_no_token_in_bfloat16(options: dict[str, Any]) -> None:
    # Without scores the decoders take a short cut.
    lm = kvloom.attach(tiny_model("llama", dtype=torch.bfloat16))
    prompt = random_ids(lm.binding.model, tokens=9)
    plain, kept = (lm.generate(prompt, max_new_tokens=8, output_scores=keep, **options) for keep in (False, True))
    assert kept.token_ids == plain.token_ids


def test_a_conversation_passed_as_a_whole_computes_its_new_tokens_only() -> None:
    lm = kvloom.attach(model_named("llama"))
    computed: list[int] = []
    lm.engine.listeners.append(lambda event: computed.append(getattr(event, "prompt_tokens", 0)))
    first = kvloom.generate(lm, left_padded(lm.binding.model, 40)["input_ids"], max_new_tokens=24)
    computed.clear()
    kvloom.generate(lm, torch.cat([first, torch.tensor([[5, 6, 7]])], dim=1), max_new_tokens=4)
    # 67 tokens, of which the full blocks of the 63 that were run are known.
    assert sum(computed) == 67 - 48


def test_nothing_is_held_after_a_call() -> None:
    lm = kvloom.attach(model_named("llama"))
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        kvloom.generate(lm, **left_padded(lm.binding.model, 20, 30), max_new_tokens=20, **options)
    assert available_blocks(lm.engine.cache) == lm.engine.cache.blocks
