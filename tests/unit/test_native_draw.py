"""Drawing without sorting draws what transformers' filters and the cumulative distribution draw."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from kvloom.decoding.logits import split_off_limits
from kvloom.native.draw import Limits, draw, filtered, invert_cdf, plain_draw
from kvloom.native.library import load
from native_targets import targets
from thread_counts import on_threads

LIMITS = st.builds(
    Limits,
    temperature=st.sampled_from([1.0, 0.3, 0.7, 1.4]),
    top_k=st.sampled_from([0, 1, 2, 20, 50, 1_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.05]),
)


def as_transformers(scores: Tensor, limits: Limits) -> Tensor:
    """Its own filters, in its order."""
    filters = [hf.TemperatureLogitsWarper(limits.temperature)]
    filters += [hf.TopKLogitsWarper(limits.top_k)] if limits.top_k else []
    filters += [hf.TopPLogitsWarper(limits.top_p)] if limits.top_p < 1 else []
    for own in filters:
        scores = own(None, scores)
    return scores


def made(rows: int, vocab: int, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocab, generator=generator), torch.rand(
        rows, generator=generator, dtype=torch.float64
    )


@settings(max_examples=60, deadline=None)
@given(
    limits=LIMITS,
    vocab=st.integers(1, 4_000),
    scale=st.sampled_from([0.1, 1.0, 8.0, 60.0]),
    forbidden=st.sampled_from([0.0, 0.5, 0.99]),
    threads=st.integers(1, 2),
    seed=st.integers(0, 999),
)
def test_what_is_drawn_is_what_transformers_leaves(
    limits: Limits, vocab: int, scale: float, forbidden: float, threads: int, seed: int
) -> None:
    logits, uniforms = made(3, vocab, scale, seed)
    logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < forbidden] = -torch.inf
    with on_threads(threads):
        tokens, possible = draw(logits, uniforms, limits)
        one_for_all = draw(logits[:1].expand(3, -1), uniforms, limits)[0]
        alone = [int(draw(logits[:1], number[None], limits)[0]) for number in uniforms]
    assert torch.equal(possible, (logits > -torch.inf).any(dim=-1))
    left = as_transformers(logits, limits)
    expected, _ = invert_cdf(left, uniforms)
    # Weights are float32, so a number on the border of two tokens may draw either.
    sure = invert_cdf(left, uniforms - 1e-5)[0] == invert_cdf(left, uniforms + 1e-5)[0]
    sure &= possible & ((uniforms > 1e-5) & (uniforms < 1 - 1e-5))
    assert torch.equal(tokens[sure], expected[sure])
    assert torch.equal(one_for_all, torch.tensor(alone))


@pytest.mark.parametrize("target", targets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_target_draws_the_same_from_a_large_vocabulary(target: str, dtype: torch.dtype) -> None:
    for index, limits in enumerate((Limits(), Limits(0.7, 20, 0.8), Limits(1.0, 0, 0.9), Limits(1.3, 500, 1.0))):
        for scale in (0.5, 4.0):
            logits, uniforms = made(2, 50_003, scale, index)
            tokens, possible = draw(logits.to(dtype), uniforms, limits, load(target))
            expected, _ = plain_draw(logits.to(dtype), uniforms, limits)
            assert possible.all() and torch.equal(tokens, expected)


def test_the_plain_filters_are_those_of_transformers() -> None:
    for index, limits in enumerate(
        (Limits(0.5, 7, 1.0), Limits(1.0, 0, 0.7), Limits(1.5, 40, 0.9), Limits(1.0, 900, 1))
    ):
        logits, _ = made(4, 300, 3.0, index)
        assert torch.equal(filtered(logits, limits), as_transformers(logits, limits))


def test_equally_likely_tokens_are_drawn_equally_often_and_top_k_keeps_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    uniforms = torch.rand(9_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, _ = draw(logits.expand(9_000, -1), uniforms, Limits(top_k=2))
    counts = Counter(tokens.tolist())
    assert set(counts) == {1, 2, 3} and max(counts.values()) - min(counts.values()) < 300


def test_where_there_is_no_distribution_nothing_is_possible() -> None:
    logits = torch.randn(4, 40)
    logits[0, 3], logits[1, 9], logits[2] = torch.nan, torch.inf, -torch.inf
    for limits in (Limits(), Limits(0.7, 5, 0.9)):
        tokens, possible = draw(logits, torch.full((4,), 0.5, dtype=torch.float64), limits)
        assert possible.tolist() == [False, False, False, True] and (tokens >= 0).all()


def test_only_the_filters_at_the_end_become_limits() -> None:
    bias = hf.SequenceBiasLogitsProcessor({(3,): 1.0})
    last = [hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(5), hf.TopPLogitsWarper(0.8)]
    assert split_off_limits([bias, *last]) == ([bias], Limits(0.7, 5, 0.8))
    assert split_off_limits(last[:2]) == ([], Limits(0.7, 5))
    several = [last[0], last[1], hf.MinPLogitsWarper(0.1)]
    assert split_off_limits(several) == (several, Limits())
