"""Sinks, pins and windows in the native kernels: what the reference gives, and the bits that a row has alone."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from attention_bench import HEADS, TOLERANCE, Bench, Heads, Sequence, Step
from kvloom.attention import build_plan, reference
from kvloom.attention.native import NativeAttention
from kvloom.attention.turn import Turn
from kvloom.cache.retention import Held, Retained, SinkWindow
from kvloom.native.library import load
from native_targets import targets
from thread_counts import on_threads

pytestmark = pytest.mark.skipif(not targets(), reason="there is no C++ compiler here")

PINS = ((9, 12), (20, 21), (30, 47), (70, 71), (130, 140))
POLICIES = st.builds(
    SinkWindow,
    sink_tokens=st.sampled_from([0, 2, 4, 66]),
    window_tokens=st.sampled_from([1, 5, 17, 64, 100]),
    pins=st.lists(st.sampled_from(PINS), unique=True).map(tuple),
    reindex=st.booleans(),
)
TURNS = st.builds(
    lambda pairs, first, interleaved: Turn(10.0 ** -torch.arange(pairs).double(), first, interleaved),
    pairs=st.sampled_from([1, 3]),
    first=st.sampled_from([0, 2]),
    interleaved=st.booleans(),
)


@pytest.fixture(params=targets())
def kernels(request: pytest.FixtureRequest) -> NativeAttention:
    return NativeAttention(load(request.param))


def under(sequence: Sequence, policy: SinkWindow, trained: int | None) -> Sequence:
    sequence.cached.retained = Retained.begin(policy, sequence.cached.tables, prompt_tokens=1, trained_tokens=trained)
    return sequence


def let_go(bench: Bench, step: Step) -> None:
    """Drop what the policy does not keep, and make it NaN."""
    for sequence in step.sequences:
        assert sequence.cached.retained is not None
        table = sequence.cached.tables[0]
        table.keep(sequence.cached.retained.policy.keep(Held.of(table, np.empty(0, np.float32), range(1))))
    bench.fill_free_blocks()


def attended(bench: Bench, function: Any, step: Step, turn: Turn | None) -> Tensor:
    store = bench.cache.store
    return function(
        step.queries, store.keys[0], store.values[0], step.plan.groups[0], **bench.heads.options(), turn=turn
    )


def afresh(
    bench: Bench, kernels: NativeAttention, sequence: Sequence, queries: Tensor, turn: Turn | None, *, keeps: bool
) -> Tensor:
    """What its last tokens give when all of a sequence runs as one chunk, alone, on a cache that has let nothing go.

    Args:
        keeps: whether under its policy; else with full attention.
    """
    size = 5 if bench.cache.layout.block_tokens != 5 else 16
    own = Bench(bench.heads, dtype=bench.dtype, block_tokens=size, blocks=len(sequence.keys) // size + 2)
    cached = own.open().cached
    cached.retained = sequence.cached.retained if keeps else None
    extension = own.cache.extend([(cached, len(sequence.keys))])
    group = build_plan(own.cache, extension, logits=[1]).groups[0]
    store = own.cache.store
    store.write(0, group.writes, torch.stack(sequence.keys, 1), torch.stack(sequence.values, 1))
    others = own.random(len(sequence.keys) - len(queries), *queries.shape[1:])
    row = torch.cat([others, queries])
    found = kernels.attend(row, store.keys[0], store.values[0], group, **own.heads.options(), turn=turn)
    return found[len(others) :]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    heads=HEADS,
    policies=st.lists(POLICIES, min_size=1, max_size=2),
    trained=st.sampled_from([None, 110]),
    turn=st.none() | TURNS,
    block_tokens=st.sampled_from([1, 4, 16]),
    threads=st.sampled_from([1, 2]),
)
def test_a_row_gives_what_the_reference_gives_and_the_bits_that_it_gives_alone(
    kernels: NativeAttention,
    data: st.DataObject,
    heads: Heads,
    policies: list[SinkWindow],
    trained: int | None,
    turn: Turn | None,
    block_tokens: int,
    threads: int,
) -> None:
    dtype = data.draw(st.sampled_from(list(kernels.library.dtypes)))
    bench = Bench(heads, block_tokens=block_tokens, blocks=4096 // block_tokens, dtype=dtype)
    live = [under(bench.open(), policies[0], trained)]
    with on_threads(threads):
        for _ in range(data.draw(st.integers(2, 5))):
            kind = data.draw(st.sampled_from(["ragged", "decode", "fork"]))
            if kind == "fork":
                parent = data.draw(st.sampled_from(live))
                child = bench.fork(parent)
                child.cached.retained = parent.cached.retained
                live.append(child)
            if kind == "ragged":
                live.append(under(bench.open(), data.draw(st.sampled_from(policies)), trained))
            counts = st.just(1) if kind == "decode" else st.sampled_from([1, 2, 18, 70])
            step = bench.step(*((sequence, data.draw(counts)) for sequence in data.draw(st.permutations(live))))
            output = attended(bench, kernels.attend, step, turn)
            torch.testing.assert_close(output, attended(bench, reference.attend, step, turn), **TOLERANCE[dtype])
            rows = 0
            for sequence, count in zip(step.sequences, step.counts, strict=True):
                own, queries = output[rows : rows + count], step.queries[rows : rows + count]
                assert torch.equal(own, afresh(bench, kernels, sequence, queries, turn, keeps=True))
                first = len(sequence.keys) - count
                exact = max(0, min(count, sequence.cached.retained.exact_tokens - first))
                full = afresh(bench, kernels, sequence, queries, turn, keeps=False)
                assert torch.equal(own[:exact], full[:exact]), "these see everything"
                rows += count
            let_go(bench, step)


@pytest.mark.parametrize("reindex", [False, True])
def test_what_a_token_far_into_a_stream_reads_is_no_more_than_its_window_and_its_sinks(
    kernels: NativeAttention, reindex: bool
) -> None:
    bench = Bench(blocks=40)
    sequence = under(bench.open(), SinkWindow(sink_tokens=4, window_tokens=100, reindex=reindex), 512)
    sizes = []
    for count in (*(1_000,) * 4, 100):
        for _ in range(count // 100):
            let_go(bench, bench.step((sequence, 100)))
        step = bench.step((sequence, 1))
        schedule = kernels.schedule(step.plan.groups[0], 18)
        sizes.append(len(schedule.numbers))
        assert schedule.numbers[3] <= 3 + 1, "three blocks of the window, one of the sinks"
        let_go(bench, step)
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("reindex", [False, True])
def test_an_infinite_value_harms_only_the_rows_that_see_it_through_a_window(
    kernels: NativeAttention, reindex: bool
) -> None:
    bench = Bench()
    sequence = under(bench.open(), SinkWindow(sink_tokens=2, window_tokens=8, reindex=reindex), None)
    turn = Turn(torch.tensor([0.1]).double(), 0, False)
    step = bench.step((sequence, 60))
    for place, seen in ((1, range(1, 60)), (20, range(20, 28))):
        writes = step.plan.groups[0].writes
        kept = bench.cache.store.values[0][:, int(writes[place])].clone()
        bench.cache.store.values[0][:, int(writes[place])] = torch.inf
        output = attended(bench, kernels.attend, step, turn)
        assert (~output.isfinite().all(-1).all(-1)).nonzero().flatten().tolist() == list(seen)
        bench.cache.store.values[0][:, int(writes[place])] = kept
