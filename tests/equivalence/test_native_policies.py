"""Policies that observe or choose, in models of one native call a step: no module runs, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvloom
from kvloom.cache import Codec
from kvloom.cache.retention import Retention
from kvloom.engine import Engine
from kvloom.language_model.model import LanguageModel
from kvloom.models import AttentionInterfaceBinding
from kvloom.native import Library, native
from thread_counts import on_threads
from tiny import tiny_model

if not isinstance(native(), Library):
    pytest.skip("there are no native kernels here", allow_module_level=True)

PROMPT = [(7 * i * i + 3 * i) % 131 for i in range(70)]
OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": None, "output_logits": True}
POLICIES = {
    "HeavyHitters": lambda budget: kvloom.HeavyHitters(budget_tokens=budget, recent_tokens=8),
    "LastQuery": lambda budget: kvloom.LastQuery(budget_tokens=budget),
    "CompressedPrompt": lambda budget: kvloom.CompressedPrompt(budget_tokens=budget, observed_tokens=12),
    "TopBlocks": lambda budget: kvloom.TopBlocks(budget_tokens=budget),
}
every_policy = pytest.mark.parametrize("name", POLICIES)
every_codec = pytest.mark.parametrize("codec", ["native", "int8"])


@cache
def binding(family: str, dtype: torch.dtype) -> AttentionInterfaceBinding:
    found = kvloom.attach(tiny_model(family, dtype=dtype), budget_bytes=1 << 20).engine.binding
    assert isinstance(found, AttentionInterfaceBinding) and found.bit_identical, "the test is about native models"
    return found


def language_model(own: AttentionInterfaceBinding, codec: Codec = "native", **options: Any) -> LanguageModel:
    options = {"block_tokens": 4, "block_bounds": True} | options
    return LanguageModel(Engine(own, budget_bytes=1 << 21, codec=codec, **options), None, None)


@contextmanager
def without_modules(own: AttentionInterfaceBinding) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "forward_by_modules", lambda *_, **__: pytest.fail("a module ran"))
        yield


@every_codec
@every_policy
def test_a_policy_decides_as_it_does_where_the_models_modules_run(name: str, codec: Codec) -> None:
    own, policy = binding("qwen2", torch.float32), POLICIES[name](24)
    prompts = [PROMPT, PROMPT[:9], PROMPT[3:50]]

    def decode() -> list[Any]:
        lm = language_model(own, codec, step_tokens=32)
        beams = lm.beam_search(PROMPT[:40], num_beams=3, num_return_sequences=3, retention=policy, **OPTIONS)
        return [*lm.generate(prompts, retention=policy, **OPTIONS), *beams]

    with without_modules(own):
        found = decode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "native", None)
        expected = decode()
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.usage.dropped_tokens == other.usage.dropped_tokens
        # A number on the border of two codes may take either of them.
        tolerance = 1e-4 if codec == "native" else 2e-3
        torch.testing.assert_close(one.logits, other.logits, rtol=tolerance, atol=tolerance)


@every_codec
@every_policy
def test_a_budget_as_large_as_the_sequence_gives_the_bits_of_the_full_cache(name: str, codec: Codec) -> None:
    own, policy = binding("llama", torch.bfloat16), POLICIES[name](128)
    with without_modules(own):
        kept = language_model(own, codec, step_tokens=16).generate(PROMPT, retention=policy, **OPTIONS)
        beams = language_model(own, codec).beam_search(PROMPT, num_beams=3, retention=policy, **OPTIONS)
    full = language_model(own, codec, block_bounds=False).generate(PROMPT, **OPTIONS)
    full_beams = language_model(own, codec, block_bounds=False).beam_search(PROMPT, num_beams=3, **OPTIONS)
    assert kept.token_ids == full.token_ids and torch.equal(kept.logits, full.logits)
    assert torch.equal(beams[0].logits, full_beams[0].logits)


@settings(max_examples=15, deadline=None)
@given(
    family=st.sampled_from(["llama", "qwen3"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    codec=st.sampled_from(["native", "int8"]),
    policy=st.builds(lambda name, budget: POLICIES[name](budget), st.sampled_from(list(POLICIES)), st.just(32)),
    tokens=st.integers(13, len(PROMPT)),
    step_tokens=st.integers(1, 80),
    mates=st.lists(
        st.tuples(st.integers(13, 40), st.none() | st.sampled_from([own(24) for own in POLICIES.values()])), max_size=3
    ),
    count=st.integers(1, 2),
    fragments=st.lists(st.integers(1, 30), max_size=3),
)
def test_logits_are_the_same_bits_whatever_surrounds_them(
    family: str,
    dtype: torch.dtype,
    codec: Codec,
    policy: Retention,
    tokens: int,
    step_tokens: int,
    mates: list[tuple[int, Retention | None]],
    count: int,
    fragments: list[int],
) -> None:
    """Beside requests of other policies, and of none, in chunks, by any number of threads, in a fragmented pool."""
    own = binding(family, dtype)
    together = language_model(own, codec, step_tokens=step_tokens)
    with without_modules(own):
        with on_threads(1):
            expected = language_model(own, codec).generate(PROMPT[:tokens], retention=policy, **OPTIONS)
        with on_threads(count):
            kept = [together.prefill([(own * 5 + i) % 131 for i in range(own)]) for own in fragments]
            del kept[::2]
            others = [
                together.stream([(11 * n + 3 * i) % 131 for i in range(n)], retention=its, max_new_tokens=40)
                for n, its in mates
            ]
            found = together.generate(PROMPT[:tokens], retention=policy, **OPTIONS)
            del others
    assert found.token_ids == expected.token_ids
    assert torch.equal(found.logits, expected.logits)


@every_codec
@every_policy
def test_a_beam_has_the_logits_that_its_tokens_have_alone(name: str, codec: Codec) -> None:
    own, policy = binding("llama", torch.bfloat16), POLICIES[name](24)
    lm = language_model(own, codec)
    for beam in lm.beam_search(PROMPT, num_beams=3, num_return_sequences=2, retention=policy, **OPTIONS):

        def force(token_ids: torch.Tensor, scores: torch.Tensor, chosen: list[int] = beam.token_ids) -> torch.Tensor:
            forced = torch.full_like(scores, -torch.inf)
            forced[:, chosen[token_ids.shape[1] - len(PROMPT)]] = 0
            return forced

        alone = lm.generate(PROMPT, logits_processor=[force], retention=policy, **OPTIONS)
        assert alone.token_ids == beam.token_ids and torch.equal(alone.logits, beam.logits)


@every_policy
def test_to_look_inside_changes_no_decision_and_no_score_of_a_policy(name: str) -> None:
    """The modules, which show, and the kernels, which go on, do not both count what was observed."""
    own, policy = binding("llama", torch.float32), POLICIES[name](24)
    plain, seen = (
        language_model(own).generate(PROMPT, retention=policy, output_hidden_states=looks, **OPTIONS)
        for looks in (False, True)
    )
    assert torch.equal(plain.logits, seen.logits) and plain.usage.dropped_tokens == seen.usage.dropped_tokens
    scores = [out.context._holding.cached.retained.scores for out in (plain, seen)]
    assert all(np.array_equal(one, other) for one, other in zip(*scores, strict=True))
