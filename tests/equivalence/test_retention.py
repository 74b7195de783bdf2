"""Decoding under retention is what the policies' papers, read literally, compute on dense tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvloom
import naive_retention as naive
from kvloom.cache.retention import Retention
from kvloom.engine import Engine
from kvloom.language_model.model import LanguageModel
from kvloom.models import AttentionInterfaceBinding
from tiny import random_ids, tiny_model

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "output_logits": True}


def language_model(
    model: Any,
    *,
    block_tokens: int = 4,
    step_tokens: int = 512,
    budget_bytes: int = 4 << 20,
    retention: Retention | None = None,
) -> LanguageModel:
    """On a cold cache, with chunks of the length that a test wants."""
    engine = Engine(
        AttentionInterfaceBinding(model),
        budget_bytes=budget_bytes,
        block_tokens=block_tokens,
        step_tokens=step_tokens,
        block_bounds=isinstance(retention, kvloom.TopBlocks),
    )
    return LanguageModel(engine, None, None, retention)


def assert_freed(lm: LanguageModel) -> None:
    for group in lm.engine.cache.groups:
        assert group.pool.free + group.pool.referenced == group.pool.total
        assert group.pool.referenced == len(group.index.idle()), "only idle prefix blocks are left"


@torch.no_grad()
def masked_logits(model: Any, token_ids: list[int], policy: kvloom.SinkWindow) -> torch.Tensor:
    """float[tokens, vocab]: one forward of the model itself over all tokens, with the policy as a mask."""
    queries, keys = torch.arange(len(token_ids))[:, None], torch.arange(len(token_ids))
    seen = (keys > queries - policy.window_tokens) | (keys < policy.sink_tokens)
    for first, end in policy.pins:
        seen |= (keys >= first) & (keys < end)
    lowest = torch.finfo(torch.float32).min
    masks = {"full_attention": torch.where(seen & (keys <= queries), 0.0, lowest)[None, None]}
    window = getattr(model.config, "sliding_window", None)
    if window and "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        near = (keys <= queries) & (keys > queries - window)
        masks["sliding_attention"] = torch.where(near, 0.0, lowest)[None, None]
    mask = masks if len(masks) > 1 else masks["full_attention"]
    positions = torch.arange(len(token_ids))[None]
    return model(torch.tensor([token_ids]), attention_mask=mask, position_ids=positions, use_cache=False).logits[0]


def logits_after(lm: LanguageModel, prompt: list[int], **options: Any) -> tuple[list[int], torch.Tensor]:
    out = lm.generate(prompt, **(GREEDY | options))
    return out.token_ids, out.logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=2e-4 * scale)


# ---- sinks and window --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "cohere2", "gpt_oss", "opt"])
@pytest.mark.parametrize("step_tokens", [512, 7])
def test_sinks_and_window_equal_a_recomputation_under_the_mask(family: str, step_tokens: int) -> None:
    model = tiny_model(family)
    prompt = random_ids(model, tokens=41)
    policy = kvloom.SinkWindow(sink_tokens=3, window_tokens=9, pins=[(8, 10), (13, 22)])
    lm = language_model(model, step_tokens=step_tokens)
    token_ids, logits = logits_after(lm, prompt, max_new_tokens=30, retention=policy)
    assert_close(logits, masked_logits(model, prompt + token_ids, policy)[len(prompt) - 1 : -1])
    assert_freed(lm)


def test_a_ragged_batch_and_beams_see_what_each_sees_alone() -> None:
    model = tiny_model("llama")
    prompts = [random_ids(model, tokens=tokens, seed=tokens) for tokens in (5, 30, 61)]
    policy = kvloom.SinkWindow(sink_tokens=2, window_tokens=12)
    lm = language_model(model, step_tokens=16)
    for prompt, out in zip(prompts, lm.generate(prompts, max_new_tokens=25, retention=policy, **GREEDY), strict=True):
        assert_close(out.logits, masked_logits(model, prompt + out.token_ids, policy)[len(prompt) - 1 : -1])
    beams = lm.beam_search(
        prompts[1], num_beams=4, num_return_sequences=4, max_new_tokens=25, retention=policy, **GREEDY
    )
    for out in beams:
        assert_close(out.logits, masked_logits(model, prompts[1] + out.token_ids, policy)[29:-1])
    del out, beams
    assert_freed(lm)


@pytest.mark.parametrize("step_tokens", [512, 5])
def test_a_reindexed_stream_is_streaming_llm(step_tokens: int) -> None:
    """Against positions within the cache, rotated anew for every query."""
    model = tiny_model("llama", num_hidden_layers=2)
    prompt = random_ids(model, tokens=23)
    lm = language_model(model, step_tokens=step_tokens)
    policy = kvloom.SinkWindow(sink_tokens=3, window_tokens=10, reindex=True)
    token_ids, logits = logits_after(lm, prompt, max_new_tokens=20, retention=policy)
    expected = naive.streaming(model, prompt + token_ids, sinks=3, window=10)
    assert_close(logits, torch.stack(expected[len(prompt) - 1 : -1]))
    apart = language_model(model)
    batch = apart.generate([prompt, prompt[:9]], max_new_tokens=20, retention=policy, **GREEDY)
    assert_close(batch[0].logits, logits)
    beams = apart.beam_search(prompt, num_beams=3, max_new_tokens=12, retention=policy, **GREEDY)
    expected = naive.streaming(model, prompt + beams[0].token_ids, sinks=3, window=10)
    assert_close(beams[0].logits, torch.stack(expected[len(prompt) - 1 : -1]))


def test_a_stream_outgrows_the_trained_length_in_a_cache_that_is_smaller_than_itself() -> None:
    model = tiny_model("qwen2", max_position_embeddings=64)
    prompt = random_ids(model, tokens=20)
    lm = language_model(model, budget_bytes=12 * 4 * 3 * 2 * 2 * 12 * 4)
    policy = kvloom.SinkWindow(sink_tokens=4, window_tokens=16)
    pool = lm.engine.cache.blocks
    out = lm.generate(prompt, max_new_tokens=300, retention=policy, **GREEDY)
    assert len(out.token_ids) == 300 and out.usage.peak_blocks <= pool < 300 // 4
    assert out.usage.dropped_tokens == 319 - 4 - 16
    expected = naive.streaming(model, prompt + out.token_ids[:90], sinks=4, window=16)
    assert_close(out.logits[:90], torch.stack(expected[len(prompt) - 1 : -1]))


# ---- the others --------------------------------------------------------------------------------------------------

NAIVE = {
    "heavy hitters": (
        lambda bt: kvloom.HeavyHitters(budget_tokens=16, recent_tokens=6),
        lambda model, ids, prompt, bt: naive.heavy_hitters(model, ids, prompt, budget=16, block_tokens=bt, recent=6),
    ),
    "last query": (
        lambda bt: kvloom.LastQuery(budget_tokens=16),
        lambda model, ids, prompt, bt: naive.last_query(model, ids, prompt, budget=16, block_tokens=bt),
    ),
    "compressed prompt": (
        lambda bt: kvloom.CompressedPrompt(budget_tokens=16, observed_tokens=5, pooled_tokens=3),
        lambda model, ids, prompt, bt: naive.compressed_prompt(
            model, ids, prompt, budget=16, observed=5, pooled=3, block_tokens=bt
        ),
    ),
    "top blocks": (
        lambda bt: kvloom.TopBlocks(budget_tokens=16),
        lambda model, ids, prompt, bt: naive.top_blocks(model, ids, prompt, budget=16, block_tokens=bt),
    ),
}


@pytest.mark.parametrize("block_tokens", [1, 4])
@pytest.mark.parametrize("name", NAIVE)
def test_a_policy_decodes_as_its_naive_model_does(name: str, block_tokens: int) -> None:
    make, oracle = NAIVE[name]
    model = tiny_model("llama", num_hidden_layers=2)
    prompt = random_ids(model, tokens=30)
    policy = make(block_tokens)
    lm = language_model(model, block_tokens=block_tokens, step_tokens=8, retention=policy)
    out = lm.generate(prompt, max_new_tokens=20, **GREEDY)
    assert_close(out.logits, torch.stack(oracle(model, prompt + out.token_ids, 30, block_tokens)[29:-1]))
    others = lm.generate([prompt[:12], prompt, prompt[5:]], max_new_tokens=20, **GREEDY)
    assert_close(others[1].logits, out.logits)
    assert_close(
        others[2].logits, torch.stack(oracle(model, prompt[5:] + others[2].token_ids, 25, block_tokens)[24:-1])
    )
    for beam in lm.beam_search(prompt, num_beams=3, num_return_sequences=3, max_new_tokens=16, **GREEDY):
        assert_close(beam.logits, torch.stack(oracle(model, prompt + beam.token_ids, 30, block_tokens)[29:-1]))
    del out, others, beam
    assert_freed(lm)


POLICIES = [
    kvloom.SinkWindow(sink_tokens=2, window_tokens=80),
    kvloom.SinkWindow(sink_tokens=2, window_tokens=80, reindex=True),
    kvloom.HeavyHitters(budget_tokens=80),
    kvloom.LastQuery(budget_tokens=80),
    kvloom.CompressedPrompt(budget_tokens=80),
    kvloom.TopBlocks(budget_tokens=80),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda own: type(own).__name__)
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_budget_as_large_as_the_sequence_gives_the_bits_of_the_full_cache(family: str, policy: Retention) -> None:
    model = tiny_model(family)
    prompt = random_ids(model, tokens=40)
    options = {"max_new_tokens": 40, **GREEDY}
    full = language_model(model, step_tokens=16).generate(prompt, **options)
    kept = language_model(model, step_tokens=16, retention=policy).generate(prompt, **options)
    assert kept.token_ids == full.token_ids and torch.equal(kept.logits, full.logits)
    assert kept.usage.dropped_tokens == 0
    beams = language_model(model, retention=policy).beam_search(prompt, num_beams=3, **options)
    full_beams = language_model(model).beam_search(prompt, num_beams=3, **options)
    assert torch.equal(beams[0].logits, full_beams[0].logits) and beams[0].token_ids == full_beams[0].token_ids


@pytest.mark.parametrize(
    "policy",
    [
        kvloom.SinkWindow(sink_tokens=2, window_tokens=10),
        kvloom.HeavyHitters(budget_tokens=16),
        kvloom.LastQuery(budget_tokens=16),
        kvloom.CompressedPrompt(budget_tokens=16, observed_tokens=8),
        kvloom.TopBlocks(budget_tokens=16),
    ],
    ids=lambda own: type(own).__name__,
)
def test_what_was_computed_after_a_drop_is_never_found_as_a_prefix(policy: Retention) -> None:
    model = tiny_model("llama")
    prompt = random_ids(model, tokens=40)
    lm = language_model(model, retention=policy)
    out = lm.generate(prompt, max_new_tokens=24, **GREEDY)
    again = prompt + out.token_ids + prompt[:3]
    full = lm.generate(again, max_new_tokens=4, retention=None, **GREEDY)
    cold = language_model(model).generate(again, max_new_tokens=4, **GREEDY)
    assert_close(full.logits, cold.logits)
    assert full.usage.cached_prompt_tokens <= 40


@pytest.mark.parametrize("policy", [own for own in POLICIES if isinstance(own, kvloom.SinkWindow)][:1])
def test_a_warm_prefix_changes_nothing(policy: Retention) -> None:
    model = tiny_model("llama")
    prompt = random_ids(model, tokens=60)
    narrow = kvloom.SinkWindow(sink_tokens=2, window_tokens=10)
    lm = language_model(model)
    lm.generate(prompt, max_new_tokens=4, **GREEDY)
    warm = lm.generate(prompt, max_new_tokens=10, retention=narrow, **GREEDY)
    assert warm.usage.cached_prompt_tokens == 12
    cold = language_model(model).generate(prompt, max_new_tokens=10, retention=narrow, **GREEDY)
    assert_close(warm.logits, cold.logits)


# ---- contexts ----------------------------------------------------------------------------------------------------


def test_a_context_goes_on_under_its_policy() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    prompt, more = random_ids(model, tokens=30), random_ids(model, tokens=6, seed=5)
    policy = kvloom.SinkWindow(sink_tokens=2, window_tokens=10)
    lm = language_model(model)
    context = lm.prefill(prompt, retention=policy)
    first = lm.generate(context=context, max_new_tokens=8, **GREEDY)
    assert first.usage.computed_prompt_tokens == 1, "the last query's window is still held"
    second = lm.generate(more, context=first.context, max_new_tokens=8, **GREEDY)
    whole = prompt + first.token_ids + more + second.token_ids
    assert_close(first.logits, masked_logits(model, prompt + first.token_ids, policy)[29:-1])
    assert_close(second.logits, masked_logits(model, whole, policy)[len(whole) - 9 : -1])
    assert first.context.retention == second.context.retention == context.retention
    cut = context.truncate(20)
    third = lm.generate(more, context=cut, max_new_tokens=4, **GREEDY)
    assert_close(third.logits, masked_logits(model, prompt[:20] + more + third.token_ids, policy)[25:-1])


def test_scores_travel_with_forks_and_contexts() -> None:
    """Two turns of H2O, of which the second begins where the first's scores were."""
    model = tiny_model("llama", num_hidden_layers=2)
    prompt, more = random_ids(model, tokens=20), random_ids(model, tokens=5, seed=5)
    policy = kvloom.HeavyHitters(budget_tokens=12, recent_tokens=4)
    lm = language_model(model)
    first = lm.generate(prompt, max_new_tokens=10, retention=policy, **GREEDY)
    forks = [lm.generate([*more[:n], 7], context=first.context, max_new_tokens=9, **GREEDY) for n in (0, 3)]
    for n, fork in zip((0, 3), forks, strict=True):
        state, score, logits = naive.Naive(model), dict[int, float](), []
        whole = prompt + first.token_ids + more[:n] + [7] + fork.token_ids
        # The last new token of a turn is chosen, but run with the next turn's prompt.
        pauses = range(29, 30 + n)
        for index, token in enumerate(whole):
            row, mass = state.run(token)
            logits.append(row)
            score = {position: score.get(position, 0.0) + own for position, own in mass.items()}
            if index >= 19 and index not in pauses:
                state.held = naive.drop(state.held, score, 12, 4, 4, state.tokens)
                score = {position: score[position] for position in state.held}
        assert_close(fork.logits, torch.stack(logits[30 + n : -1]))


def test_scoring_a_context_under_a_policy_sees_what_it_kept() -> None:
    model = tiny_model("llama")
    prompt = random_ids(model, tokens=40)
    policy = kvloom.SinkWindow(sink_tokens=2, window_tokens=9)
    lm = language_model(model)
    context = lm.prefill(prompt, retention=policy)
    continuations = [random_ids(model, tokens=tokens, seed=tokens) for tokens in (1, 3, 14)]
    for own, scored in zip(continuations, lm.score(continuations, context=context), strict=True):
        logits = masked_logits(model, prompt + own, policy)[39:-1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(own)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scored.token_logprobs), expected, rtol=1e-4, atol=1e-4)
