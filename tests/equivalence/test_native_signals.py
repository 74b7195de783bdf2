"""What policies ask of native attention: masses to be observed, and choices of what is read.

Both are what the reference says, and the same bits whatever runs beside a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor

from kvloom.attention import GroupPlan, build_plan, reference
from kvloom.attention.native import NativeAttention
from kvloom.attention.observation import Observation
from kvloom.cache import CachedSequence, CacheLayout, Codec, KVCache, LayerShape
from kvloom.cache.retention import Retained, Retention, TopBlocks
from kvloom.native.library import load
from native_targets import targets
from thread_counts import on_threads

pytestmark = pytest.mark.skipif(not targets(), reason="there is no C++ compiler here")

TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}
COUNTS = [1, 1, 2, 5, 18, 50]
CODECS = st.sampled_from(["native", "int8"])


@pytest.fixture(params=targets())
def kernels(request: pytest.FixtureRequest) -> NativeAttention:
    return NativeAttention(load(request.param))


class Layer:
    """One layer on a cache that keeps bounds, with random keys, values and queries."""

    def __init__(self, dtype: torch.dtype, codec: Codec, block_tokens: int, *, group: int = 2, dim: int = 24) -> None:
        shape = LayerShape(kv_heads=2, key_dim=dim, value_dim=dim)
        layout = CacheLayout(layers=(shape,), dtype=dtype, block_tokens=block_tokens, codec=codec, block_bounds=True)
        budget = layout.budget_for(4096 // block_tokens, open_blocks=32)
        self.cache = KVCache(layout, budget_bytes=budget, device=torch.device("cpu"))
        self.generator = torch.Generator().manual_seed(3)
        self.dtype, self.heads, self.dim = dtype, 2 * group, dim
        self.options: dict[str, Any] = {"scale": dim**-0.5}

    def random(self, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * torch.linspace(0.2, 1.5, self.dim)).to(self.dtype)

    def open(self, policy: Retention | None = None, prompt_tokens: int = 1) -> CachedSequence:
        sequence = self.cache.open()
        if policy is not None:
            sequence.retained = Retained.begin(
                policy, sequence.tables, prompt_tokens=prompt_tokens, trained_tokens=None
            )
        return sequence

    def step(self, *requests: tuple[CachedSequence, int]) -> tuple[GroupPlan, tuple[Tensor, Any, Any]]:
        """Extend and write: the plan, and queries, keys and values as attention takes them."""
        extension = self.cache.extend(requests)
        plan = build_plan(self.cache, extension, logits=[1] * len(requests))
        keys, values = (self.random(2, plan.tokens, self.dim) for _ in range(2))
        kept = self.cache.store.write(0, plan.groups[0].writes, keys, values)
        self.cache.commit(extension)
        return plan.groups[0], (self.random(plan.tokens, self.heads, self.dim), *kept)


def drawn_steps(data: st.DataObject, layer: Layer, policies: list[Retention | None]) -> Iterator[Any]:
    """Steps of a growing batch of which some are forked, cut, or let go of blocks."""
    prompts = st.sampled_from([1, 30, 90])
    live = [layer.open(policies[0], data.draw(prompts))]
    for _ in range(data.draw(st.integers(2, 4))):
        kind = data.draw(st.sampled_from(["ragged", "decode", "fork", "truncate", "drop"]))
        sequence = data.draw(st.sampled_from(live))
        if kind == "fork":
            live += [layer.cache.fork(sequence) for _ in range(data.draw(st.integers(1, 3)))]
        if kind == "truncate" and layer.cache.can_truncate(sequence, tokens := data.draw(st.integers(0, 60))):
            layer.cache.truncate(sequence, min(tokens, sequence.tokens))
        if kind == "drop" and len(runs := sequence.tables[0].runs) > 1:
            keep = np.array([*(data.draw(st.booleans()) for _ in runs[1:]), True])
            sequence.tables[0].keep(keep)
        if kind == "ragged":
            live.append(layer.open(data.draw(st.sampled_from(policies)), data.draw(prompts)))
        own = st.just(1) if kind in ("decode", "fork") else st.sampled_from(COUNTS)
        yield layer.step(*((sequence, data.draw(own)) for sequence in data.draw(st.permutations(live))))


def observed(kernels: NativeAttention, layer: Layer, plan: GroupPlan, counts: list[int], given: Any) -> list[Any]:
    """Masses of a step; its output is that of the step that nobody observes."""
    watched = replace(plan, observation=Observation(tuple(counts)), schedules={})
    output = kernels.attend(*given, watched, **layer.options)
    assert torch.equal(output, kernels.attend(*given, replace(plan, schedules={}), **layer.options))
    return watched.observation.masses()


def alone(plan: GroupPlan, index: int, given: Any) -> tuple[GroupPlan, Any]:
    """One of the step's sequences by itself, on a cache whose blocks are not sealed."""
    source = plan.sources[index]
    rows = slice(source.first_row, source.first_row + source.count)
    return replace(plan, sources=(replace(source, first_row=0),), schedules={}), (given[0][rows], *given[1:])


DECODED_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    dtype=st.sampled_from(list(TOLERANCE)),
    codec=CODECS,
    block_tokens=st.sampled_from([1, 4, 16]),
    group=st.sampled_from([1, 3, 9]),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
)
def test_observed_masses_are_those_of_the_reference_whatever_the_schedule(
    kernels: NativeAttention,
    data: st.DataObject,
    dtype: torch.dtype,
    codec: Codec,
    block_tokens: int,
    group: int,
    softcap: float | None,
    sinks: bool,
) -> None:
    assume(dtype in kernels.library.dtypes)
    layer = Layer(dtype, codec, block_tokens, group=group)
    layer.options |= {"softcap": softcap, "sinks": torch.randn(2 * group) if sinks else None}
    for plan, given_ in drawn_steps(data, layer, [None]):
        counts = [data.draw(st.integers(0, own.count)) for own in plan.sources]
        if not any(counts):
            continue
        with on_threads(1):
            found = observed(kernels, layer, plan, counts, given_)
        expected = reference.attention_mass(
            *given_[:2], replace(plan, observation=Observation(tuple(counts))), **layer.options
        )
        with on_threads(2):
            again = observed(kernels, layer, plan, counts, given_)
        for index, count in enumerate(counts):
            assert (found[index] is not None) == (count > 0)
            if not count:
                continue
            # The reference rounds what codes stand for to the dtype before it multiplies them, the kernels do not.
            rounding = DECODED_ROUNDING[dtype] if codec == "int8" else 1e-4
            torch.testing.assert_close(
                torch.from_numpy(found[index]), expected[index], rtol=rounding, atol=rounding / 4
            )
            assert np.array_equal(found[index], again[index])
            if codec == "native":
                own_plan, own = alone(plan, index, given_)
                assert np.array_equal(found[index], observed(kernels, layer, own_plan, [count], own)[0])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    dtype=st.sampled_from(list(TOLERANCE)),
    codec=CODECS,
    block_tokens=st.sampled_from([1, 3, 4, 16]),
    group=st.sampled_from([1, 3, 9]),
    budgets=st.lists(st.sampled_from([16, 20, 40, 100]), min_size=1, max_size=2),
)
def test_what_a_token_chooses_is_what_the_reference_chooses_whatever_runs_beside_it(
    kernels: NativeAttention,
    data: st.DataObject,
    dtype: torch.dtype,
    codec: Codec,
    block_tokens: int,
    group: int,
    budgets: list[int],
) -> None:
    assume(dtype in kernels.library.dtypes)
    layer = Layer(dtype, codec, block_tokens, group=group)
    policies = [*(TopBlocks(budget_tokens=own) for own in budgets), None]
    for plan, given_ in drawn_steps(data, layer, policies):
        bounds = layer.cache.store.bounds[0]
        with on_threads(1):
            found = kernels.attend(*given_, plan, **layer.options, bounds=bounds)
        torch.testing.assert_close(found, reference.attend(*given_, plan, **layer.options), **TOLERANCE[dtype])
        with on_threads(2):
            assert torch.equal(kernels.attend(*given_, plan, **layer.options, bounds=bounds), found)
        if codec == "int8":
            continue
        for index, source in enumerate(plan.sources):
            own_plan, own = alone(plan, index, given_)
            rows = slice(source.first_row, source.first_row + source.count)
            assert torch.equal(kernels.attend(*own, own_plan, **layer.options, bounds=bounds), found[rows])


def test_a_token_that_may_read_all_that_it_holds_gives_the_bits_of_full_attention(kernels: NativeAttention) -> None:
    """Also beside tokens of the same step that may not."""
    layer = Layer(torch.float32, "native", 4)
    sequence = layer.open(TopBlocks(budget_tokens=44), prompt_tokens=1)
    layer.step((sequence, 40))
    plan, given_ = layer.step((sequence, 9))
    assert plan.chooses
    full = replace(plan, sources=(replace(plan.sources[0], read_tokens=None),), schedules={})
    found = kernels.attend(*given_, plan, **layer.options, bounds=layer.cache.store.bounds[0])
    same = (found == kernels.attend(*given_, full, **layer.options)).flatten(1).all(1).tolist()
    assert same == [True] * 4 + [False] * 5, "ten full blocks and one of the new tokens' fit into 44 tokens"


def test_of_a_long_context_only_what_was_chosen_is_read(kernels: NativeAttention) -> None:
    layer = Layer(torch.float32, "native", 16)
    sequence = layer.open(TopBlocks(budget_tokens=256), prompt_tokens=1)
    layer.step((sequence, 2000))
    plan, given_ = layer.step((sequence, 1))
    schedule = kernels.schedule(plan, 64)
    assert schedule.numbers[2] == 4 + 1, "15 blocks of 16, chosen, and the one that is being filled"
    store = layer.cache.store
    seen = kernels.attend(*given_, plan, **layer.options, bounds=store.bounds[0])
    read = 0
    for block in sequence.tables[0].runs[:, 0].tolist():
        kept = store.values[0][0, 16 * block : 16 * block + 16].clone()
        store.values[0][0, 16 * block : 16 * block + 16] = torch.nan
        read += not torch.equal(kernels.attend(*given_, plan, **layer.options, bounds=store.bounds[0]), seen)
        store.values[0][0, 16 * block : 16 * block + 16] = kept
    assert read == 16
