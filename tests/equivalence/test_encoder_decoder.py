"""Models that decode from a source: as transformers alone, with the source encoded once and stored once.

The reference is `generate` with `use_cache=False`: transformers sizes its own cache by the number of encoder layers,
and fails on models with more layers in the decoder, as the small ones here have.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

import kvloom
import tiny
from kvloom import CacheFull, InvalidRequest, LanguageModel, UnsupportedModel
from kvloom.models import AttentionInterfaceBinding, CacheInterfaceBinding

START = 2
TEXT_FAMILIES = tuple(family for family in tiny.ENCODER_DECODER_FAMILIES if family != "whisper")


@pytest.fixture(scope="module", params=tiny.ENCODER_DECODER_FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny.tiny_model(request.param)


@pytest.fixture
def lm(model: PreTrainedModel) -> LanguageModel:
    return kvloom.attach(model)


def sources_of(model: PreTrainedModel, *lengths: int) -> list[Any]:
    return [tiny.random_source(model, tokens=tokens, seed=tokens) for tokens in lengths]


def inputs(source: Any) -> Tensor:
    return torch.tensor([source]) if isinstance(source, list) else source[None]


def alone(model: PreTrainedModel, source: Any, **options: Any) -> Any:
    """transformers on a single source, with the details. Not Whisper's own `generate`, which is for long recordings."""
    options = {"do_sample": False, "use_cache": False, "output_scores": True} | options
    if "decoder_input_ids" in options:
        options["decoder_input_ids"] = torch.tensor([options["decoder_input_ids"]])
    return GenerationMixin.generate(model, inputs(source), return_dict_in_generate=True, **options)


def new_ids(result: Any, begun: int = 1) -> list[int]:
    return result.sequences[0, begun:].tolist()


# ---- parity ------------------------------------------------------------------------------------------------------


def test_the_binding_is_the_fastest_that_serves(model: PreTrainedModel, lm: LanguageModel) -> None:
    expected = CacheInterfaceBinding if model.config.model_type == "t5" else AttentionInterfaceBinding
    assert isinstance(lm.binding, expected)
    assert (lm.binding.reason or "passes `position_bias`").count("position_bias") == 1
    decoder_layers = 3
    assert len(lm.binding.layers) == 2 * decoder_layers
    assert sum(layer.reach.cross for layer in lm.binding.layers) == decoder_layers


def test_greedy_output_of_a_ragged_batch_is_that_of_each_source_alone(
    model: PreTrainedModel, lm: LanguageModel
) -> None:
    sources = sources_of(model, 3, 20, 33)
    outs = lm.generate(sources, max_new_tokens=30)
    for out, source in zip(outs, sources, strict=True):
        assert out.token_ids == new_ids(alone(model, source, max_new_tokens=30))
    firsts = [out.logprobs[0] for out in outs]
    assert min(abs(a - b) for a, b in combinations(firsts, 2)) > 1e-2, "another source makes a difference"


def test_beams_are_those_of_transformers(model: PreTrainedModel, lm: LanguageModel) -> None:
    sources = sources_of(model, 7, 40)
    ends = lm.generate(sources[0], max_new_tokens=6).token_ids[-1]
    for beams, options in (
        (4, {"length_penalty": 0.5}),
        (3, {"early_stopping": True, "eos_token_id": ends, "pad_token_id": 5}),
        (5, {"early_stopping": "never", "eos_token_id": [ends, 7], "length_penalty": -0.5}),
    ):
        options = {"num_beams": beams, "num_return_sequences": beams - 1, "max_new_tokens": 12, **options}
        for hypotheses, source in zip(lm.beam_search(sources, **options), sources, strict=True):
            expected = alone(model, source, **options)
            assert hypotheses.sequences.tolist() == expected.sequences.tolist()
            scores = torch.tensor([own.score for own in hypotheses])
            torch.testing.assert_close(scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)


def test_samples_are_those_of_the_uncached_model(model: PreTrainedModel, lm: LanguageModel) -> None:
    source = sources_of(model, 17)[0]
    options = {"do_sample": True, "top_k": 0, "seed": 5, "num_return_sequences": 4, "max_new_tokens": 12}
    cached, uncached = (lm.generate(source, use_cache=use, **options) for use in (True, False))
    assert [own.token_ids for own in cached] == [own.token_ids for own in uncached]
    assert len({tuple(own.token_ids) for own in cached}) > 1


def test_forced_decoder_tokens_begin_the_sequence(model: PreTrainedModel, lm: LanguageModel) -> None:
    source = sources_of(model, 17)[0]
    given = [START, 9, 30, 31]
    expected = new_ids(alone(model, source, decoder_input_ids=given, max_new_tokens=8), len(given))
    assert lm.generate(source, decoder_input_ids=given, max_new_tokens=8).token_ids == expected
    # Without the start token, transformers puts it before the others; but not for Whisper.
    out = lm.generate(source, decoder_input_ids=torch.tensor([given[1:]]), max_new_tokens=8)
    whisper = model.config.model_type == "whisper"
    assert out.usage.prompt_tokens == len(given) - whisper
    assert out.token_ids == new_ids(
        alone(model, source, decoder_input_ids=given[1:], max_new_tokens=8), len(given) - whisper
    )
    each = lm.generate([source, source], decoder_input_ids=[given, [START]], max_new_tokens=8)
    assert each[0].token_ids == expected
    assert each[1].token_ids == lm.generate(source, max_new_tokens=8).token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"forced_bos_token_id": 40},
        {"forced_eos_token_id": 41, "eos_token_id": 41},
        {"suppress_tokens": list(range(60)), "begin_suppress_tokens": [61, 62]},
        {"repetition_penalty": 1.6},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 4, "eos_token_id": 9},
        {"bad_words_ids": [[3], [17, 4]]},
        {"max_length": 9},
        {},
    ],
    ids=lambda options: next(iter(options), "default length"),
)
def test_options_mean_what_they_mean_in_transformers(options: dict[str, Any]) -> None:
    model = tiny.tiny_model("bart")
    lm = kvloom.attach(model)
    source = sources_of(model, 11)[0]
    length = {} if not options or "max_length" in options else {"max_new_tokens": 10}
    for beams in ({}, {"num_beams": 3}):
        expected = alone(model, source, **options, **length, **beams)
        got = lm.generate(source, **options, **length, **beams)
        assert got.token_ids == new_ids(expected)[: len(got.token_ids)]
        assert len(got.token_ids) == sum(token >= 0 for token in new_ids(expected))


def test_processors_that_look_at_the_encoders_input_are_given_the_source() -> None:
    model = tiny.tiny_model("marian")
    lm = kvloom.attach(model)
    source = list(range(0, 131, 2))
    for options in ({"encoder_no_repeat_ngram_size": 1}, {"encoder_repetition_penalty": 0.1}):
        expected = new_ids(alone(model, source, max_new_tokens=10, **options))
        assert lm.generate(source, max_new_tokens=10, **options).token_ids == expected
        assert expected != lm.generate(source, max_new_tokens=10).token_ids, "the option changes something"
    whisper = kvloom.attach(tiny.tiny_model("whisper"))
    with pytest.raises(InvalidRequest, match="features have none"):
        whisper.generate(sources_of(whisper.binding.model, 0)[0], encoder_no_repeat_ngram_size=1)


def test_bfloat16_models_verify(model: PreTrainedModel) -> None:
    twin = tiny.tiny_model(model.config.model_type, dtype=torch.bfloat16)
    assert kvloom.attach(twin).verify(max_new_tokens=4).ok


# ---- a source is encoded once ------------------------------------------------------------------------------------


def encoder_runs(model: PreTrainedModel) -> list[int]:
    """Grows by one with every run of the encoder."""
    runs: list[int] = []
    model.get_encoder().register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_a_source_is_encoded_once_for_all_that_decodes_from_it() -> None:
    model = tiny.tiny_model("bart")
    lm = kvloom.attach(model)
    runs = encoder_runs(model)
    first, second = sources_of(model, 35, 12)
    out = lm.beam_search(first, num_beams=6, num_return_sequences=6, max_new_tokens=10)[0]
    assert len(runs) == 1
    assert (out.usage.source_tokens, out.usage.computed_source_tokens) == (35, 35)
    # Three blocks of the source, held once for six beams.
    blocks = [len(group.pool.references[group.pool.references > 0]) for group in lm.engine.cache.groups]
    assert blocks[1] == 3
    again = lm.generate([first, second, first], max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert len(runs) == 2
    assert [own[0].usage.computed_source_tokens for own in again] == [0, 12, 0]
    lm.score([[3, 4], [5]], prompt=first)
    context = lm.prefill(second, decoder_input_ids=[START, 8, 9])
    lm.generate(context=context, max_new_tokens=3)
    assert len(runs) == 2
    lm.generate(first, use_cache=False, max_new_tokens=3)
    assert len(runs) == 5, "without a cache, every step encodes"


def test_a_source_is_encoded_anew_when_its_blocks_were_needed_or_the_weights_changed() -> None:
    model = tiny.tiny_model("bart")
    lm = kvloom.attach(model, budget_bytes=kvloom.attach(model).engine.cache.layout.bytes_per_row_of_blocks * 4)
    runs = encoder_runs(model)
    first, second = sources_of(model, 33, 34)
    expected = lm.generate(first, max_new_tokens=5).token_ids
    lm.generate(second, max_new_tokens=5)
    assert lm.generate(first, max_new_tokens=5).token_ids == expected
    assert len(runs) == 3
    lm.generate(first, max_new_tokens=5)
    assert len(runs) == 3
    model.model.encoder.layers[0].fc1.weight.mul_(2)
    changed = lm.generate(first, max_new_tokens=5)
    assert len(runs) == 4 and changed.usage.cached_prompt_tokens == 0
    assert changed.token_ids == lm.generate(first, max_new_tokens=5, use_cache=False).token_ids


def test_sources_that_begin_alike_share_nothing() -> None:
    model = tiny.tiny_model("t5")
    lm = kvloom.attach(model)
    long = tiny.random_ids(model, tokens=40)
    given = [START, *tiny.random_ids(model, tokens=33, seed=2)]
    for source in (long, long[:32], [*long[:39], 7]):
        out = lm.generate(source, decoder_input_ids=given, max_new_tokens=4)
        assert out.usage.computed_source_tokens == len(source) and out.usage.cached_prompt_tokens == 0
        assert (
            out.token_ids == lm.generate(source, decoder_input_ids=given, max_new_tokens=4, use_cache=False).token_ids
        )
    assert lm.generate(long, decoder_input_ids=given, max_new_tokens=4).usage.cached_prompt_tokens == 32


def test_a_plan_bounds_what_a_request_holds_and_nothing_leaks(lm: LanguageModel, model: PreTrainedModel) -> None:
    source = sources_of(model, 50)[0]
    tokens = lm.generate(source, max_new_tokens=1).usage.source_tokens
    plan = lm.plan(source_tokens=tokens, max_new_tokens=40, num_beams=4)
    assert plan.source_tokens == tokens
    assert [group.reach for group in plan.groups] == ["full attention", "cross-attention"]
    assert plan.groups[1].blocks == -(-tokens // 16) and plan.groups[1].apart_blocks == 4 * plan.groups[1].blocks
    out = lm.beam_search(source, num_beams=4, max_new_tokens=40)
    assert 0 < out[0].usage.peak_bytes <= plan.cache_bytes
    del out
    for group in lm.engine.cache.groups:
        assert group.pool.free + len(group.index.idle()) == group.pool.total


def test_a_source_that_cannot_fit_is_refused_before_it_is_encoded() -> None:
    model = tiny.tiny_model("bart")
    row = kvloom.attach(model).engine.cache.layout.bytes_per_row_of_blocks
    lm = kvloom.attach(model, budget_bytes=3 * row)
    runs = encoder_runs(model)
    source = sources_of(model, 60)[0]
    with pytest.raises(
        CacheFull, match=r"a source of 60 tokens and a 1-token prompt .* needs 4 blocks .* the pool has 3"
    ):
        lm.generate(source, max_new_tokens=3)
    assert not runs


def test_an_encoder_that_fails_leaves_nothing_behind() -> None:
    model = tiny.tiny_model("bart")
    lm = kvloom.attach(model)
    source = sources_of(model, 20)[0]

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.get_encoder().register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        lm.generate(source, max_new_tokens=3)
    handle.remove()
    assert [group.pool.referenced for group in lm.engine.cache.groups] == [0, 0]
    assert lm.generate(source, max_new_tokens=3).usage.computed_source_tokens == 20


# ---- contexts and scores -----------------------------------------------------------------------------------------


def test_contexts_hold_their_source(model: PreTrainedModel, lm: LanguageModel) -> None:
    source = sources_of(model, 25)[0]
    begun = [START, *tiny.random_ids(model, tokens=24, seed=8)]
    context = lm.prefill(source, decoder_input_ids=begun)
    assert context.tokens == 25 and context.source is not None
    expected = new_ids(alone(model, source, decoder_input_ids=[*begun, 6], max_new_tokens=6), 26)
    assert lm.generate([6], context=context, max_new_tokens=6).token_ids == expected
    cut = context.truncate(10)
    expected = new_ids(alone(model, source, decoder_input_ids=begun[:10], max_new_tokens=6), 10)
    out = lm.generate(context=cut, max_new_tokens=6)
    assert out.token_ids == expected
    extended = lm.extend(out.context, [11, 12])
    whole = model(
        **{model.main_input_name: inputs(source)}, decoder_input_ids=torch.tensor([extended.context.token_ids])
    ).logits[0, -2:]
    torch.testing.assert_close(extended.logits, whole, atol=1e-4, rtol=1e-4)


def test_scores_over_a_source_are_those_of_the_model(model: PreTrainedModel, lm: LanguageModel) -> None:
    source = sources_of(model, 25)[0]
    continuations = [[3, 4, 5, 6], [3, 4, 7], [9]]
    scores = lm.score(continuations, prompt=source)
    for own, score in zip(continuations, scores, strict=True):
        ids = torch.tensor([[START, *own]])
        logits = model(**{model.main_input_name: inputs(source)}, decoder_input_ids=ids).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(own)[:, None])[:, 0].tolist()
        assert score.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert scores.usage.computed_source_tokens == scores.usage.source_tokens
    assert lm.score(continuations, prompt=source).usage.computed_source_tokens == 0
    uncached = lm.score(continuations, prompt=source, use_cache=False)
    assert [own.logprob for own in uncached] == pytest.approx([own.logprob for own in scores], abs=1e-4)


def test_streams_decode_from_a_source() -> None:
    lm = kvloom.attach(tiny.tiny_model("t5"))
    with lm.stream([5, 6, 7], max_new_tokens=5) as pieces:
        streamed = [piece.token_id for piece in pieces]
    assert streamed == lm.generate([5, 6, 7], max_new_tokens=5).token_ids


# ---- refused -----------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused_in_one_sentence() -> None:
    lm = kvloom.attach(tiny.tiny_model("bart"))
    context = lm.prefill([5, 6])
    causal = kvloom.attach(tiny.tiny_model("llama"))
    for call, message in [
        (lambda: lm.generate(), "the first argument of an encoder-decoder model is its source, text or token ids"),
        (lambda: lm.generate([5, 500]), "token id 500 is outside the vocabulary"),
        (lambda: lm.generate([5] * 300), "the source has 300 tokens; the model's encoder reads 256"),
        (lambda: lm.generate([5], decoder_input_ids=[[1], [2]]), "has 2 sequences for 1 sources"),
        (lambda: lm.generate([[5], [6]], decoder_start_token_id=[1, 2, 3]), "names 3 tokens for 2 sources"),
        (lambda: lm.generate([5], context=context, decoder_input_ids=[1]), "a context has begun already"),
        (lambda: lm.extend(None, [5]), "decodes from a source: begin with"),
        (lambda: lm.generate([5], language="de"), "`language` is not supported: pass the tokens"),
        (lambda: causal.generate([5], decoder_input_ids=[1]), "only encoder-decoder models have them"),
        (lambda: causal.plan(source_tokens=5), "this model has no encoder"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            call()
    no_start = kvloom.attach(tiny.tiny_model("bart", decoder_start_token_id=None))
    with pytest.raises(InvalidRequest, match="the decoder's first token is not known"):
        no_start.generate([5])
    assert no_start.generate([5], decoder_input_ids=[START, 4], max_new_tokens=2).usage.prompt_tokens == 2


def test_features_must_be_as_the_encoder_reads_them() -> None:
    lm = kvloom.attach(tiny.tiny_model("whisper"))
    for features, message in [
        ([5, 6, 7], "this model's source is `input_features`"),
        ("text", "this model's source is `input_features`"),
        (torch.zeros(6, 41), "Longer recordings are for `kvloom.generate"),
        (torch.zeros(6, 39), "reads exactly 40. Let the feature extractor pad"),
        (torch.zeros(5, 40), r"of shape \[6, 40\]"),
        (torch.zeros(2, 6, 40), "Pass several sources as a list"),
        (torch.zeros(6, 40, dtype=torch.int64), "are floats"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            lm.generate(features)
    assert lm.generate(torch.zeros(1, 6, 40), max_new_tokens=2).usage.source_tokens == 20


def test_an_encoder_that_reads_something_else_is_refused() -> None:
    model = tiny.tiny_model("bart")
    model.main_input_name = "pixel_values"
    with pytest.raises(UnsupportedModel, match=r"reads `pixel_values`\. Sources are token ids, or"):
        kvloom.attach(model)
