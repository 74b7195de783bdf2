"""What decoders ask of logits, in one pass over them, is what PyTorch's log-softmax says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.decoding.logprobs import Logprobs
from kvloom.native import Library, native
from kvloom.native.logits import best_continuations, normalizers, plain_best_continuations, plain_normalizers
from thread_counts import on_threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NATIVE_DTYPES = native().dtypes if isinstance(native(), Library) else ()


def _logits(rows: int, vocab: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(3, 20_000),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_normalizers_and_best_continuations_are_those_of_pytorch(
    rows: int, vocab: int, dtype: torch.dtype, threads: int, seed: int
) -> None:
    logits = _logits(rows, vocab, dtype, seed)
    with on_threads(threads):
        own, count = normalizers(logits), min(vocab, 9)
        scores = torch.linspace(-3, 0, rows)
        best = best_continuations(logits, own, scores, count)
        alone = normalizers(logits[-1:])
    assert torch.equal(own.where, logits.float().argmax(dim=-1))
    wanted = torch.log_softmax(logits.double(), dim=-1)
    given_by = (logits.double() - own.largest[:, None]) - own.log_sums[:, None]
    torch.testing.assert_close(given_by, wanted, rtol=0, atol=2e-6)
    assert torch.equal(alone.log_sums[0], own.log_sums[-1]), "a row's bits depend on the row alone"
    logprobs = (logits.float() - own.largest[:, None]) - own.log_sums[:, None]
    exact = logprobs + scores[:, None]
    ranked = exact.flatten().sort(descending=True, stable=True)
    assert torch.equal(best.scores, ranked.values[:count])
    assert torch.equal(best.logprobs, logprobs[best.rows, best.tokens])
    if dtype in NATIVE_DTYPES:
        assert torch.equal(best.rows * vocab + best.tokens, ranked.indices[:count]), "of equal ones the first"


def test_numbers_that_are_none_leave_no_normalizer_and_masked_tokens_weigh_nothing() -> None:
    logits = _logits(4, 50, torch.float32, 1)
    logits[0, 7], logits[1, 9] = torch.nan, torch.inf
    logits[2] = -torch.inf
    logits[3, 10:] = -torch.inf
    for own in (normalizers(logits), plain_normalizers(logits)):
        assert own.log_sums.isnan().tolist() == [True, True, True, False]
        torch.testing.assert_close(own.log_sums[3] + own.largest[3], torch.logsumexp(logits[3], dim=-1))
        best = best_continuations(logits, own, torch.zeros(4), 3)
        assert best.scores.isnan().any() and torch.equal(best.logprobs.isnan(), best.scores.isnan())
    both = [kernel(logits[3:], own_of(logits[3:]), torch.zeros(1), 12) for kernel, own_of in KERNELS]
    assert torch.equal(both[0].scores.isinf(), both[1].scores.isinf()) and int(both[0].scores.isinf().sum()) == 2


KERNELS = ((best_continuations, normalizers), (plain_best_continuations, plain_normalizers))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_log_probability_is_that_of_the_whole_row(dtype: torch.dtype) -> None:
    logits = _logits(3, 5_000, dtype, 2)
    rows, tokens = torch.tensor([0, 2, 2]), torch.tensor([17, 4_999, 0])
    one, whole = Logprobs(logits), Logprobs(logits)
    torch.testing.assert_close(one.of(rows, tokens), whole.all[rows, tokens], rtol=0, atol=2e-6)
    likeliest, logprobs = one.likeliest
    torch.testing.assert_close(logprobs, whole.all.max(dim=-1).values, rtol=0, atol=2e-6)
    assert torch.equal(likeliest, logits.float().argmax(dim=-1))
