"""Wrong calls of the library: a typed exception that says need, have and remedy, and nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor

import kvloom
import tiny
from kvloom import CacheFull, CacheMismatch, InvalidRequest, KVLoomError, LanguageModel, UnsupportedModel
from kvloom.engine import memory
from kvloom.engine.memory import total_memory_bytes
from kvloom.errors import (
    ContextClosed,
    EmptyPrompt,
    InvalidTokens,
    NumericalError,
    PromptTooLong,
    UnknownOption,
    UnsupportedOption,
)

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model("llama")


@pytest.fixture(scope="module")
def attached(model: Any) -> LanguageModel:
    return kvloom.attach(model, budget_bytes=1 << 20)


@pytest.fixture
def lm(attached: LanguageModel) -> Iterator[LanguageModel]:
    """A small model whose pools and queue are as they were, whatever a test did."""
    lm = attached
    yield lm
    gc.collect()
    assert_nothing_is_held(lm)
    assert len(lm.generate(PROMPT, max_new_tokens=3).token_ids) == 3, "it still works"


@pytest.fixture(scope="module")
def stories(stories260k: Any) -> LanguageModel:
    return kvloom.load(stories260k)


def assert_nothing_is_held(lm: LanguageModel) -> None:
    assert not lm.engine._requests
    assert lm.engine.cache is not None
    for group in lm.engine.cache.groups:
        assert group.pool.free + len(group.index.idle()) == group.pool.total


# ---- prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [[], (), torch.tensor([], dtype=torch.int64), np.array([], dtype=np.int64), [[]]])
def test_a_prompt_without_tokens_is_refused(lm: LanguageModel, prompt: Any) -> None:
    with pytest.raises(EmptyPrompt, match=r"BOS|empty"):
        lm.generate(prompt)


def test_text_that_is_no_text_is_refused(stories: LanguageModel) -> None:
    calls = (
        lambda: stories.generate("a\udcff"),
        lambda: stories.prefill("a\udcff"),
        lambda: stories.score(["b\udcff"], prompt="a"),
    )
    for call in calls:
        with pytest.raises(InvalidRequest, match=r"the text holds '\\udcff', half of a surrogate pair"):
            call()


def test_an_empty_text_is_refused(stories: LanguageModel) -> None:
    with pytest.raises(EmptyPrompt, match=r"empty.*bos_token_id"):
        stories.generate("")
    with pytest.raises(EmptyPrompt):
        stories.generate(["Once upon a time", ""])
    assert_nothing_is_held(stories)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ([1, 131], "token id 131.*0 to 130"),
        ([1, -1], "token id -1"),
        ([[1, 2], [3, 999]], "token id 999"),
        (torch.tensor([1, 500]), "token id 500"),
        (torch.zeros(1, 1, 4, dtype=torch.int64), r"\[1, 1, 4\].*list"),
        (torch.zeros(2, 3, dtype=torch.int64), r"\[2, 3\].*without padding"),
        (torch.tensor(3), r"\[tokens\]"),
        (torch.tensor([1.0, 2.0]), "float32"),
        (np.array([1.0, 2.0]), "float"),
        (torch.tensor([True, False]), "bool"),
        ([1, 2.5], "float"),
        ([1, "a"], "str"),
        ([1, None], "NoneType"),
    ],
)
def test_token_ids_are_integers_of_the_vocabulary_in_one_row(lm: LanguageModel, prompt: Any, named: str) -> None:
    for call in (lm.generate, lm.beam_search, lm.stream):
        with pytest.raises(InvalidTokens, match=named):
            call(prompt, max_new_tokens=2)


@pytest.mark.parametrize("prompt", [3, 2.5, {"text": "x"}, object()])
def test_a_prompt_of_another_kind_is_refused_by_its_type(lm: LanguageModel, prompt: Any) -> None:
    with pytest.raises(KVLoomError, match=type(prompt).__name__):
        lm.generate(prompt)


def test_text_without_a_tokenizer_is_refused_with_the_way_out(lm: LanguageModel) -> None:
    with pytest.raises(InvalidRequest, match=r"no tokenizer was attached. Pass token ids"):
        lm.generate("Once upon a time")


def test_a_prompt_that_fills_the_context_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(PromptTooLong, match=r"256 tokens.*256.*Shorten"):
        lm.generate([1] * 256)
    with pytest.raises(PromptTooLong, match=r"300"):
        lm.prefill([1] * 300)
    with pytest.raises(PromptTooLong, match=r"200 prompt tokens and 100 new.*256.*Lower max_new_tokens to 56"):
        lm.generate([1] * 200, max_new_tokens=100)


def test_a_request_larger_than_the_pool_says_how_large_it_would_have_to_be(model: Any) -> None:
    lm = kvloom.attach(model, budget_bytes=6 * kvloom.attach(model).engine.cache.layout.bytes_per_row_of_blocks)
    with pytest.raises(CacheFull, match=r"needs 9 blocks of 16 tokens; the pool has 6 .*Raise budget_bytes") as refused:
        lm.generate([1] * 100, max_new_tokens=40)
    with pytest.raises(CacheFull, match="8 sequences"):
        lm.beam_search(PROMPT, num_beams=8, max_new_tokens=4)
    with pytest.raises(CacheFull):
        lm.prefill([1] * 100)
    assert_nothing_is_held(lm)
    named = int(str(refused.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    large_enough = kvloom.attach(model, budget_bytes=named)
    assert len(large_enough.generate([1] * 100, max_new_tokens=40).token_ids) == 40


def test_a_budget_below_one_block_is_refused(model: Any) -> None:
    with pytest.raises(CacheFull, match=r"budget_bytes=10 is below one block.*Raise"):
        kvloom.attach(model, budget_bytes=10)


@pytest.mark.parametrize("times", [1.01, 1 << 20])
def test_a_budget_beyond_the_memory_is_refused(model: Any, times: float) -> None:
    whole = total_memory_bytes(torch.device("cpu"))
    with pytest.raises(CacheFull, match=r"is more than the [\d,]+ bytes of memory that cpu has. Lower budget_bytes"):
        kvloom.attach(model, budget_bytes=int(whole * times))


def test_the_memory_of_a_container_counts_where_it_is_less_than_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    unconfined = memory.total_memory_bytes(cpu)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("12345\n")
    assert memory.total_memory_bytes(cpu) == unconfined
    (tmp_path / "memory.max").write_text("1000000\n")
    assert (memory.total_memory_bytes(cpu), memory.available_memory_bytes(cpu)) == (1_000_000, 1_000_000 - 12_345)


@pytest.mark.parametrize("refused", ["a budget", "a tokenizer"])
def test_a_model_for_exclusive_use_is_its_owners_again_if_it_is_refused(model: Any, refused: str) -> None:
    ids = torch.tensor([[1, 2, 3]])
    own, weights = model(ids).logits, {name: own.clone() for name, own in model.named_parameters()}
    unfit = SimpleNamespace(get_vocab=lambda: {"word": 10**6})
    with pytest.raises(KVLoomError):
        if refused == "a budget":
            kvloom.attach(model, exclusive=True, budget_bytes=10)
        kvloom.attach(model, unfit, exclusive=True)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert torch.equal(model(ids).logits, own)


# ---- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"num_beem": 3}, UnknownOption, "unknown option `num_beem`. Did you mean `num_beams`"),
        ({"max_tokens": 3}, UnknownOption, "max_new_tokens"),
        ({"num_beams": 2, "num_return_sequences": 3}, InvalidRequest, "exceeds `num_beams=2`. Raise"),
        ({"num_return_sequences": 3}, InvalidRequest, "do_sample=True` or `num_beams`"),
        ({"do_sample": True, "temperature": -0.5}, InvalidRequest, "above 0, but is -0.5"),
        ({"do_sample": True, "temperature": 0.0}, InvalidRequest, "greedy"),
        ({"temperature": -1}, InvalidRequest, "above 0"),
        ({"do_sample": True, "top_p": 1.5}, InvalidRequest, "at most 1"),
        ({"do_sample": True, "top_k": -1}, InvalidRequest, "top_k"),
        ({"num_beams": 0}, InvalidRequest, "at least 1"),
        ({"num_beams": 2.5}, InvalidRequest, "num_beams"),
        ({"max_new_tokens": 0}, InvalidRequest, "at least 1"),
        ({"max_new_tokens": True}, InvalidRequest, "max_new_tokens"),
        ({"early_stopping": "sometimes", "num_beams": 2}, InvalidRequest, "never"),
        ({"eos_token_id": 131}, InvalidRequest, "0 to 130"),
        ({"seed": -1, "do_sample": True}, InvalidRequest, "seed"),
        ({"stop_strings": "x"}, InvalidRequest, "tokenizer"),
        ({"top_logprobs": 132}, InvalidRequest, "vocabulary of 131"),
        ({"penalty_alpha": 0.6}, UnsupportedOption, "penalty_alpha"),
        ({"logits_processor": 3}, InvalidRequest, "logits_processor"),
        ({"generation_config": {"num_beams": 2}}, InvalidRequest, "GenerationConfig"),
    ],
)
def test_a_wrong_option_is_refused_by_name(
    lm: LanguageModel, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        lm.generate(PROMPT, **options)


def test_a_stream_is_one_sequence_of_one_prompt(lm: LanguageModel) -> None:
    for prompt, options in [([PROMPT, PROMPT], {}), (PROMPT, {"num_beams": 2})]:
        with pytest.raises(InvalidRequest, match=r"Use generate\(\) for beams and batches"):
            lm.stream(prompt, **options)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"block_tokens": 0}, "block_tokens"),
        ({"budget_bytes": -1}, "budget_bytes"),
        ({"threads": 0}, "threads"),
        ({"vocab_size": 131}, "callables"),
    ],
)
def test_attach_refuses_wrong_sizes(model: Any, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        kvloom.attach(model, **arguments)


# ---- models in the wrong state ---------------------------------------------------------------------------------


def test_a_model_put_into_training_mode_is_refused_until_it_is_back() -> None:
    model = tiny.tiny_model("llama")
    lm = kvloom.attach(model, budget_bytes=1 << 20)
    stream = lm.stream(PROMPT, max_new_tokens=8)
    next(stream)
    model.train()
    for call in (lm.generate, lm.beam_search, lm.stream, lm.prefill, lambda ids: lm.extend(None, ids)):
        with pytest.raises(UnsupportedModel, match=r"training mode.*model\.eval\(\)"):
            call(PROMPT)
    with pytest.raises(UnsupportedModel, match="training mode"):
        lm.verify()
    with pytest.raises(UnsupportedModel, match="training mode"):
        kvloom.attach(model)
    model.eval()
    stream.close()
    assert_nothing_is_held(lm)
    assert len(lm.generate(PROMPT, max_new_tokens=2).token_ids) == 2


def test_gradient_checkpointing_is_refused_with_the_call_that_ends_it() -> None:
    model = tiny.tiny_model("llama")
    lm = kvloom.attach(model, budget_bytes=1 << 20)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    with pytest.raises(UnsupportedModel, match=r"gradient_checkpointing_disable\(\)"):
        lm.generate(PROMPT)
    with pytest.raises(UnsupportedModel, match=r"gradient_checkpointing_disable\(\)"):
        kvloom.attach(model)
    assert_nothing_is_held(lm)


@pytest.mark.parametrize("thing", [3, "gpt2", None, {}])
def test_what_is_no_model_is_refused_by_its_type(thing: Any) -> None:
    with pytest.raises(UnsupportedModel, match=type(thing).__name__):
        kvloom.attach(thing)


# ---- numbers that are none -------------------------------------------------------------------------------------

DECODING = [
    {},
    {"do_sample": True, "seed": 1},
    {"num_beams": 3},
    {"use_cache": False},
    {"num_beams": 3, "use_cache": False},
]


@pytest.mark.parametrize("options", DECODING)
def test_nan_logits_are_an_error_and_no_token(options: dict[str, Any]) -> None:
    model = tiny.tiny_model("llama")
    lm = kvloom.attach(model, budget_bytes=1 << 20)
    expected = lm.generate(PROMPT, max_new_tokens=4).token_ids
    weight = model.model.layers[1].mlp.down_proj.weight
    kept = weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match="NaN logits"):
        lm.generate([PROMPT, [1, 2]], max_new_tokens=4, **options)
    assert_nothing_is_held(lm)
    weight.copy_(kept)
    assert lm.generate(PROMPT, max_new_tokens=4).token_ids == expected, "nothing of it is found in the cache"


def test_nan_logits_end_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = kvloom.attach(tiny.tiny_model("llama"), budget_bytes=1 << 20)
    stream = lm.stream(PROMPT, max_new_tokens=8)
    next(stream)
    forward = lm.binding.forward
    monkeypatch.setattr(lm.binding, "forward", lambda *given, **named: forward(*given, **named) * torch.nan)
    with pytest.raises(NumericalError):
        list(stream)
    assert_nothing_is_held(lm)


@pytest.mark.parametrize("options", DECODING)
def test_a_callable_that_returns_nan_is_an_error(options: dict[str, Any]) -> None:
    def model(token_ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*token_ids.shape, 7)
        return logits if token_ids.shape[1] < 6 else logits * torch.nan

    lm = kvloom.attach(model, vocab_size=7)
    with pytest.raises(NumericalError, match="NaN logits"):
        lm.generate([1, 2, 3], max_new_tokens=9, **options)
    assert not lm.engine._requests


def test_a_callable_that_returns_another_shape_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"shape \(1, 1, 9\)"):
        kvloom.attach(lambda token_ids: torch.zeros(*token_ids.shape, 7), vocab_size=9)
    with pytest.raises(InvalidRequest, match="vocab_size"):
        kvloom.attach(lambda token_ids: torch.zeros(*token_ids.shape, 7))


# ---- processors that raise --------------------------------------------------------------------------------------


class Raises(LogitsProcessor):
    """Raises for one prompt of a batch, after some steps."""

    def __init__(self, first_token: int, length: int) -> None:
        self.first_token = first_token
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids[0, 0] == self.first_token and input_ids.shape[1] >= self.length:
            raise ZeroDivisionError("raised by the user's processor")
        return scores


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_a_processor_that_raises_for_one_of_a_batch_ends_the_call_and_holds_nothing(
    lm: LanguageModel, options: dict[str, Any]
) -> None:
    with pytest.raises(ZeroDivisionError, match="raised by the user's processor"):
        lm.generate([PROMPT, [70, 1], [3] * 40], max_new_tokens=9, logits_processor=[Raises(70, 5)], **options)


def test_a_processor_that_raises_in_a_stream_ends_it_after_the_tokens_before(lm: LanguageModel) -> None:
    pieces = []
    with pytest.raises(ZeroDivisionError):
        for piece in lm.stream(PROMPT, max_new_tokens=9, logits_processor=[Raises(PROMPT[0], 8)]):
            pieces.append(piece.token_id)
    assert pieces == lm.generate(PROMPT, max_new_tokens=3).token_ids


# ---- the hand-driven cache and contexts ---------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 20, 37])
def test_the_whole_input_on_top_of_a_context_is_a_mismatch(lm: LanguageModel, length: int) -> None:
    """The classic hand-written loop: `model(whole_input, past)`."""
    whole = torch.arange(length + 1)[None]
    context = lm.extend(None, whole[:, :length]).context
    for start in ({}, {"start": 0}, {"start": length}):
        with pytest.raises(CacheMismatch, match=rf"Pass .*token_ids\[{length}:\]"):
            lm.extend(context, whole, **start)
    step = lm.extend(context, whole[:, length:], start=length)
    assert step.logits.shape == (1, lm.vocab_size)


@pytest.mark.parametrize("start", [1, 4, 6, 100])
def test_tokens_that_do_not_start_at_the_end_of_the_context_are_a_mismatch(lm: LanguageModel, start: int) -> None:
    context = lm.prefill(PROMPT)
    with pytest.raises(CacheMismatch, match=rf"start at position 5.*start={start} was passed.*start=5"):
        lm.extend(context, [1, 2], start=start)
    with pytest.raises(CacheMismatch, match="start at position 0"):
        lm.extend(None, [1, 2], start=start)


USES: list[Callable[[LanguageModel, Any], Any]] = [
    lambda lm, context: lm.generate(context=context),
    lambda lm, context: lm.generate([1], context=context),
    lambda lm, context: lm.beam_search([1], context=context),
    lambda lm, context: lm.stream([1], context=context),
    lambda lm, context: lm.prefill([1], context=context),
    lambda lm, context: lm.extend(context, [1]),
]


@pytest.mark.parametrize("use", USES)
def test_a_closed_context_cannot_be_used(lm: LanguageModel, use: Callable[[LanguageModel, Any], Any]) -> None:
    context = lm.prefill(PROMPT)
    context.close()
    context.close()  # twice is once
    with pytest.raises(ContextClosed, match=r"closed. Prefill it again"):
        use(lm, context)
    with pytest.raises(ContextClosed):
        context.fork()
    with pytest.raises(ContextClosed):
        context.truncate(2)


@pytest.mark.parametrize("use", USES)
def test_a_context_of_another_model_cannot_be_used(
    lm: LanguageModel, model: Any, use: Callable[[LanguageModel, Any], Any]
) -> None:
    other = kvloom.attach(model, budget_bytes=1 << 20)
    context = other.prefill(PROMPT)
    with pytest.raises(ContextClosed, match="another model"):
        use(lm, context)
    assert other.generate([1], context=context, max_new_tokens=1).usage.cached_prompt_tokens == 5


def test_a_context_is_cut_to_a_length_that_it_has(lm: LanguageModel) -> None:
    context = lm.prefill(PROMPT)
    for tokens in (0, -1, 6):
        with pytest.raises(InvalidRequest, match=f"cannot be cut to {tokens} tokens. Pass 1 to 5"):
            context.truncate(tokens)


def test_after_detach_nothing_works_and_nothing_is_held(model: Any) -> None:
    lm = kvloom.attach(model, budget_bytes=1 << 20)
    context = lm.prefill(PROMPT)
    stream = lm.stream(PROMPT, max_new_tokens=5)
    next(stream)
    own = model(torch.tensor([PROMPT])).logits
    lm.detach()
    lm.detach()  # twice is once
    for call in (lambda: lm.generate(PROMPT), lambda: lm.prefill(PROMPT), lambda: lm.extend(context, [1]), lm.verify):
        with pytest.raises(ContextClosed):
            call()
    stream.close()
    context.close()
    assert_nothing_is_held(lm)
    assert torch.equal(own, model(torch.tensor([PROMPT])).logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_scores_that_are_not_numbers_are_an_error(lm: LanguageModel, options: dict) -> None:
    with pytest.raises(NumericalError):
        lm.generate([1, 2], logits_processor=[lambda ids, scores: scores * float("nan")], **options)


@pytest.mark.parametrize("broken", [lambda ids, scores: None, lambda ids, scores: scores[:, :5]])
def test_a_processor_that_returns_no_scores_is_refused(lm: LanguageModel, broken: object) -> None:
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(InvalidRequest, match="logits processor must return"):
            lm.generate([1, 2], logits_processor=[broken], **options)


def test_plausible_slips_end_in_a_typed_error(lm: LanguageModel) -> None:
    step = lm.extend(None, [1, 2])
    slips = [
        lambda: lm.generate([1], context=5),
        lambda: lm.extend(step, [5]),
        lambda: lm.extend(step.context, [5], start=True),
        lambda: lm.prefill([5], context=step),
        lambda: step.context.truncate("a"),
        lambda: step.context.truncate(True),
        lambda: lm.generate(b"abc"),
        lambda: lm.generate({"input_ids": [[1]]}),
        lambda: lm.generate([1], bad_words_ids=[1, 2]),
        lambda: kvloom.attach(tiny.tiny_model("llama"), "tokenizer"),
        lambda: kvloom.load(5),
        lambda: kvloom.load(""),
        lambda: kvloom.load(dtype=torch.int8),
    ]
    for slip in slips:
        with pytest.raises(InvalidRequest if slip is not slips[2] else ValueError):
            slip()
