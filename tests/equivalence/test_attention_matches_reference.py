"""Attention over the paged store: the operators against the reference, the reference against a plain softmax.

A schedule is drawn: sequences are opened, extended in ragged steps, forked and truncated. Each sequence's keys
and values are also kept as a plain list of tokens, which knows no tables, blocks or spans. The store is full of
NaN to begin with, so that whoever reads a slot that was not written returns NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from attention_bench import HEADS, REACHES, TOLERANCE, Bench, Heads, Step, draw_step
from kvloom.attention import GroupPlan, Span, build_plan, reference, spans, torch_ops
from kvloom.attention.observation import Observation
from kvloom.blocks.runs import expand_runs
from kvloom.cache import Reach


def rows_of(span: Span) -> list[int]:
    """The rows of a span, batch by batch."""
    return list(range(span.rows.start, span.rows.stop)) if isinstance(span.rows, slice) else span.rows.tolist()


def readers(step: Step) -> dict[tuple[int, ...], slice | Tensor]:
    """The slots that are read for several rows at once, by these rows."""
    spans = step.plan.groups[0].spans
    return {tuple(rows_of(span)): span.slots for span in spans if span.batch == 1}


def pairs_read(group: GroupPlan, rows: int, slots: int) -> Tensor:
    """int[rows, slots], how often the spans let a row read a slot."""
    seen = torch.zeros(rows, slots, dtype=torch.int64)
    for span in group.spans:
        own = span.slots if isinstance(span.slots, Tensor) else torch.arange(span.slots.start, span.slots.stop)[None]
        assert own.shape[0] == span.batch
        for batch, queries in enumerate(torch.tensor(rows_of(span)).view(span.batch, -1)):
            mask = torch.ones(len(queries), own.shape[1], dtype=torch.bool)
            if isinstance(span.mask, str):
                mask = mask.tril()
            elif span.mask is not None:
                mask = span.mask[batch] == 0
            for index, row in enumerate(queries):
                seen[row].index_add_(0, own[batch], mask[index].long())
    return seen


def pairs_visible(group: GroupPlan, rows: int, slots: int) -> Tensor:
    """The same by the sources: every visible key of every new token exactly once."""
    seen = torch.zeros(rows, slots, dtype=torch.int64)
    for source in group.sources:
        own = expand_runs(source.runs, group.block_tokens)
        positions = np.concatenate([np.arange(first, first + count) for *_, count, first in source.runs])
        for index in range(source.count):
            position = source.first_position + index
            low = group.reach.first_visible(np.array([position]))[0]
            seen[source.first_row + index, own[(positions >= low) & (positions <= position)]] = 1
    return seen


# ---- over drawn schedules -----------------------------------------------------------------------------------


@pytest.fixture(params=["fused", "plain"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to compute a span: PyTorch's fused operator and the formula."""
    with mock.patch.object(torch_ops, "_FLASH", torch_ops._FLASH if request.param == "fused" else None):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), heads=HEADS, reach=REACHES, block_tokens=st.sampled_from([1, 4, 16]))
def test_whatever_the_schedule_the_operators_give_what_the_reference_gives(
    kernel: str, dtype: torch.dtype, data: st.DataObject, heads: Heads, reach: Reach, block_tokens: int
) -> None:
    bench = Bench(heads, reach=reach, block_tokens=block_tokens, blocks=4096 // block_tokens, dtype=dtype)
    live = [bench.open()]
    bench.cache.groups[0].pool.allocate(1)  # held by nobody here and never written: no index may fall on block 0
    # Low thresholds, so that short sequences are shared and viewed as long ones are.
    shared, view = data.draw(st.sampled_from([(1, 1), (4, 8), (64, 128)]))
    with mock.patch.multiple(spans, MIN_SHARED_TOKENS=shared, MIN_VIEW_TOKENS=view):
        for _ in range(data.draw(st.integers(2, 6))):
            step = draw_step(data, bench, live, [1, 1, 2, 5, 18, 40])
            bench.check(torch_ops.attend, step)
            group = step.plan.groups[0]
            size = (step.plan.tokens, bench.cache.blocks * block_tokens)
            assert torch.equal(pairs_read(group, *size), pairs_visible(group, *size))
            bench.let_go(step)


# ---- by example ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype_of_a_model_is_served_with_and_without_merging(kernel: str, dtype: torch.dtype) -> None:
    bench = Bench(dtype=dtype)
    sequence = bench.open()
    bench.check(torch_ops.attend, bench.step((sequence, 150)))
    others = [bench.fork(sequence) for _ in range(3)]
    merged = bench.step(*((other, 1) for other in others), (sequence, 7))
    assert not merged.plan.groups[0].whole
    assert bench.attend(torch_ops.attend, merged).dtype == dtype
    bench.check(torch_ops.attend, merged)
    short = [bench.open(), bench.open()]
    bench.step((short[0], 3), (short[1], 6))
    masked = bench.step((short[0], 1), (short[1], 1))
    assert isinstance(masked.plan.groups[0].spans[0].mask, Tensor)
    bench.check(torch_ops.attend, masked)


def test_a_prefix_of_eight_beams_is_one_span_and_read_as_a_view(kernel: str) -> None:
    bench = Bench()
    beams = [bench.open()]
    bench.step((beams[0], 130))
    beams += [bench.fork(beams[0]) for _ in range(7)]
    for decoded in range(20):  # past the end of a block
        step = bench.step(*((beam, 1) for beam in beams))
        spans = step.plan.groups[0].spans
        assert readers(step) == {tuple(range(8)): slice(0, 128)}
        assert [span.batch for span in spans] == [1, 8], "the tails are gathered together"
        assert spans[0].mask is None
        if decoded in (0, 19):
            bench.check(torch_ops.attend, step)
    store = bench.cache.store.keys[0]
    assert torch_ops._read(store, spans[0].slots).data_ptr() == store.data_ptr(), "a view, not a copy"


def test_beams_of_two_prompts_share_each_their_own() -> None:
    bench = Bench()
    first, second = bench.open(), bench.open()
    bench.step((first, 96), (second, 80))
    beams = [first, second, bench.fork(first), bench.fork(second), bench.fork(first)]
    step = bench.step(*((beam, 1) for beam in beams))
    assert readers(step) == {(0, 2, 4): slice(0, 96), (1, 3): slice(96, 176)}
    bench.check(torch_ops.attend, step)


def test_beams_that_part_twice_share_what_they_can_at_each_level() -> None:
    bench = Bench()
    root = bench.open()
    bench.step((root, 64))
    left, right = root, bench.fork(root)
    bench.step((left, 64), (right, 64))
    beams = [left, bench.fork(left), right, bench.fork(right), bench.fork(right)]
    step = bench.step(*((beam, 1) for beam in beams))
    assert sorted(readers(step)) == [(0, 1), (0, 1, 2, 3, 4), (2, 3, 4)]
    bench.check(torch_ops.attend, step)


def test_one_sequence_alone_is_a_single_view_over_all_rows(kernel: str) -> None:
    bench = Bench()
    sequence = bench.open()
    step = bench.step((sequence, 40))
    for _ in range(3):
        group = step.plan.groups[0]
        assert group.whole
        assert [span.slots for span in group.spans] == [slice(0, len(sequence.keys))]
        bench.check(torch_ops.attend, step)
        step = bench.step((sequence, 1))


def test_a_window_narrows_the_view_of_a_sequence_alone() -> None:
    bench = Bench(reach=Reach(window_tokens=10), block_tokens=4)
    sequence = bench.open()
    bench.let_go(bench.step((sequence, 40)))
    step = bench.step((sequence, 1))
    assert step.plan.groups[0].spans[0].mask is None
    assert step.plan.groups[0].whole
    bench.check(torch_ops.attend, step)


def test_a_fragmented_sequence_alone_is_gathered_in_one_span() -> None:
    bench = Bench(block_tokens=4)
    first, second = bench.open(), bench.open()
    for _ in range(12):
        bench.step((first, 4), (second, 4))  # their blocks alternate
    step = bench.step((first, 1))
    assert len(step.plan.groups[0].spans) == 1
    bench.check(torch_ops.attend, step)


def test_positions_and_logit_rows_come_from_the_tables() -> None:
    bench = Bench()
    first, second = bench.open(), bench.open()
    bench.step((first, 5))
    extension = bench.cache.extend([(second.cached, 3), (first.cached, 2)])
    step_plan = build_plan(bench.cache, extension, logits=[0, 2])
    assert step_plan.positions.tolist() == [0, 1, 2, 5, 6]
    assert step_plan.logit_rows.tolist() == [3, 4]
    assert step_plan.tokens == 5


def test_a_sink_takes_its_share_even_when_a_query_sees_only_itself(kernel: str) -> None:
    bench = Bench(Heads(sinks=True))
    step = bench.step((bench.open(), 1))
    own = torch.stack(step.sequences[0].values)
    output = bench.attend(torch_ops.attend, step)
    assert (output.abs() < own.repeat_interleave(2, 1).abs()).all()
    bench.check(torch_ops.attend, step)


@settings(max_examples=20)
@given(heads=HEADS, reach=REACHES, counts=st.tuples(*[st.integers(0, most) for most in (1, 7, 30)]))
def test_the_masses_that_policies_observe_are_those_of_the_reference(
    heads: Heads, reach: Reach, counts: tuple[int, int, int]
) -> None:
    bench = Bench(heads, reach=reach, block_tokens=4)
    decodes, continues, begins = (bench.open() for _ in range(3))
    bench.step((decodes, 21), (continues, 6))
    step = bench.step((decodes, 1), (continues, 7), (begins, 30))
    observation = Observation(counts)
    group = replace(step.plan.groups[0], observation=observation)
    arguments = (step.queries, bench.cache.store.keys[0], group)
    observation.add(*arguments, **heads.options())
    expected = reference.attention_mass(*arguments, **heads.options())
    for count, mass, own in zip(counts, observation.masses(), expected, strict=True):
        assert (mass is not None) == (count > 0)
        if mass is not None:
            torch.testing.assert_close(torch.from_numpy(mass), own, **TOLERANCE[torch.float32])
