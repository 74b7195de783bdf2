"""Retention as users meet it: on load, in a call, on the command line, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import kvloom
from kvloom.cli import kvloom as command
from kvloom.errors import InvalidRequest, PromptTooLong
from tiny import random_ids, tiny_model

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
SINKS = kvloom.SinkWindow(sink_tokens=2, window_tokens=14)


@pytest.fixture(scope="module")
def llama():
    return kvloom.attach(tiny_model("llama"), block_tokens=4, budget_bytes=1 << 20)


def held(lm: kvloom.LanguageModel) -> int:
    """Blocks that neither lie free nor idle."""
    return sum(group.pool.referenced - len(group.index.idle()) for group in lm.engine.cache.groups)


def refused(lm: kvloom.LanguageModel, error: type[Exception], complaint: str, *args: Any, **options: Any) -> None:
    with pytest.raises(error, match=complaint):
        lm.generate(*args, **(GREEDY | options))
    assert held(lm) == 0 and not lm.engine._requests


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        (kvloom.HeavyHitters(budget_tokens=3), "`budget_tokens=3` is below one block of 4 tokens"),
        (kvloom.LastQuery(budget_tokens=2), "Raise it to at least 4"),
        (kvloom.CompressedPrompt(budget_tokens=2, observed_tokens=1), "below one block"),
        (kvloom.SinkWindow(pins=[(4, 21)]), r"`pins` has the span \(4, 21\), but the prompt has 20 tokens"),
        (kvloom.TopBlocks(), "planned for when a model is loaded or attached"),
        ("sink-window", "`retention` must be a policy such as kvloom.SinkWindow"),
        (kvloom.SinkWindow, "must be a policy"),
    ],
)
def test_policies_that_do_not_fit_are_refused_before_any_work(llama, policy, complaint: str) -> None:
    refused(llama, InvalidRequest, complaint, random_ids(llama.binding.model, tokens=20), retention=policy)


def test_without_a_cache_there_is_nothing_to_keep(llama) -> None:
    prompt = random_ids(llama.binding.model, tokens=20)
    refused(llama, InvalidRequest, "`use_cache=False` has none", prompt, retention=SINKS, use_cache=False)
    lm = kvloom.attach(lambda ids: torch.zeros(*ids.shape, 7), vocab_size=7)
    with pytest.raises(InvalidRequest, match="does not show its attention"):
        lm.generate([1, 2], retention=SINKS)
    with pytest.raises(InvalidRequest, match="does not show its attention"):
        kvloom.attach(lambda ids: torch.zeros(*ids.shape, 7), vocab_size=7, retention=SINKS)


def test_layers_with_windows_keep_their_own() -> None:
    lm = kvloom.attach(tiny_model("mistral"))
    refused(lm, InvalidRequest, "every layer has a window of 8 tokens of its own", [1, 2, 3], retention=SINKS)


def test_past_the_trained_length_only_turning_queries_helps() -> None:
    lm = kvloom.attach(tiny_model("llama", max_position_embeddings=64), block_tokens=4, budget_bytes=1 << 20)
    prompt = random_ids(lm.binding.model, tokens=20)
    refused(
        lm,
        PromptTooLong,
        "LastQuery keeps positions as they are",
        prompt,
        max_new_tokens=45,
        retention=kvloom.LastQuery(),
    )
    refused(
        lm,
        PromptTooLong,
        "Leave `reindex` at None",
        prompt,
        max_new_tokens=45,
        retention=kvloom.SinkWindow(reindex=False),
    )
    refused(
        lm,
        InvalidRequest,
        "Lower window_tokens to 64 or less",
        prompt,
        max_new_tokens=45,
        retention=kvloom.SinkWindow(),
    )
    assert len(lm.generate(prompt, max_new_tokens=45, retention=SINKS, **GREEDY).token_ids) == 45
    gpt2 = kvloom.attach(tiny_model("gpt2", n_positions=64), block_tokens=4, budget_bytes=1 << 20)
    refused(
        gpt2,
        InvalidRequest,
        "cannot be re-indexed on this model: it has no rotary embedding",
        prompt,
        max_new_tokens=45,
        retention=SINKS,
    )
    assert len(gpt2.generate(prompt, max_new_tokens=44, retention=SINKS, **GREEDY).token_ids) == 44
    dynamic = kvloom.attach(tiny_model("llama_dynamic_rope"), block_tokens=4, budget_bytes=1 << 20)
    refused(dynamic, InvalidRequest, "rotary factors change", prompt, max_new_tokens=45, retention=SINKS)


def test_a_context_and_a_call_agree_on_the_policy(llama) -> None:
    context = llama.prefill(random_ids(llama.binding.model, tokens=30), retention=SINKS)
    assert context.retention.same_as(SINKS) and context.blocks < 30 // 4
    for other in (None, kvloom.SinkWindow(sink_tokens=2, window_tokens=15)):
        with pytest.raises(InvalidRequest, match="goes on under it alone"):
            llama.generate([3], context=context, retention=other)
    assert llama.generate([3], context=context, retention=SINKS, max_new_tokens=2, **GREEDY).usage.dropped_tokens > 0
    context.close()
    assert held(llama) == 0


def test_a_default_policy_can_be_left_out_of_a_call() -> None:
    model = tiny_model("llama")
    lm = kvloom.attach(model, block_tokens=4, retention=SINKS)
    prompt = random_ids(model, tokens=40)
    assert lm.retention == SINKS
    assert lm.generate(prompt, max_new_tokens=9, **GREEDY).usage.dropped_tokens == 48 - 16
    assert lm.generate(prompt, max_new_tokens=9, retention=None, **GREEDY).usage.dropped_tokens == 0
    with lm.stream(prompt, max_new_tokens=9, **GREEDY) as pieces:
        list(pieces)
    assert pieces.result.usage.dropped_tokens == 48 - 16
    assert lm.prefill(prompt).retention.same_as(SINKS)
    report = lm.verify([prompt], max_new_tokens=8)
    assert report.ok and "drops up to 31 tokens" in report.retention and report.retention in str(report)


def test_tables_that_were_given_up_are_computed_anew_under_the_policy() -> None:
    model = tiny_model("llama")
    lm = kvloom.attach(model, block_tokens=4, budget_bytes=1 << 20)
    prompt = random_ids(model, tokens=40)
    first = lm.generate(prompt, max_new_tokens=9, retention=SINKS, **GREEDY)
    options = {"max_new_tokens": 5, "output_logits": True, **GREEDY}
    kept = lm.generate([5], context=first.context, **options)
    lm.engine._keeping.holdings.release_all()
    anew = lm.generate([5], context=first.context, **options)
    assert kept.token_ids == anew.token_ids
    torch.testing.assert_close(kept.logits, anew.logits, rtol=1e-3, atol=1e-3)
    assert anew.usage.dropped_tokens == kept.usage.dropped_tokens


def test_a_failing_step_leaves_a_policy_as_it_was(llama) -> None:
    prompt = random_ids(llama.binding.model, tokens=30)
    policy = kvloom.HeavyHitters(budget_tokens=12)
    options = {"max_new_tokens": 20, "retention": policy, "output_logits": True, **GREEDY}
    expected = llama.generate(prompt, **options)

    def fail_once(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 36:
            raise KeyError("my own")
        return scores

    with pytest.raises(KeyError, match="my own"):
        llama.generate(prompt, logits_processor=[fail_once], **options)
    again = llama.generate(prompt, **options)
    assert torch.equal(again.logits, expected.logits)


# ---- the command -------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command, ["generate", "Once upon a time", *arguments])


def test_the_command_streams_under_a_policy() -> None:
    result = run("--retention", "sink-window", "--window-tokens", "16", "--max-new-tokens", "40", "--no-do-sample")
    assert result.exit_code == 0, result.output
    assert "kept by SinkWindow, 23 tokens of the sequence dropped" in result.stderr
    result = run("--retention", "heavy-hitters", "--budget-tokens", "32", "--max-new-tokens", "60", "--json")
    fields = json.loads(result.stdout)
    assert fields["settings"]["retention"] == {"policy": "HeavyHitters", "budget_tokens": 32, "recent_tokens": None}
    assert fields["usage"]["dropped_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--window-tokens", "8"], "`--window-tokens` is a setting of a policy. Name the policy with `--retention`"),
        (["--retention", "sink-windows"], "'sink-window'"),
        (
            ["--retention", "last-query", "--sink-tokens", "2"],
            "`--sink-tokens` is not a setting of `--retention last-query`",
        ),
        (["--retention", "sink-window", "--window-tokens", "-8"], "`--window-tokens` must be a whole number"),
        (["--retention", "sink-window", "--pin", "8"], "'8' is not a span of positions such as 0:64"),
        (["--retention", "sink-window", "--pin", "0:64"], "`--pin` has the span (0, 64), but the prompt has 4 tokens"),
        (["--retention", "sink-window", "--no-cache"], "contradict each other"),
        (["--retention", "heavy-hitters", "--budget-tokens", "8"], "`--budget-tokens 8` is below one block"),
    ],
)
def test_wrong_use_of_the_command_is_one_clear_line(arguments: list[str], complaint: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and complaint in result.stderr and len(result.stderr.strip().splitlines()) == 1


# ---- streams -----------------------------------------------------------------------------------------------------


def test_a_loaded_model_whose_weights_were_packed_streams_past_its_trained_length() -> None:
    lm = kvloom.load()
    assert lm.max_tokens is not None
    prompt = random_ids(lm.binding.model, tokens=lm.max_tokens - 2)
    result = lm.generate(prompt, max_new_tokens=6, retention=kvloom.SinkWindow(window_tokens=100), **GREEDY)
    assert len(result.token_ids) == 6


def test_a_stream_keeps_no_pieces_and_says_where_it_is(llama) -> None:
    prompt = random_ids(llama.binding.model, tokens=20)
    with llama.stream(prompt, max_new_tokens=30, retention=SINKS, **GREEDY) as stream:
        assert repr(stream) == "Stream(0 new tokens, of at most 30)"
        for _ in stream:
            assert not stream._request.untaken, "what was handed out is not kept"
        assert repr(stream) == "Stream(30 new tokens, ended by length)"
    with llama.stream(prompt, max_new_tokens=30, **GREEDY) as stream:
        next(stream)
    assert repr(stream) == "Stream(1 new tokens, closed)"
    assert llama.stream(prompt, max_new_tokens=2, **GREEDY).result is None
