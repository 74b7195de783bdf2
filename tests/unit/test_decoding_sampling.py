"""Greedy decoding and sampling, driven by a small model's own uncached forward or by made-up logits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from driver import assert_raw_results, drive
from kvloom.decoding import HostStep, Hypothesis, make_decoder, resolve, sample_seed, to_host
from kvloom.decoding.randomness import Uniforms
from kvloom.errors import EmptyPrompt, InvalidRequest
from kvloom.native.draw import invert_cdf
from tiny import random_ids, tiny_model

VOCAB = 131


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1)


def decoder_for(options: dict[str, Any], prompt: list[int], *, vocab: int = VOCAB, **extra: Any) -> Any:
    resolved = resolve(None, None, {"max_new_tokens": 8} | options)
    return make_decoder(resolved, prompt, vocab_size=vocab, device="cpu", **extra)


def decode(model: PreTrainedModel, prompt: list[int], *, processors: Any = None, **options: Any) -> list[Hypothesis]:
    return drive(model, decoder_for(options, prompt, logits_processor=processors), prompt, apart=True)


def texts(found: list[Hypothesis]) -> list[list[int]]:
    return [hypothesis.token_ids for hypothesis in found]


# ---- greedy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 1, "length_penalty": 1.0},
        {"min_new_tokens": 6},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[60]], "suppress_tokens": [61]},
        {"max_new_tokens": 1},
        {"max_length": 10, "max_new_tokens": None},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_greedy_decodes_what_transformers_decodes(model: PreTrainedModel, options: dict[str, Any]) -> None:
    reasons = Counter[str]()
    for seed in range(4):
        prompt = random_ids(model, tokens=5, seed=seed)
        free = decode(model, prompt)[0].token_ids
        for eos in (None, free[2], [free[4], free[7]]):
            merged = {"max_new_tokens": 8, "eos_token_id": eos, "pad_token_id": 2} | options
            token_ids = torch.tensor([prompt])
            mask = torch.ones_like(token_ids)
            theirs = model.generate(token_ids, attention_mask=mask, use_cache=False, **merged)
            ours = decode(model, prompt, **merged)
            assert prompt + ours[0].token_ids == theirs[0].tolist()
            reasons[ours[0].finish_reason] += 1
            assert ours[0].score is None
    assert reasons["length"] and (reasons["eos"] or options.get("max_new_tokens") == 1)


def test_a_sequence_reports_its_raw_logprobs_logits_and_alternatives(model: PreTrainedModel) -> None:
    prompt = random_ids(model, tokens=6)
    extras = {"output_logits": True, "top_logprobs": 4, "repetition_penalty": 1.8}
    for options in (extras, extras | {"do_sample": True, "seed": 1, "num_return_sequences": 3, "eos_token_id": 4}):
        for found in decode(model, prompt, **options):
            assert_raw_results(model, prompt, found, top=4)


# ---- seeds ---------------------------------------------------------------------------------------------------


def test_a_sample_is_the_same_alone_and_among_others(model: PreTrainedModel) -> None:
    prompt = random_ids(model, tokens=5)
    options = {"do_sample": True, "temperature": 1.5, "eos_token_id": [7, 80, 90]}
    together = decode(model, prompt, num_return_sequences=4, seed=11, **options)
    for index, found in enumerate(together):
        alone = decode(model, prompt, seed=sample_seed(11, index), **options)
        assert (found.token_ids, found.logprobs) == (alone[0].token_ids, alone[0].logprobs)
    assert len({tuple(found.token_ids) for found in together}) == 4


def test_sample_seeds_never_change_between_releases() -> None:
    assert [sample_seed(7, index) for index in range(3)] == [7, 16966735830609695309, 6136498114798927888]


def test_the_numbers_of_a_sample_do_not_depend_on_its_neighbours_or_on_asking_twice() -> None:
    alone, among = Uniforms([5], torch.device("cpu")), Uniforms([4, 5, 6], torch.device("cpu"))
    for step in (0, 0, 1, 63, 64, 64, 200):
        assert alone.at(step)[0] == among.at(step)[1]
    assert among.at(200)[0] != among.at(200)[1]


def test_without_a_seed_every_call_draws_afresh_and_tells_its_seed(model: PreTrainedModel) -> None:
    options = {"do_sample": True, "temperature": 3.0}
    first, second = decoder_for(options, [1, 2]), decoder_for(options, [1, 2])
    found = [drive(model, decoder, [1, 2])[0].token_ids for decoder in (first, second)]
    assert found[0] != found[1]
    assert decode(model, [1, 2], seed=first.seed, **options)[0].token_ids == found[0]


def test_a_seed_does_not_touch_the_global_random_state(model: PreTrainedModel) -> None:
    before = torch.get_rng_state()
    for beams in (1, 3):
        decode(model, [1, 2], do_sample=True, seed=3, num_beams=beams)
    assert torch.equal(before, torch.get_rng_state())


# ---- drawing -------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    scores = torch.tensor([[1.0, -torch.inf, 0.0, 2.0, -1.0]])
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, possible = invert_cdf(scores.expand(20_000, -1), uniforms)
    shares = torch.bincount(tokens, minlength=5) / 20_000
    torch.testing.assert_close(shares, scores[0].softmax(-1), rtol=0, atol=0.01)
    assert possible.all() and shares[1] == 0


@given(st.data())
def test_a_token_of_probability_zero_is_never_drawn(data: st.DataObject) -> None:
    value = st.one_of(st.just(-float("inf")), st.floats(-60, 60, width=32))
    scores = torch.tensor([data.draw(st.lists(value, min_size=1, max_size=40))])
    edge = st.sampled_from([0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
    number = data.draw(st.one_of(edge, st.floats(0, 1, exclude_max=True)))
    tokens, possible = invert_cdf(scores, torch.tensor([number], dtype=torch.float64))
    assert possible.item() == bool((scores > -torch.inf).any())
    if possible:
        assert scores.double().softmax(-1)[0, tokens] > 0


def test_a_prefix_sum_that_is_not_monotone_cannot_draw_a_token_of_probability_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = Tensor.cumsum

    def parallel(self: Tensor, dim: int) -> Tensor:
        # As a GPU may sum: in another order for every place, so that an empty place seems to add a little.
        return exact(self, dim) + 1e-3 * (self == 0)

    monkeypatch.setattr(Tensor, "cumsum", parallel)
    scores = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    for number in (0.0, 0.5, 0.5002, 0.9999):
        tokens, _ = invert_cdf(scores, torch.tensor([number], dtype=torch.float64))
        assert tokens.item() in (0, 2)


@given(top_k=st.integers(1, 12), top_p=st.floats(0.05, 1.0), seed=st.integers(0, 2**32))
def test_samples_come_from_the_top_k_and_top_p_tokens_alone(top_k: int, top_p: float, seed: int) -> None:
    logits = 3 * torch.randn(1, 30, generator=torch.Generator().manual_seed(seed))
    options = {"do_sample": True, "top_k": top_k, "top_p": top_p, "num_return_sequences": 20, "seed": seed}
    decoder = decoder_for(options, [1], vocab=30)
    likeliest = logits[0].topk(top_k)
    kept = likeliest.values.softmax(-1)
    # A token stays if those before it do not yet add up to top_p; the slack covers rounding.
    support = likeliest.indices[kept.cumsum(0) - kept <= top_p + 1e-4].tolist()
    assert set(decoder.decide(logits).tokens.tolist()) <= set(support)


def test_rows_finish_independently_and_leave(model: PreTrainedModel) -> None:
    prompt = random_ids(model, tokens=4)
    options = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 6, "seed": 2}
    free = decode(model, prompt, **options)
    eos = [free[1].token_ids[1], free[4].token_ids[3]]
    decoder = decoder_for(options | {"eos_token_id": eos, "pad_token_id": 9}, prompt)
    found = drive(model, decoder, prompt)
    for before, after in zip(free, found, strict=True):
        ends = [place for place, token in enumerate(before.token_ids) if token in eos]
        assert after.token_ids == before.token_ids[: ends[0] + 1 if ends else None]
        assert after.finish_reason == ("eos" if ends else "length")
    assert len({len(hypothesis.token_ids) for hypothesis in found}) > 1
    filled = [prompt + tokens + [9] * (8 - len(tokens)) for tokens in texts(found)]
    assert decoder.sequences().tolist() == filled


def test_a_logprob_is_the_same_bits_alone_and_in_a_batch() -> None:
    logits = 5 * torch.randn(7, 151, generator=torch.Generator().manual_seed(1))
    decoder = decoder_for({"do_sample": True, "num_return_sequences": 7, "seed": 1}, [1], vocab=151)
    step = decoder.decide(logits[:1])
    decoder.advance(step, to_host([step])[0])
    together = decoder.decide(logits)
    for row in range(7):
        alone = logits[row : row + 1].log_softmax(-1)[0, together.tokens[row]]
        assert together.logprobs[row] == alone


# ---- decide changes nothing ----------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.2},
    {"do_sample": True, "seed": 5, "num_return_sequences": 3},
    {"num_beams": 3, "num_return_sequences": 3},
    {"num_beams": 3, "do_sample": True, "seed": 5},
]
KIND_NAMES = ["greedy", "sampling", "beams", "beam sampling"]


@pytest.mark.parametrize("options", KINDS, ids=KIND_NAMES)
def test_deciding_twice_gives_the_same_and_changes_nothing(model: PreTrainedModel, options: dict[str, Any]) -> None:
    class Twice:
        def __init__(self, decoder: Any) -> None:
            self.decoder = decoder

        def __getattr__(self, name: str) -> Any:
            return getattr(self.decoder, name)

        def decide(self, logits: Tensor) -> Any:
            kept = logits.clone()
            first, second = self.decoder.decide(logits), self.decoder.decide(logits)
            assert to_host([first]) == to_host([second])
            assert torch.equal(logits, kept)
            return second

    prompt = random_ids(model, tokens=5)
    twice: Any = Twice(decoder_for(options, prompt))
    assert drive(model, twice, prompt) == decode(model, prompt, **options)


@pytest.mark.parametrize("options", KINDS, ids=KIND_NAMES)
def test_a_processor_that_writes_into_the_scores_changes_no_reported_number(options: dict[str, Any]) -> None:
    write = [lambda input_ids, scores: scores.sub_(2.0)]
    plain, written = (decoder_for(options | {"top_logprobs": 3}, [1, 2], logits_processor=p) for p in (None, write))
    for turn in range(3):
        logits = torch.randn(plain.rows, VOCAB, generator=torch.Generator().manual_seed(turn))
        kept = logits.clone()
        steps = [decoder.decide(logits) for decoder in (plain, written)]
        assert torch.equal(steps[0].logprobs, steps[1].logprobs) and torch.equal(logits, kept)
        assert torch.equal(steps[0].record.extras.top_logprobs, steps[1].record.extras.top_logprobs)
        for decoder, step in zip((plain, written), steps, strict=True):
            decoder.advance(step, to_host([step])[0])


class Fails:
    """Raises on every third call, after it has spoilt the scores."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 3 == 0:
            scores.fill_(0.0)
            raise RuntimeError("a processor of the user's")
        return scores


@pytest.mark.parametrize("options", KINDS, ids=KIND_NAMES)
def test_a_raising_processor_leaves_the_decoder_as_it_was(model: PreTrainedModel, options: dict[str, Any]) -> None:
    class Again:
        def __init__(self, decoder: Any) -> None:
            self.decoder = decoder
            self.failures = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.decoder, name)

        def decide(self, logits: Tensor) -> Any:
            try:
                return self.decoder.decide(logits)
            except RuntimeError:
                self.failures += 1
                return self.decoder.decide(logits)

    prompt = random_ids(model, tokens=5)
    again: Any = Again(decoder_for(options, prompt, logits_processor=[Fails()]))
    assert drive(model, again, prompt) == decode(model, prompt, **options)
    assert again.failures >= 2


@pytest.mark.parametrize("options", KINDS, ids=KIND_NAMES)
def test_deciding_never_waits_for_the_device(options: dict[str, Any]) -> None:
    # Tensors on the meta device have no values: whoever needs one on the host fails.
    resolved = resolve(None, None, {"eos_token_id": [3, 4], "min_new_tokens": 1, "top_logprobs": 2} | options)
    decoder = make_decoder(resolved, [1, 2, 3], vocab_size=VOCAB, device="meta")
    for _ in range(3):
        step = decoder.decide(torch.empty(decoder.rows, VOCAB, device="meta"))
        rows = step.tokens.shape[0]
        host = HostStep(tokens=[9] * rows, parents=[0] * rows, finished=[False] * rows, logprobs=[-1.0] * rows)
        decoder.advance(step, host)


# ---- numbers that are none -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS, ids=KIND_NAMES)
def test_nan_logits_show_as_a_nan_logprob(options: dict[str, Any]) -> None:
    logits = torch.randn(1, 20)
    logits[0, 3] = torch.nan
    assert decoder_for(options, [1, 2], vocab=20).decide(logits).logprobs.isnan().all()


@pytest.mark.parametrize("options", KINDS[:2], ids=KIND_NAMES[:2])
def test_a_vocabulary_forbidden_altogether_shows_as_a_nan_logprob(options: dict[str, Any]) -> None:
    forbid = [lambda input_ids, scores: torch.full_like(scores, -torch.inf)]
    step = decoder_for(options, [1, 2], vocab=20, logits_processor=forbid).decide(torch.randn(1, 20))
    assert step.logprobs.isnan().all()


def test_remove_invalid_values_decodes_on_over_nan_logits() -> None:
    logits = torch.randn(1, 20)
    logits[0, 3] = torch.nan
    for options in KINDS:
        step = decoder_for(options | {"remove_invalid_values": True}, [1, 2], vocab=20).decide(logits)
        assert step.logprobs.isfinite().all()


# ---- wrong use -----------------------------------------------------------------------------------------------


def test_wrong_use_is_refused_when_the_decoder_is_made() -> None:
    with pytest.raises(EmptyPrompt):
        decoder_for({}, [])
    with pytest.raises(InvalidRequest, match="`top_logprobs=132` exceeds the vocabulary of 131"):
        decoder_for({"top_logprobs": 132}, [1])
    with pytest.raises(InvalidRequest, match="`seed` must be an integer"):
        decoder_for({"do_sample": True, "seed": 1.5}, [1])
    with pytest.raises(InvalidRequest, match="looks at 5 tokens a beam, but the vocabulary has 4"):
        decoder_for({"num_beams": 2, "eos_token_id": [0, 1, 2, 3]}, [1], vocab=4)
