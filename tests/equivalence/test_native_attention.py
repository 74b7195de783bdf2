"""The native kernels: what the reference gives, and the same bits whatever runs beside a row.

Every target that this machine can build is tested. A row's canonical bits are those of its sequence computed afresh, as
one chunk, alone, in a pool of its own with blocks of another size.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from attention_bench import HEADS, REACHES, TOLERANCE, Bench, Heads, Sequence, Step, draw_step
from kvloom.attention import GroupPlan, build_plan, reference, torch_ops
from kvloom.attention.native import NativeAttention
from kvloom.attention.source import Source
from kvloom.cache import Reach
from kvloom.native.library import load
from kvloom.native.rows import RowWriter
from native_targets import targets
from thread_counts import on_threads

pytestmark = pytest.mark.skipif(not targets(), reason="there is no C++ compiler here")

THREADS = st.sampled_from([1, 2, 3])
QWEN = Heads(kv_heads=2, group=7, key_dim=64, value_dim=64, scale=0.125)


@pytest.fixture(params=targets())
def kernels(request: pytest.FixtureRequest) -> NativeAttention:
    return NativeAttention(load(request.param))


def dtypes_of(kernels: NativeAttention) -> list[torch.dtype]:
    return list(kernels.library.dtypes)


def rows_of(step: Step, index: int) -> slice:
    """The rows of one sequence of the step."""
    first = sum(step.counts[:index])
    return slice(first, first + step.counts[index])


def afresh(bench: Bench, kernels: NativeAttention, sequence: Sequence, queries: Tensor) -> Tensor:
    """What the last tokens of a sequence give when all of it runs as one chunk, on a cache of its own."""
    size = 5 if bench.cache.layout.block_tokens != 5 else 16
    own = Bench(
        bench.heads, reach=bench.reach, dtype=bench.dtype, block_tokens=size, blocks=len(sequence.keys) // size + 2
    )
    extension = own.cache.extend([(own.open().cached, len(sequence.keys))])
    group = build_plan(own.cache, extension, logits=[1]).groups[0]
    store = own.cache.store
    store.write(0, group.writes, torch.stack(sequence.keys, 1), torch.stack(sequence.values, 1))
    others = own.random(len(sequence.keys) - len(queries), *queries.shape[1:])
    row = torch.cat([others, queries])
    return kernels.attend(row, store.keys[0], store.values[0], group, **own.heads.options())[len(others) :]


def check_bits(bench: Bench, kernels: NativeAttention, step: Step, output: Tensor) -> None:
    for index, sequence in enumerate(step.sequences):
        rows = rows_of(step, index)
        assert torch.equal(output[rows], afresh(bench, kernels, sequence, step.queries[rows]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), heads=HEADS, reach=REACHES, block_tokens=st.sampled_from([1, 4, 16]), threads=THREADS)
def test_whatever_the_schedule_a_row_gives_what_the_reference_gives_and_the_bits_that_it_gives_alone(
    kernels: NativeAttention, data: st.DataObject, heads: Heads, reach: Reach, block_tokens: int, threads: int
) -> None:
    dtype = data.draw(st.sampled_from(dtypes_of(kernels)))
    bench = Bench(heads, reach=reach, block_tokens=block_tokens, blocks=4096 // block_tokens, dtype=dtype)
    live = [bench.open()]
    with on_threads(threads):
        for _ in range(data.draw(st.integers(2, 5))):
            step = draw_step(data, bench, live, [1, 2, 18, 70])
            output = bench.attend(kernels.attend, step)
            torch.testing.assert_close(output, bench.attend(reference.attend, step), **TOLERANCE[dtype])
            check_bits(bench, kernels, step, output)
            bench.let_go(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beams_behind_a_long_prompt_give_the_bits_of_a_single_chunk(
    kernels: NativeAttention, dtype: torch.dtype
) -> None:
    """Past several partitions, where the work of one row is divided, and merged."""
    bench = Bench(QWEN, dtype=dtype, blocks=100)
    prompt = bench.open()
    for count in (300, 1, 299):
        bench.step((prompt, count))
    beams = [prompt, *(bench.fork(prompt) for _ in range(3))]
    for count in (1, 2, 1):
        step = bench.step(*((beam, count) for beam in beams))
    outputs = []
    for threads in (1, 2, 3):
        with on_threads(threads):
            outputs.append(bench.attend(kernels.attend, step))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    check_bits(bench, kernels, step, outputs[0])
    torch.testing.assert_close(outputs[0], bench.plain(step), **TOLERANCE[dtype])


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (7, 33), (1, 1)])
def test_heads_of_any_size(kernels: NativeAttention, dims: tuple[int, int]) -> None:
    for dtype in dtypes_of(kernels):
        heads = Heads(kv_heads=2, group=3, key_dim=dims[0], value_dim=dims[1], scale=dims[0] ** -0.5)
        bench = Bench(heads, dtype=dtype)
        sequence = bench.open()
        bench.step((sequence, 70))
        step = bench.step((sequence, 9))
        output = bench.attend(kernels.attend, step)
        torch.testing.assert_close(output, bench.plain(step), **TOLERANCE[dtype])
        check_bits(bench, kernels, step, output)


def test_tokens_dropped_from_the_middle_count_for_nothing(kernels: NativeAttention) -> None:
    """A table may hold any tokens: those of the first and the last block here, so that whole blocks hold none."""
    bench = Bench(QWEN, blocks=64)
    sequence = bench.open()
    bench.step((sequence, 400))
    step = bench.step((sequence, 1))
    source = step.plan.groups[0].sources[0]
    kept = np.concatenate([source.runs[:1], source.runs[12:13], source.runs[-2:]])
    group = build_plan_with(step, kept)
    store = bench.cache.store
    arguments = (step.queries, store.keys[0], store.values[0], group)
    output = kernels.attend(*arguments, **QWEN.options())
    torch.testing.assert_close(output, reference.attend(*arguments, **QWEN.options()), **TOLERANCE[torch.float32])


def build_plan_with(step: Step, runs: Any) -> Any:
    """The plan of a step of one sequence, if its table held only `runs`."""
    from dataclasses import replace

    group = step.plan.groups[0]
    return replace(group, sources=(replace(group.sources[0], runs=runs),), schedules={})


def crossing(rows: list[tuple[int, int]], lengths: list[int]) -> GroupPlan:
    """New tokens, (how many, of which source), that attend to sources of so many tokens each, one behind the other."""
    blocks = [0, *accumulate(-(-length // 4) for length in lengths)]
    first_rows = [0, *accumulate(count for count, _ in rows)]
    sources = tuple(
        Source(np.array([[blocks[which], 0, lengths[which], 0]], dtype=np.int32), first_row, 3, count)
        for (count, which), first_row in zip(rows, first_rows, strict=False)
    )
    writes = torch.empty(0, dtype=torch.int64)
    return GroupPlan(writes=writes, sources=sources, reach=Reach(cross=True), block_tokens=4)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.sampled_from([1, 3, 13, 64, 65, 300]), min_size=1, max_size=3),
    rows=st.lists(st.tuples(st.sampled_from([1, 1, 5, 40]), st.integers(0, 2)), min_size=1, max_size=6),
    heads=HEADS,
    threads=THREADS,
)
def test_all_of_a_source_is_seen_by_every_token_with_the_bits_that_it_gives_alone(
    kernels: NativeAttention, lengths: list[int], rows: list[tuple[int, int]], heads: Heads, threads: int
) -> None:
    rows = [(count, which % len(lengths)) for count, which in rows]
    slots = 4 * sum(-(-length // 4) for length in lengths)
    generator = torch.Generator().manual_seed(len(rows))
    keys, values = (
        torch.randn(heads.kv_heads, slots, dim, generator=generator) for dim in (heads.key_dim, heads.value_dim)
    )
    total = sum(count for count, _ in rows)
    queries = torch.randn(total, heads.kv_heads * heads.group, heads.key_dim, generator=generator)
    plan = crossing(rows, lengths)
    with on_threads(threads):
        output = kernels.attend(queries, keys, values, plan, **heads.options())
    expected = reference.attend(queries, keys, values, plan, **heads.options())
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    for own in plan.sources:
        apart = replace(own, first_row=0, count=1)
        alone = kernels.attend(
            queries[own.first_row : own.first_row + 1],
            keys,
            values,
            replace(plan, sources=(apart,), schedules={}),
            **heads.options(),
        )
        assert torch.equal(alone, output[own.first_row : own.first_row + 1])


@pytest.mark.parametrize("reach", [Reach(), Reach(window_tokens=8)], ids=str)
def test_an_infinite_value_harms_only_the_rows_that_see_it(kernels: NativeAttention, reach: Reach) -> None:
    bench = Bench(reach=reach)
    sequence = bench.open()
    step = bench.step((sequence, 40))
    bench.cache.store.values[0][:, int(step.plan.groups[0].writes[20])] = torch.inf
    output = bench.attend(kernels.attend, step)
    last = 39 if reach.unlimited else 27
    harmed = ~output.isfinite().all(-1).all(-1)
    assert harmed.nonzero().flatten().tolist() == list(range(20, last + 1))
    torch.testing.assert_close(output, bench.attend(reference.attend, step), **TOLERANCE[torch.float32], equal_nan=True)


def test_a_query_that_is_no_number_gives_none(kernels: NativeAttention) -> None:
    bench = Bench()
    step = bench.step((bench.open(), 5))
    step.queries[3] = torch.nan
    output = bench.attend(kernels.attend, step)
    assert output[3].isnan().all() and output[[0, 1, 2, 4]].isfinite().all()


def test_queries_may_lie_heads_first(kernels: NativeAttention) -> None:
    bench = Bench(QWEN)
    step = bench.step((bench.open(), 30))
    expected = bench.attend(kernels.attend, step)
    step.queries = step.queries.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(bench.attend(kernels.attend, step), expected)


def test_in_bfloat16_the_error_is_no_larger_than_that_of_pytorchs_own_attention() -> None:
    native = NativeAttention(load(targets()[0]))
    bench = Bench(QWEN, dtype=torch.bfloat16, blocks=80)
    step = bench.step((bench.open(), 600))
    store = bench.cache.store
    wide = (step.queries.double(), store.keys[0].double(), store.values[0].double(), step.plan.groups[0])
    exact = torch_ops.attend(*wide, **QWEN.options())
    ours, theirs = (
        (bench.attend(attend, step).double() - exact).square().mean().sqrt()
        for attend in (native.attend, torch_ops.attend)
    )
    assert ours <= 1.05 * theirs


def test_a_block_that_beams_share_stands_in_the_schedule_once(kernels: NativeAttention) -> None:
    bench = Bench(QWEN, blocks=100)
    prompt = bench.open()
    bench.step((prompt, 640))
    beams = [prompt, *(bench.fork(prompt) for _ in range(7))]
    step = bench.step(*((beam, 1) for beam in beams))
    sets, tokens, strides, blocks, widest, *_ = kernels.schedule(step.plan.groups[0], 18).numbers.tolist()
    assert (sets, tokens, widest) == (1, 8, 8)
    assert blocks == strides == 10 + 8, "ten blocks for all, and the new token of each"


@pytest.mark.parametrize("target", targets()[:1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_written_to_their_slots_and_nowhere_else(target: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(40, generator=generator)[:13]
    for rows in (torch.randn(3, 13, 9), torch.randn(13, 3, 9).transpose(0, 1), torch.randn(3, 9, 13).transpose(1, 2)):
        store = torch.zeros(3, 40, 9, dtype=dtype)
        expected = store.index_copy(1, slots, rows.to(dtype))
        RowWriter(load(target)).write(store, slots, rows.to(dtype))
        assert torch.equal(store, expected)
