"""`verify` passes what is right, fails what is wrong, and tells rounding from a mistake."""

from __future__ import annotations

import gc
import json
import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import kvloom
import tiny
from kvloom.attention import reference as specification
from kvloom.attention import torch_ops
from kvloom.attention.native import NativeAttention
from kvloom.cache import KVCache
from kvloom.cache.store import Store
from kvloom.cli import kvloom as command
from kvloom.engine import Engine
from kvloom.errors import InvalidRequest, InvalidTokens, NumericalError, PromptTooLong
from kvloom.native import Library, native
from kvloom.verify import Report
from kvloom.verify.compare import Decoded, compare_sequences
from kvloom.verify.differences import worst

CHECKS = [
    ("greedy", "uncached", "cached"),
    ("sampling", "uncached", "cached"),
    ("beam search", "uncached", "cached"),
    ("greedy", "cold", "warm prefix"),
    ("greedy", "one chunk", "many"),
    ("greedy", "alone", "in a batch"),
]

OWN = ("greedy", "own forward", "ours")
"""A seventh one, where the uncached runs go through native kernels as well."""

BY_MODULES = "granite"
"""A family that native kernels do not know as a whole: its attention and its store are called from Python."""

NATIVE = isinstance(native(), Library)


def attach(family: str = "llama", **changes: Any) -> kvloom.LanguageModel:
    return kvloom.attach(tiny.tiny_model(family, **changes), budget_bytes=1 << 20)


def failed(report: Report) -> set[str]:
    return {f"{own.method}: {own.reference}, {own.other}" for own in report.checks if own.verdict == "failed"}


# ---- what is right passes ----------------------------------------------------------------------------------------


def test_a_real_model_is_verified_in_all_six_ways(stories260k: Path) -> None:
    lm = kvloom.load(stories260k)
    report = lm.verify()
    assert report.ok
    assert [(own.method, own.reference, own.other) for own in report.checks] == CHECKS + [OWN] * NATIVE
    for own in report.checks:
        assert own.equal_tokens == own.tokens and own.divergence is None
        assert own.tolerance == own.relative_tolerance * own.scale
        assert own.margin > own.max_difference
        if NATIVE and own.reference != "own forward":
            assert own.verdict == "bit-identical" and own.same_bits and own.max_difference == own.tolerance == 0
        else:
            assert own.verdict == "equal" and own.max_difference < 1e-4 < own.tolerance < 1e-3
    assert report.prompt_tokens[1] > 16 and report.prompt_tokens[2] > 48, "more than a block, more than two chunks"
    assert [own.tokens for own in report.checks] == [72, 72, 288, 72, 72, 72] + [72] * NATIVE
    assert "64 of 77 prompt tokens found" in report.checks[3].detail


@pytest.mark.parametrize("family", ["gemma3", "llama_dynamic_rope", "gpt_oss"])
def test_models_of_other_kinds_are_verified_without_a_tokenizer(family: str) -> None:
    report = attach(family).verify(max_new_tokens=18)
    assert report.ok, str(report)
    assert {own.verdict for own in report.checks} <= {"equal", "bit-identical"}


@pytest.mark.parametrize("context", [12, 128])
def test_a_model_with_a_short_context_is_verified_within_it(context: int) -> None:
    report = attach(max_position_embeddings=context).verify()
    assert report.ok
    assert max(report.prompt_tokens) + report.max_new_tokens <= context


@pytest.mark.parametrize("block_tokens", [1, 20])
def test_blocks_of_any_size_are_verified(block_tokens: int) -> None:
    lm = kvloom.attach(tiny.tiny_model("llama"), budget_bytes=1 << 20, block_tokens=block_tokens)
    report = lm.verify(max_new_tokens=10)
    assert report.ok
    assert max(report.prompt_tokens) > 2 * block_tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_in_16_bits_near_ties_are_reported_and_no_failure(dtype: torch.dtype) -> None:
    """Of a random model's close logits some turn by rounding; which ones depends on the machine."""
    report = attach("qwen2", dtype=dtype).verify(max_new_tokens=16)
    assert report.ok, str(report)
    for own in report.checks:
        if own.divergence is not None:
            assert own.verdict == "near tie" and own.equal_tokens < own.tokens
            assert own.divergence.margin <= 2 * own.divergence.difference <= 2 * own.tolerance
            assert "is explained by a difference of" in str(report)


def test_a_callable_has_nothing_to_compare_and_says_so() -> None:
    lm = kvloom.attach(lambda token_ids: torch.zeros(*token_ids.shape, 7), vocab_size=7)
    report = lm.verify()
    assert report.ok and report.checks == ()
    assert str(report) == "nothing to compare: a callable has no cache, and is always run uncached."


def test_prompts_may_be_given(stories260k: Path) -> None:
    lm = kvloom.load(stories260k)
    report = lm.verify(["Once upon a time", [1, 2, 3]], max_new_tokens=4)
    assert report.ok and report.prompt_tokens == (5, 3)
    assert lm.verify([7, 8], max_new_tokens=2).prompt_tokens == (2,)
    with pytest.raises(InvalidTokens):
        lm.verify([[1, 999]])
    with pytest.raises(PromptTooLong):
        lm.verify([1] * 500)


@pytest.mark.parametrize("new", [0, -3, True, 253])
def test_a_number_of_tokens_that_cannot_be_is_refused(new: int) -> None:
    with pytest.raises(InvalidRequest, match="max_new_tokens"):
        attach().verify(max_new_tokens=new)


# ---- it leaves nothing behind --------------------------------------------------------------------------------------


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[KVCache]]:
    """Every cache that is made."""
    made: list[weakref.ref[KVCache]] = []
    build = KVCache.__init__

    def watched(self: KVCache, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        made.append(weakref.ref(self))

    monkeypatch.setattr(KVCache, "__init__", watched)
    return made


def test_nothing_stays_allocated_and_contexts_are_not_touched(caches: list[weakref.ref[KVCache]]) -> None:
    lm = attach()
    context = lm.prefill(list(range(40)))
    before = [(group.pool.free, group.pool.references.tolist()) for group in lm.engine.cache.groups]
    caches.clear()
    most = 0

    def watch(*_: object) -> None:
        nonlocal most
        alive = [cache for ref in caches if (cache := ref()) is not None]
        most = max(most, sum(cache.store.allocated_bytes for cache in alive))

    assert lm.verify(max_new_tokens=5, on_progress=watch).ok
    assert before == [(group.pool.free, group.pool.references.tolist()) for group in lm.engine.cache.groups]
    assert not lm.engine._requests and lm.engine.listeners == []
    assert len(caches) > 10 and all(ref() is None for ref in caches), "freed at once, without the garbage collector"
    assert most <= 32 * lm.engine.cache.layout.bytes_per_row_of_blocks, "one small cache at a time"
    assert lm.generate([1], context=context, max_new_tokens=1).usage.cached_prompt_tokens == 40


def test_a_full_pool_does_not_stand_in_its_way() -> None:
    lm = kvloom.attach(tiny.tiny_model("llama"), budget_bytes=60_000)
    contexts = [lm.prefill([n] * 16) for n in range(lm.engine.cache.blocks)]
    assert lm.verify(max_new_tokens=5).ok
    assert all(context.cached_tokens == 16 for context in contexts)


def test_an_error_in_the_middle_leaves_nothing_either(caches: list[weakref.ref[KVCache]]) -> None:
    model = tiny.tiny_model("llama")
    lm = kvloom.attach(model, budget_bytes=1 << 20)
    caches.clear()

    def spoil(what: str, done: int, total: int) -> None:
        if done == 3:
            model.lm_head.weight.fill_(torch.nan)

    with pytest.raises(NumericalError):
        lm.verify(on_progress=spoil)
    gc.collect()  # a traceback is a cycle
    assert caches and all(ref() is None for ref in caches)
    assert not lm.engine._requests


def test_progress_counts_every_run() -> None:
    seen: list[tuple[str, int, int]] = []
    attach().verify(max_new_tokens=2, on_progress=lambda *told: seen.append(told))
    assert [done for _, done, _ in seen] == list(range(25))
    assert {total for *_, total in seen} == {25}


# ---- what is wrong fails, and the check says which ---------------------------------------------------------------


def test_attention_that_misses_the_last_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of more than a block reads its keys but the last 16."""
    lm = attach(BY_MODULES)
    attend = specification.attend

    def short_sighted(queries: Tensor, keys: Tensor, values: Tensor, plan: Any, **options: Any) -> Tensor:
        keys = keys.clone()
        for source in plan.sources:
            if len(source.runs) > 1:
                block, offset, count, _ = source.runs[-1].tolist()
                first = block * plan.block_tokens + offset
                keys[:, first : first + count] = 0
        return attend(queries, keys, values, plan, **options)

    monkeypatch.setattr(torch_ops, "attend", short_sighted)
    monkeypatch.setattr(
        NativeAttention, "attend", lambda _, *arguments, bounds, **options: short_sighted(*arguments, **options)
    )
    report = lm.verify()
    assert not report.ok
    assert {"greedy: uncached, cached", "sampling: uncached, cached", "beam search: uncached, cached"} <= failed(report)
    first = report.checks[0]
    assert first.divergence is not None and first.divergence.expected != first.divergence.found
    assert first.max_difference > 100 * first.tolerance
    assert "NOT verified: 6 checks" in report.summary()
    assert f"new token {first.divergence.position + 1} is {first.divergence.expected} uncached" in str(report)


def test_keys_in_a_wrong_slot_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = attach(BY_MODULES)
    write = Store.write

    def misplaced(self: Store, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        moved = torch.where(slots % 16 == 7, slots - 1, slots) if layer == 1 else slots
        return write(self, layer, moved, keys, values)

    monkeypatch.setattr(Store, "write", misplaced)
    assert "greedy: uncached, cached" in failed(lm.verify(max_new_tokens=6))


def test_beams_that_write_into_shared_blocks_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without copy-on-write a beam writes into the block of another; one sequence alone does not notice."""
    lm = attach()
    monkeypatch.setattr(Store, "copy", lambda self, group, copies: None)
    report = lm.verify()
    assert failed(report) == {"beam search: uncached, cached"}
    assert re.search(r"beam search, uncached against cached: prompt \d, hypothesis \d: new token \d+ is", str(report))


def test_a_prefix_found_for_other_tokens_fails_where_the_prefix_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = attach()
    open_sequence = KVCache.open

    def forgetful(self: KVCache, tokens: Any = (), **options: Any) -> Any:
        sequence = open_sequence(self, tokens, **options)
        if sequence.tokens:
            self.store.keys[0][:, :16] += 0.5  # somebody wrote into a cached block
        return sequence

    monkeypatch.setattr(KVCache, "open", forgetful)
    assert failed(lm.verify(max_new_tokens=6)) == {"greedy: cold, warm prefix"}


def test_chunks_that_do_not_see_each_other_fail_where_there_are_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = attach()
    forward = type(lm.binding).forward

    def shifted(self: Any, token_ids: Tensor, plan: Any, store: Any, **options: Any) -> Tensor:
        if plan.tokens > len(plan.logit_rows) and int(plan.positions.min()) > 0:
            plan.positions.sub_(1)  # a later chunk is computed one position off
        return forward(self, token_ids, plan, store, **options)

    monkeypatch.setattr(type(lm.binding), "forward", shifted)
    assert failed(lm.verify(max_new_tokens=6)) == {"greedy: cold, warm prefix", "greedy: one chunk, many"}


def test_rows_that_see_their_batch_mates_fail_where_there_is_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = attach()
    forward = type(lm.binding).forward

    def mixed(self: Any, *arguments: Any, **options: Any) -> Tensor:
        logits = forward(self, *arguments, **options)
        return logits + 0.1 * logits.mean(dim=0) if len(logits) == 3 else logits

    monkeypatch.setattr(type(lm.binding), "forward", mixed)
    assert failed(lm.verify(max_new_tokens=6)) == {"greedy: alone, in a batch"}


def test_a_cache_that_gives_no_numbers_fails_where_the_model_gives_some(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = attach(BY_MODULES)
    write = Store.write
    monkeypatch.setattr(Store, "write", lambda self, layer, slots, k, v: write(self, layer, slots, k * torch.nan, v))
    report = lm.verify(max_new_tokens=3)
    assert {own.verdict for own in report.checks} == {"failed"}
    assert "prompt 1: new token 1 is" in str(report) and "the end cached" in str(report)
    json.dumps(report.to_dict())


def test_equal_tokens_do_not_excuse_logits_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = attach()
    forward = type(lm.binding).forward
    monkeypatch.setattr(type(lm.binding), "forward", lambda *a, **o: forward(*a, **o) * 1.001)
    first = lm.verify(max_new_tokens=6).checks[0]
    assert first.verdict == "failed" and first.divergence is None
    assert "logits differ by" in (first.explain() or "")


# ---- near ties -----------------------------------------------------------------------------------------------------


def decoded(token_ids: list[int], logits: Tensor) -> Decoded:
    return Decoded(token_ids=token_ids, logprobs=[], logits=logits, score=0.0, cached_prompt_tokens=0)


def test_a_divergence_is_explained_by_a_difference_that_can_cause_it_and_by_no_smaller_one() -> None:
    reference = torch.tensor([[0.0, 5.0, 1.0], [2.0, 2.0 - 1e-4, 0.0]])
    turned = torch.tensor([[0.0, 5.0, 1.0], [2.0 - 6e-5, 2.0 - 4e-5, 0.0]])
    near = compare_sequences(decoded([1, 0], reference), decoded([1, 1], turned), prompt=2)
    assert (near.equal_tokens, near.tokens) == (1, 2)
    (tie,) = near.divergences
    assert (tie.prompt, tie.position, tie.expected, tie.found) == (2, 1, 0, 1)
    assert (
        tie.explained
        and tie.margin == pytest.approx(1e-4, rel=0.01)
        and tie.difference == pytest.approx(6e-5, rel=0.01)
    )
    (mistake,) = compare_sequences(decoded([1, 0], reference), decoded([1, 1], reference), prompt=0).divergences
    assert not mistake.explained and mistake.difference == 0


def test_only_steps_of_the_same_history_are_compared() -> None:
    reference = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 1.0]])
    other = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-90.0, 90.0]])
    found = compare_sequences(decoded([0, 0, 0], reference), decoded([0, 1, 1], other), prompt=0)
    assert found.max_difference == 3.0 and found.margin == 3.0


def test_a_sampled_token_is_as_near_to_a_tie_as_its_random_number_to_the_border() -> None:
    """With the logits moved by d, a draw can turn only if its margin is at most 2 d."""
    generator = torch.Generator().manual_seed(0)
    model = tiny.tiny_model("llama")
    lm = kvloom.LanguageModel(Engine(kvloom.attach(model).binding, budget_bytes=1 << 20), None, None)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "output_logits": True}
    turned = 0
    for seed in range(12):
        own = Decoded.of(lm.generate([3, 1, 4], seed=seed, **options))
        noise = 0.4 * torch.rand(own.logits.shape, generator=generator) - 0.2

        other_tokens = _redraw(own.logits + noise, seed)
        other = Decoded(
            token_ids=other_tokens, logprobs=[], logits=own.logits + noise, score=0.0, cached_prompt_tokens=0
        )
        for found in compare_sequences(own, other, prompt=0, seed=seed).divergences:
            turned += 1
            assert found.explained and 0 <= found.margin <= 0.4
    assert turned > 3


def _redraw(logits: Tensor, seed: int) -> list[int]:
    from kvloom.decoding.randomness import Uniforms
    from kvloom.native.draw import invert_cdf

    uniforms = Uniforms([seed], torch.device("cpu"))
    return [int(invert_cdf(row[None], uniforms.at(step))[0]) for step, row in enumerate(logits)]


def test_nan_never_passes() -> None:
    reference = torch.tensor([[1.0, 0.0]])
    found = compare_sequences(decoded([0], reference), decoded([0], reference * torch.nan), prompt=0)
    assert math.isnan(found.max_difference)
    assert math.isnan(worst([0.0, math.nan, 2.0])) and worst([0.0, 2.0, 1.0]) == 2.0 and worst([]) == 0.0


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_one_final_line(stories260k: Path) -> None:
    shown = CliRunner().invoke(command, ["verify", "--model", str(stories260k), "--max-new-tokens", "8"])
    assert (shown.exit_code, shown.stderr) == (0, "")
    lines = [line.rstrip() for line in shown.stdout.splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[1] == "float32 on cpu, prompts of 5, 19 and 53 tokens, 8 new tokens, seed 0"
    for method, reference, other in CHECKS:
        own = next(line for line in lines if method in line and f"{reference}, {other}" in line)
        assert own.endswith("bit-identical" if NATIVE else "equal")
    counted = "7 checks, 6 bit-identical, 1 equal" if NATIVE else "6 checks, 6 equal"
    assert lines[-1].startswith(f"verified: {counted}, in ")


def test_the_command_prints_json_alone(stories260k: Path) -> None:
    arguments = ["verify", "--model", str(stories260k), "--max-new-tokens", "4", "--seed", "5", "--json"]
    shown = CliRunner().invoke(command, [*arguments, "--prompt", "Once upon a time"])
    report = json.loads(shown.stdout)
    assert report["ok"] is True and report["seed"] == 5 and report["prompt_tokens"] == [5]
    expected = ["bit-identical"] * 6 + ["equal"] if NATIVE else ["equal"] * 6
    assert [own["verdict"] for own in report["checks"]] == expected
    assert {"margin", "max_difference", "tolerance", "divergence", "equal_tokens"} <= report["checks"][0].keys()


def test_the_command_ends_with_status_1_if_a_check_fails(stories260k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "copy", lambda self, group, copies: None)
    monkeypatch.setattr("kvloom.models.hosted.choosing.prove", lambda binding: 0.0)  # attaching would notice
    arguments = ["verify", "--model", str(stories260k), "--prompt", "Once upon a time"]
    shown = CliRunner().invoke(command, arguments)
    assert shown.exit_code == 1
    assert "FAILED" in shown.stdout.upper() and shown.stdout.splitlines()[-1].startswith("NOT verified: ")
    assert json.loads(CliRunner().invoke(command, [*arguments, "--json"]).stdout)["ok"] is False


# ---- models that multiply rounding -------------------------------------------------------------------------------


def wide_t5(dtype: torch.dtype) -> kvloom.LanguageModel:
    """Without a scale its attention is all or nothing under such weights, and eight layers of it multiply rounding."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 100, "d_model": 128, "d_ff": 256, "d_kv": 64, "num_heads": 2, "num_layers": 8}
    config = T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None, pad_token_id=0)
    model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.normal_(0, 0.25, generator=generator)
    return kvloom.attach(model.to(dtype))


def test_what_wide_random_weights_do_in_float32_is_rounding_and_the_report_says_so() -> None:
    reports = [
        wide_t5(dtype).verify([list(range(3, 23))], max_new_tokens=6) for dtype in (torch.float32, torch.float64)
    ]
    assert not reports[0].ok and reports[1].ok, "what float64 does not show is no mistake"
    assert max(check.max_difference for check in reports[1].checks) < 1e-6
    found = max(check.max_difference for check in reports[0].checks)
    assert reports[0].movement is not None and reports[0].movement > found / 10
    assert "without any cache" in str(reports[0]) and "Verify in float64" in str(reports[0])
    assert reports[1].movement is None and reports[1].advice() is None


def test_a_mistake_in_a_model_that_does_not_multiply_rounding_is_not_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = attach("t5")
    write = Store.write_source
    monkeypatch.setattr(
        Store, "write_source", lambda own, layer, slots, keys, *v: write(own, layer, slots, 1.5 * keys, *v)
    )
    report = lm.verify(max_new_tokens=4)
    assert not report.ok
    assert report.movement is not None and report.movement < 1e-3
    assert report.advice() is None
