"""Under int8 nothing but the tokens decides what is computed: not chunks, batch mates, beams, hits or files.

The models run in float64, where no number comes so near to the border of two codes that rounding before it decides.
So what is compared is equal to many digits, as with the native codec, or something is wrong.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import kvloom
import tiny
from kvloom import CacheFull, LanguageModel
from kvloom.attention import Span
from kvloom.attention.sealed_spans import SealedSpans
from kvloom.blocks.runs import FIRST
from kvloom.cache.landing import native_order
from kvloom.cache.store import int8
from kvloom.engine import Engine
from kvloom.errors import InvalidRequest, SnapshotMismatch

FAMILIES = ["llama", "mistral", "gemma2", "gpt2"]  # full attention, a window, both with a soft-cap, no grouped heads
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def again(lm: LanguageModel, **options: Any) -> LanguageModel:
    """The same model on a cold int8 cache."""
    options = {"budget_bytes": 4 << 20, "codec": "int8", **options}
    return LanguageModel(Engine(lm.binding, **options), None, None)


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    model = tiny.tiny_model(request.param, dtype=torch.float64)
    return kvloom.attach(model, codec="int8", budget_bytes=4 << 20)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return kvloom.attach(tiny.tiny_model("llama", dtype=torch.float64), codec="int8", budget_bytes=4 << 20)


def ids(lm: LanguageModel, tokens: int, seed: int = 0) -> list[int]:
    return tiny.random_ids(lm.binding.model, tokens=tokens, seed=seed)


def in_chunks(lm: LanguageModel, token_ids: list[int], chunks: list[int]) -> Tensor:
    """Logits of every token, run in chunks of these sizes; what is left over runs as one more."""
    lm, context, logits = again(lm), None, []
    while token_ids:
        count = min(chunks[0] if chunks else len(token_ids), len(token_ids))
        step = lm.extend(context, token_ids[:count])
        token_ids, chunks, context = token_ids[count:], chunks[1:], step.context
        logits.append(step.logits)
    return torch.cat(logits)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 70),
    chunks=st.lists(st.sampled_from([1, 1, 2, 7, 16, 17, 40]), max_size=12),
    seed=st.integers(0, 9),
)
def test_chunks_change_nothing(lm: LanguageModel, tokens: int, chunks: list[int], seed: int) -> None:
    prompt = ids(lm, tokens, seed)
    torch.testing.assert_close(in_chunks(lm, prompt, chunks), in_chunks(lm, prompt, []), **EXACT)


def test_tokens_one_by_one_are_the_same_as_all_at_once(lm: LanguageModel) -> None:
    prompt = ids(lm, 50)
    torch.testing.assert_close(in_chunks(lm, prompt, [1] * 50), in_chunks(lm, prompt, []), **EXACT)


def test_something_is_lost_and_it_is_little(lm: LanguageModel) -> None:
    prompt = ids(lm, 70)
    own = lm.binding.forward_uncached(torch.tensor([prompt]), last=None)[0]
    found = in_chunks(lm, prompt, [])
    torch.testing.assert_close(found[:16], own[:16], rtol=1e-5, atol=1e-5)  # one block, read natively
    error = (found - own).norm(dim=-1)[16:] / own.norm(dim=-1)[16:]
    assert 1e-6 < float(error.max()) < 0.05


def test_batch_mates_beams_and_prefix_hits_change_nothing(lm: LanguageModel) -> None:
    prompts = [ids(lm, tokens, seed) for seed, tokens in enumerate((3, 16, 41, 64))]
    options = {"max_new_tokens": 20, "output_logits": True, "eos_token_id": None}
    together = again(lm).generate(prompts, **options)
    warm = again(lm)
    for prompt, own in zip(prompts, together, strict=True):
        alone = again(lm).generate(prompt, **options)
        first, second = warm.generate(prompt, **options), warm.generate(prompt, **options)
        assert second.usage.cached_prompt_tokens == (len(prompt) - 1) // 16 * 16
        for other in (own, first, second):
            assert other.token_ids == alone.token_ids
            torch.testing.assert_close(other.logits, alone.logits, **EXACT)
        hypotheses = again(lm).beam_search(prompt, num_beams=3, num_return_sequences=3, **options)
        for beam in hypotheses:
            whole = in_chunks(lm, [*prompt, *beam.token_ids[:-1]], [])
            torch.testing.assert_close(beam.logits, whole[len(prompt) - 1 :].float(), rtol=1e-6, atol=1e-6)


def test_scores_are_those_of_each_continuation_alone(lm: LanguageModel) -> None:
    prompt = ids(lm, 45)
    continuations = [ids(lm, tokens, seed) for seed, tokens in enumerate((1, 2, 9, 30))]
    for own, score in zip(continuations, again(lm).score(continuations, prompt=prompt), strict=True):
        logits = in_chunks(lm, [*prompt, *own[:-1]], [])[len(prompt) - 1 :].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(own)[:, None])[:, 0].tolist()
        assert score.token_logprobs == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("tokens", [5, 32, 33, 47])
def test_a_context_goes_on_as_if_all_had_been_computed_at_once(lm: LanguageModel, tokens: int) -> None:
    prompt, more = ids(lm, tokens), ids(lm, 25, 1)
    own = again(lm)
    context = own.prefill(prompt)
    step = own.extend(context, more)
    torch.testing.assert_close(step.logits, in_chunks(lm, prompt + more, [])[tokens:], **EXACT)
    # Without new tokens the last one runs again: its block is filled anew, from its first token.
    out = own.generate(context=context, max_new_tokens=5, output_logits=True, eos_token_id=None)
    cold = again(lm).generate(prompt, max_new_tokens=5, output_logits=True, eos_token_id=None)
    torch.testing.assert_close(out.logits, cold.logits, **EXACT)


def test_a_context_that_is_cut_inside_a_sealed_block_keeps_its_codes_and_begins_a_new_block(
    llama: LanguageModel,
) -> None:
    own = again(llama)
    whole = own.prefill(ids(llama, 40))
    before = own.engine.cache.store.sealed_keys[0].codes.clone()
    cut = whole.truncate(20)
    step = own.extend(cut, ids(llama, 30, 1))
    (table,) = step.context.tables_for(own.engine).cached.tables
    assert table.runs[:, 1:].tolist() == [[0, 16, 0], [0, 4, 16], [0, 16, 20], [0, 14, 36]]
    held = whole.tables_for(own.engine).cached.tables[0].slots()[:32]
    assert torch.equal(own.engine.cache.store.sealed_keys[0].codes[:, held], before[:, held])
    # The four tokens are read as codes at once, not when the block would have ended, so a little is different.
    cold = in_chunks(llama, [*ids(llama, 20), *ids(llama, 30, 1)], [])[20:]
    assert 1e-6 < float((step.logits - cold).norm() / cold.norm()) < 0.05
    # And what was computed behind the cut is not found by others.
    usage = own.generate([*ids(llama, 20), *ids(llama, 30, 1)], max_new_tokens=1).usage
    assert usage.cached_prompt_tokens == 16


@pytest.mark.parametrize("tokens", [1, 16, 45])
def test_a_restored_context_gives_the_same_bits(lm: LanguageModel, tmp_path: Path, tokens: int) -> None:
    first, second = again(lm), again(lm)
    context = first.prefill(ids(lm, tokens))
    context.save(tmp_path / "a.kv")
    restored = second.restore(tmp_path / "a.kv")
    for more in (ids(lm, 20, 1), ids(lm, 1, 2)):
        mine, theirs = second.extend(restored, more), first.extend(context, more)
        assert torch.equal(mine.logits, theirs.logits)
        restored, context = mine.context, theirs.context


def test_a_snapshot_takes_about_half_the_bytes_and_fits_only_its_codec_and_blocks(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama", dtype=torch.bfloat16, hidden_size=256, num_attention_heads=4)
    by_codec = {codec: kvloom.attach(model, codec=codec, budget_bytes=4 << 20) for codec in ("native", "int8")}
    for codec, own in by_codec.items():
        own.prefill(ids(own, 208)).save(tmp_path / f"{codec}.kv")
    sizes = {codec: (tmp_path / f"{codec}.kv").stat().st_size for codec in by_codec}
    assert sizes["int8"] < 0.6 * sizes["native"]
    with pytest.raises(SnapshotMismatch, match="codec='native'"):
        by_codec["int8"].restore(tmp_path / "native.kv")
    with pytest.raises(SnapshotMismatch, match="codec='int8'"):
        by_codec["native"].restore(tmp_path / "int8.kv")
    with pytest.raises(SnapshotMismatch, match="block_tokens=16"):
        kvloom.attach(model, codec="int8", block_tokens=8, budget_bytes=4 << 20).restore(tmp_path / "int8.kv")


# ---- under a retention policy ------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [60, 250])  # the second outgrows the model, so queries are turned back
def test_sinks_and_window_are_the_same_in_any_chunk(llama: LanguageModel, tokens: int) -> None:
    policy = kvloom.SinkWindow(sink_tokens=3, window_tokens=21)
    prompt = ids(llama, tokens)
    options = {"max_new_tokens": 20, "output_logits": True, "eos_token_id": None, "retention": policy}
    whole, chunked = (again(llama, step_tokens=step).generate(prompt, **options) for step in (512, 11))
    assert whole.usage.dropped_tokens > 0
    assert whole.token_ids == chunked.token_ids
    torch.testing.assert_close(whole.logits, chunked.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        kvloom.SinkWindow(sink_tokens=4, window_tokens=100),
        kvloom.HeavyHitters(budget_tokens=112, recent_tokens=32),
        kvloom.LastQuery(budget_tokens=112),
        kvloom.CompressedPrompt(budget_tokens=112),
        kvloom.TopBlocks(budget_tokens=112),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_a_policy_that_drops_nothing_changes_nothing(llama: LanguageModel, policy: Any) -> None:
    prompt = ids(llama, 70)
    options = {"max_new_tokens": 20, "output_logits": True, "eos_token_id": None}
    kept = again(llama, block_bounds=True).generate(prompt, retention=policy, **options)
    full = again(llama).generate(prompt, **options)
    assert kept.token_ids == full.token_ids
    torch.testing.assert_close(kept.logits, full.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "policy",
    [
        kvloom.HeavyHitters(budget_tokens=48, recent_tokens=16),
        kvloom.LastQuery(budget_tokens=48),
        kvloom.CompressedPrompt(budget_tokens=48),
        kvloom.TopBlocks(budget_tokens=48),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_policies_drop_sealed_blocks_and_their_places_are_free_again(llama: LanguageModel, policy: Any) -> None:
    own = again(llama, block_bounds=True)
    out = own.generate(ids(llama, 100), retention=policy, max_new_tokens=30, eos_token_id=None)
    native = LanguageModel(Engine(llama.binding, budget_bytes=4 << 20, block_bounds=True), None, None)
    same = native.generate(ids(llama, 100), retention=policy, max_new_tokens=30, eos_token_id=None)
    assert out.usage.dropped_tokens == same.usage.dropped_tokens
    assert out.token_ids[:5] == same.token_ids[:5]
    del out
    own.prefill(ids(llama, 5, 1)).close()
    pool = own.engine.cache.groups[0].pool
    assert pool.open_blocks.free == pool.open_blocks.total


# ---- memory ------------------------------------------------------------------------------------------------


def test_a_step_that_fails_leaves_blocks_and_places_as_they_were(llama: LanguageModel, monkeypatch: Any) -> None:
    own = again(llama)
    context = own.prefill(ids(llama, 30))
    group = own.engine.cache.groups[0]
    before = group.pool.free, group.pool.open_blocks.free

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the model failed")

    forward = own.binding.forward
    monkeypatch.setattr(own.binding, "forward", lambda *a, **k: (forward(*a, **k), fails())[1])
    with pytest.raises(RuntimeError, match="the model failed"):
        own.extend(context, ids(llama, 20, 1))
    monkeypatch.undo()
    assert (group.pool.free, group.pool.open_blocks.free) == before
    torch.testing.assert_close(
        own.extend(context, ids(llama, 20, 1)).logits,
        in_chunks(llama, [*ids(llama, 30), *ids(llama, 20, 1)], [])[30:],
        **EXACT,
    )


def test_requests_hold_no_more_than_was_planned_and_the_cache_exactly_what_was(lm: LanguageModel) -> None:
    plan = lm.plan(prompt_tokens=40, max_new_tokens=12, num_beams=3)
    assert plan.allocated_bytes == lm.engine.cache.store.allocated_bytes
    assert (plan.layout, plan.codec) == (lm.engine.cache.layout, "int8")
    results = lm.beam_search(ids(lm, 40), num_beams=3, max_new_tokens=12)
    assert 0 < results[0].usage.peak_bytes <= plan.cache_bytes


def test_one_sequence_holds_to_the_byte_what_was_planned(llama: LanguageModel) -> None:
    usage = again(llama).generate(ids(llama, 37), max_new_tokens=5, eos_token_id=None).usage
    # 41 tokens are run: two sealed blocks and an open one; 3 layers of 2 heads of 12, in float64.
    sealed = 3 * 2 * (16 * 2 * 12 + 2 * (12 + 16))
    assert (
        usage.peak_bytes
        == llama.plan(prompt_tokens=37, max_new_tokens=4).cache_bytes
        == 3 * sealed + 3 * 2 * 16 * 24 * 8
    )


def test_more_open_blocks_than_there_are_places_are_refused_with_the_budget_that_would_do(llama: LanguageModel) -> None:
    own = again(llama)
    places = own.engine.cache.open_blocks
    contexts = [own.prefill(ids(llama, 3, seed)) for seed in range(places)]
    with pytest.raises(
        CacheFull, match=f"needs 1 open blocks; the pool has {places}, {places} of them held"
    ) as refused:
        own.prefill(ids(llama, 3, 999))
    named = int(str(refused.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    assert Engine(own.binding, codec="int8", budget_bytes=named).cache.open_blocks == places + 1
    assert Engine(own.binding, codec="int8", budget_bytes=named - 1).cache.open_blocks == places
    contexts.pop().close()
    # One place is left, so continuations are scored one at a time beside the prompt's... which needs one, too.
    with pytest.raises(CacheFull, match="open blocks"):
        own.score([[1, 2], [3, 4]], prompt=ids(llama, 3, 999))
    contexts.pop().close()
    scores = own.score([[1, 2], [3, 4], [5, 6]], prompt=ids(llama, 3, 999))
    expected = again(llama).score([[1, 2], [3, 4], [5, 6]], prompt=ids(llama, 3, 999))
    assert [own.logprob for own in scores] == pytest.approx([own.logprob for own in expected], abs=1e-9)
    assert own.engine.cache.groups[0].pool.open_blocks.free == 2


def test_many_samples_share_a_prompt_as_natively(llama: LanguageModel) -> None:
    options = {"do_sample": True, "seed": 3, "max_new_tokens": 20, "eos_token_id": None, "top_k": 0, "top_p": 1.0}
    several = again(llama).generate(ids(llama, 40), num_return_sequences=6, **options)
    assert len({tuple(own.token_ids) for own in several}) > 1
    assert several[0].usage.computed_prompt_tokens == 40


# ---- verify ------------------------------------------------------------------------------------------------


def test_verify_compares_what_must_be_equal_and_says_what_the_codec_costs(lm: LanguageModel) -> None:
    report = lm.verify(max_new_tokens=20)
    assert report.ok and report.codec == "int8"
    assert {check.verdict for check in report.checks} <= {"equal", "bit-identical"}
    assert [check.reference for check in report.checks[:3]] == ["recomputed"] * 3
    assert report.cost is not None and 0 < report.cost.mean_divergence < 0.1
    assert "int8 costs, against the uncached model" in str(report)
    assert report.to_dict()["cost"]["tokens"] == report.cost.tokens == 60


@pytest.mark.parametrize("family", tiny.LENGTH_DEPENDENT_ROPE_FAMILIES)
def test_verify_recomputes_each_token_under_the_rotary_factors_that_it_had(family: str) -> None:
    """The longest of the prompts crosses the length at which they change."""
    report = kvloom.attach(tiny.tiny_model(family), codec="int8").verify()
    assert report.ok, str(report)
    assert report.cost is not None and report.cost.max_divergence < 0.1


@pytest.mark.parametrize(
    "mistake", ["a chunk reads native blocks", "a chunk's scales are coarser", "a part is not read"]
)
def test_verify_finds_rows_that_read_other_numbers_than_they_should(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    encode, masked = int8.encode_keys, SealedSpans._masked
    if mistake == "a chunk reads native blocks":

        def read_natively(spans: SealedSpans, source: Any, runs: Any, seen: Any, made: list[Span]) -> None:
            masked(spans, source, runs, seen, made)
            own = source.written
            if runs[0, FIRST] == own.runs[0, FIRST]:
                slots = native_order(own, 0, own.earlier)[own.block_of_token < own.block_of_token[-1]]
                made[-1] = replace(made[-1], slots=torch.from_numpy(slots)[None], native=True)

        monkeypatch.setattr(SealedSpans, "_masked", read_natively)
    elif mistake == "a part is not read":
        monkeypatch.setattr(SealedSpans, "_masked", lambda *_: [])
    else:
        monkeypatch.setattr(
            int8, "encode_keys", lambda own: encode(own if own.shape[1] == 1 else own.bfloat16().to(own.dtype))
        )
    assert not llama.verify([ids(llama, 60)], max_new_tokens=20).ok


def test_a_codec_that_does_not_exist_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(InvalidRequest, match="codec=int4"):
        kvloom.load("no-such-model", codec="int4")
    with pytest.raises(InvalidRequest, match="codec=int4"):
        kvloom.plan(codec="int4")


def test_a_model_whose_attention_is_not_ours_is_refused_in_one_sentence() -> None:
    with pytest.raises(InvalidRequest, match=r"computes its attention itself.*Use codec='native'"):
        kvloom.attach(lambda token_ids: torch.zeros(*token_ids.shape, 9), vocab_size=9, codec="int8")
