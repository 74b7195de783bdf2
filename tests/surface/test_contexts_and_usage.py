"""What a user sees of the cache: contexts, usage, the hand-driven cache, and that nothing is leaked."""

from __future__ import annotations

import gc
from collections.abc import Callable
from math import ceil
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessor

import kvloom
import tiny
from kvloom import CacheFull, CacheMismatch, LanguageModel


@pytest.fixture
def lm() -> LanguageModel:
    return kvloom.attach(tiny.tiny_model("llama", max_position_embeddings=4096), budget_bytes=8 << 20)


def ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(90, (count,), generator=generator).tolist()


def held_by_tables(lm: LanguageModel) -> int:
    """Blocks that anything but the prefix index holds."""
    assert lm.engine.cache is not None
    return sum(g.pool.total - g.pool.free - len(g.index.idle()) for g in lm.engine.cache.groups)


@pytest.mark.parametrize(("prompt", "new"), [(100, 33), (96, 32), (17, 64), (1, 5)])
@pytest.mark.parametrize("options", [{"num_beams": 8}, {"num_return_sequences": 8, "do_sample": True}])
def test_eight_candidates_compute_and_store_their_prompt_once(lm, prompt: int, new: int, options: dict) -> None:
    out = lm.generate(ids(prompt), max_new_tokens=new, **options)
    usage = (out[0] if isinstance(out, list) else out).usage
    assert usage.computed_prompt_tokens == prompt
    assert usage.peak_blocks <= ceil(prompt / 16) + 8 * (ceil(new / 16) + 1)
    assert usage.peak_bytes == usage.peak_blocks * lm.engine.cache.layout.bytes_per_row_of_blocks


def test_the_same_prompt_again_computes_at_most_one_block_of_it(lm) -> None:
    for length in (1_100, 1_104, 16, 17, 1):
        prompt = ids(length, seed=length)
        first, second = (lm.generate(prompt, max_new_tokens=3) for _ in range(2))
        assert first.usage.computed_prompt_tokens == length
        assert second.usage.computed_prompt_tokens <= 16
        assert second.usage.cached_prompt_tokens + second.usage.computed_prompt_tokens == length
        assert second.token_ids == first.token_ids


def test_a_prompt_that_shares_its_beginning_computes_the_rest(lm) -> None:
    prompt = ids(1_100)
    lm.generate(prompt, max_new_tokens=2)
    usage = lm.generate(prompt[:1_000] + ids(100, seed=1), max_new_tokens=2).usage
    assert usage.computed_prompt_tokens <= 116


def test_a_changed_model_never_meets_an_old_cache() -> None:
    model = tiny.tiny_model("llama")
    lm = kvloom.attach(model)
    lm.generate(ids(50), max_new_tokens=2)
    model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    out = lm.generate(ids(50), max_new_tokens=6)
    assert out.usage.cached_prompt_tokens == 0
    assert out.token_ids == lm.generate(ids(50), max_new_tokens=6, use_cache=False).token_ids


def test_a_context_is_continued_without_computing_it_again(lm) -> None:
    context = lm.prefill(ids(70))
    whole = lm.generate(ids(70) + ids(9, seed=1), max_new_tokens=5, use_cache=False)
    for _ in range(2):
        out = lm.generate(ids(9, seed=1), context=context, max_new_tokens=5)
        assert out.token_ids == whole.token_ids
        assert out.usage.cached_prompt_tokens == 70 and out.usage.computed_prompt_tokens == 9
    assert context.tokens == 70


def test_a_generation_continues_where_it_ended(lm) -> None:
    first = lm.generate(ids(20), max_new_tokens=7)
    more = lm.generate(context=first.context, max_new_tokens=5)
    assert first.token_ids + more.token_ids == lm.generate(ids(20), max_new_tokens=12).token_ids
    assert more.usage.computed_prompt_tokens == 1  # the last token was chosen, but never run


def test_beam_hypotheses_can_be_continued(lm) -> None:
    best = lm.beam_search(ids(40), num_beams=3, max_new_tokens=20)[0]
    more = lm.generate(context=best.context, max_new_tokens=4)
    assert more.token_ids == lm.generate(ids(40) + best.token_ids, max_new_tokens=4, use_cache=False).token_ids


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "phi3_longrope"])
def test_contexts_fork_and_truncate_without_touching_each_other(family: str) -> None:
    lm = kvloom.attach(tiny.tiny_model(family))
    context = lm.prefill(ids(45))
    expected = lm.generate(context=context, max_new_tokens=6).token_ids
    fork, short = context.fork(), context.truncate(30)
    lm.generate(ids(8, seed=2), context=fork, max_new_tokens=4)
    out = lm.generate(ids(8, seed=3), context=short, max_new_tokens=6)
    assert out.token_ids == lm.generate(ids(45)[:30] + ids(8, seed=3), max_new_tokens=6, use_cache=False).token_ids
    assert lm.generate(context=context, max_new_tokens=6).token_ids == expected


def test_the_hand_driven_cache_gives_the_rows_of_an_uncached_forward(lm) -> None:
    tokens = ids(40)
    whole = lm.binding.forward_uncached(torch.tensor([tokens]), last=None)[0]
    context, start = None, 0
    for count in (1, 17, 5, 1, 16):
        step = lm.extend(context, tokens[start : start + count], start=start)
        assert step.logits.shape == (count, lm.vocab_size)
        torch.testing.assert_close(step.logits, whole[start : start + count], atol=1e-4, rtol=1e-4)
        context, start = step.context, start + count
    assert context.tokens == 40


@pytest.mark.parametrize("start", [0, None, 20])
def test_extending_a_context_by_the_whole_input_is_a_mismatch(lm, start: int | None) -> None:
    context = lm.prefill(ids(20))
    before = held_by_tables(lm)
    with pytest.raises(CacheMismatch, match=r"token_ids\[20:\]"):
        lm.extend(context, [*ids(20), 1, 2], start=start)
    assert held_by_tables(lm) == before


def test_blocks_are_freed_when_the_last_holder_is_dropped(lm) -> None:
    out = lm.generate(ids(60), max_new_tokens=5)
    context = out.context
    assert held_by_tables(lm) == 4
    del out
    gc.collect()
    assert held_by_tables(lm) == 4
    context.close()
    assert held_by_tables(lm) == 0
    with pytest.raises(kvloom.errors.ContextClosed):
        lm.generate([1], context=context)


def test_results_that_nobody_continues_do_not_fill_the_pool(lm) -> None:
    small = kvloom.attach(lm.binding.model, budget_bytes=12 * lm.engine.cache.layout.bytes_per_row_of_blocks)
    kept = [small.generate(ids(60, seed=n), max_new_tokens=5) for n in range(6)]
    first = small.generate(context=kept[0].context, max_new_tokens=3)
    assert first.token_ids == lm.generate(ids(60) + kept[0].token_ids, max_new_tokens=3).token_ids


def test_contexts_that_users_hold_are_never_taken(lm) -> None:
    small = kvloom.attach(lm.binding.model, budget_bytes=12 * lm.engine.cache.layout.bytes_per_row_of_blocks)
    context = small.prefill(ids(100))
    with pytest.raises(CacheFull, match=r"needs 6 blocks.*has 12, 7 of them held by contexts"):
        small.generate(ids(90, seed=1), max_new_tokens=5)
    assert small.generate(context=context, max_new_tokens=3).usage.computed_prompt_tokens == 1


def test_requests_that_do_not_fit_together_wait_and_none_is_lost(lm) -> None:
    small = kvloom.attach(lm.binding.model, budget_bytes=9 * lm.engine.cache.layout.bytes_per_row_of_blocks)
    prompts = [ids(40 + n, seed=n) for n in range(7)]
    for out, prompt in zip(small.generate(prompts, max_new_tokens=20), prompts, strict=True):
        assert out.token_ids == lm.generate(prompt, max_new_tokens=20).token_ids


def test_a_request_larger_than_the_pool_is_refused_before_any_work(lm) -> None:
    small = kvloom.attach(lm.binding.model, budget_bytes=9 * lm.engine.cache.layout.bytes_per_row_of_blocks)
    with pytest.raises(CacheFull, match=r"needs 10 blocks of 16 tokens; the pool has 9 .*budget_bytes"):
        small.generate([ids(20), ids(150)], max_new_tokens=5)
    assert held_by_tables(small) == 0 and not small.engine._requests


class Raises(LogitsProcessor):
    """Raises once a sequence has reached a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= self.length:
            raise RuntimeError("the processor raises")
        return scores


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"use_cache": False}])
def test_a_raising_logits_processor_passes_through_and_leaks_nothing(lm, options: dict) -> None:
    with pytest.raises(RuntimeError, match="the processor raises"):
        lm.generate([ids(20), ids(31)], max_new_tokens=30, logits_processor=[Raises(40)], **options)
    assert held_by_tables(lm) == 0 and not lm.engine._requests
    assert len(lm.generate(ids(20), max_new_tokens=3).token_ids) == 3


def test_a_failing_request_does_not_disturb_the_streams_beside_it(lm) -> None:
    expected = lm.generate(ids(25), max_new_tokens=12).token_ids
    stream = lm.stream(ids(25), max_new_tokens=12)
    got = [next(stream).token_id for _ in range(4)]
    with pytest.raises(RuntimeError, match="the processor raises"):
        lm.generate(ids(30), max_new_tokens=30, logits_processor=[Raises(33)])
    got += [piece.token_id for piece in stream]
    assert got == expected and stream.result is not None


def test_a_forward_pass_that_fails_leaves_tables_and_counts_as_before(lm, monkeypatch) -> None:
    stream = lm.stream(ids(25), max_new_tokens=12)
    got = [next(stream).token_id for _ in range(4)]
    before = [(g.pool.free, g.pool.references.tolist()) for g in lm.engine.cache.groups]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lm.binding, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lm.engine.step()
    assert before == [(g.pool.free, g.pool.references.tolist()) for g in lm.engine.cache.groups]
    assert got + [piece.token_id for piece in stream] == lm.generate(ids(25), max_new_tokens=12).token_ids


def test_a_stream_that_is_dropped_frees_its_blocks(lm) -> None:
    stream = lm.stream(ids(50), max_new_tokens=20)
    next(stream)
    assert held_by_tables(lm) > 0
    stream.close()
    assert held_by_tables(lm) == 0 and not lm.engine._requests


def test_a_stream_that_the_garbage_collector_drops_in_a_failing_step_frees_its_blocks_once(lm, monkeypatch) -> None:
    def failing(*_: object, **__: object) -> None:
        gc.collect()
        raise RuntimeError("the pass fails after the stream is gone")

    gc.disable()
    try:
        stream = lm.stream(ids(16), max_new_tokens=40)
        next(stream)  # the next step gives it a second block
        stream.itself = stream
        del stream
        with monkeypatch.context() as patched:
            patched.setattr(lm.binding, "forward", failing)
            with pytest.raises(RuntimeError, match="the pass fails"):
                lm.generate(ids(9, seed=1), max_new_tokens=3)
        assert held_by_tables(lm) == 0
    finally:
        gc.enable()


def test_finished_sequences_stop_costing_compute(lm, monkeypatch) -> None:
    ran: list[int] = []
    forward = lm.binding.forward

    def counted(token_ids: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        ran.append(len(token_ids))
        return forward(token_ids, *arguments, **options)

    monkeypatch.setattr(lm.binding, "forward", counted)
    end = lm.generate(ids(10), max_new_tokens=3).token_ids[2]
    ran.clear()
    outs = lm.generate([ids(10), ids(12, seed=1)], max_new_tokens=20, eos_token_id=end)
    lengths = sorted(len(out.token_ids) for out in outs)
    assert lengths[0] <= 3 and ran[lengths[0] :] == [1] * (lengths[1] - lengths[0])


NEEDS_A_FREE_POOL: dict[str, Callable[[LanguageModel, Path], object]] = {
    "generate": lambda small, saved: small.generate([1, 2, 3], max_new_tokens=60),
    "prefill": lambda small, saved: small.prefill(list(range(60, 0, -1))),
    "score": lambda small, saved: small.score([[4] * 60], prompt=[1, 2, 3]),
    "restore": lambda small, saved: small.restore(saved),
    "import_cache": lambda small, saved: small.import_cache(
        range(60), small.binding.model(torch.arange(60)[None], use_cache=True).past_key_values
    ),
}


@pytest.mark.parametrize("call", NEEDS_A_FREE_POOL)
def test_contexts_in_reference_cycles_do_not_keep_the_pool_full(lm: LanguageModel, tmp_path: Path, call: str) -> None:
    lm.prefill(list(range(50, 110))).save(saved := tmp_path / "saved.kv")
    small = kvloom.attach(lm.binding.model, budget_bytes=10 * lm.engine.cache.layout.bytes_per_row_of_blocks)
    gc.disable()
    try:
        cycle = [small.prefill(list(range(1, 90)) + list(range(1, 40)))]
        cycle.append(cycle)
        with pytest.raises(CacheFull):
            NEEDS_A_FREE_POOL[call](small, saved)
        del cycle
        NEEDS_A_FREE_POOL[call](small, saved)
    finally:
        gc.enable()


def test_the_default_budget_holds_eight_beams_of_the_whole_context(stories260k: Path) -> None:
    lm = kvloom.load(stories260k)
    lm.beam_search([1, 403, 407, 261, 378], num_beams=8, max_new_tokens=507, eos_token_id=426, early_stopping=True)
