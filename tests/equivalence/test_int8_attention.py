"""Attention over sealed and open blocks: the operators and the native kernels give what the reference gives."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kvloom.attention import Plan, build_plan, reference, torch_ops
from kvloom.attention.native import kernels_for
from kvloom.attention.turn import Turn
from kvloom.cache import CachedSequence, CacheLayout, KVCache, LayerShape, Reach
from kvloom.cache.retention import Retained, SinkWindow

TOLERANCE = {
    torch.float64: {"rtol": 1e-4, "atol": 1e-5},  # the reference counts in float32
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}
REACHES = st.one_of(
    st.just(Reach()),
    st.sampled_from([1, 3, 8, 30, 70]).map(lambda tokens: Reach(window_tokens=tokens)),
    st.sampled_from([1, 4, 7, 20, 64]).map(lambda tokens: Reach(chunk_tokens=tokens)),
)
LONGEST = 300
POLICIES = st.none() | st.builds(
    SinkWindow,
    sink_tokens=st.sampled_from([0, 2, 20]),
    window_tokens=st.sampled_from([1, 5, 17, 64]),
    pins=st.sampled_from([(), ((9, 12),), ((5, 6), (30, 50))]),
    reindex=st.booleans(),
)
TURN = Turn(torch.tensor([1.0, 0.1, 0.01]).double(), 0, False)


class Layer:
    """One layer on an int8 cache, whose keys, values and queries follow from a sequence's number and the position."""

    def __init__(
        self, dtype: torch.dtype, reach: Reach, block_tokens: int, key_dim: int = 8, value_dim: int = 8, group: int = 2
    ) -> None:
        shape = LayerShape(kv_heads=2, key_dim=key_dim, value_dim=value_dim, reach=reach)
        layout = CacheLayout(layers=(shape,), dtype=dtype, block_tokens=block_tokens, codec="int8")
        budget = layout.budget_for(4096 // block_tokens, open_blocks=32)
        self.cache = KVCache(layout, budget_bytes=budget, device=torch.device("cpu"))
        self.policy: SinkWindow | None = None
        self.numbers: dict[CachedSequence, int] = {}
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            # Channels of unlike size, as keys have them.
            return (torch.randn(8, *shape, generator=generator) * torch.linspace(0.2, 1.5, shape[-1])).to(dtype)

        self.keys, self.values = draw(2, LONGEST, key_dim), draw(2, LONGEST, value_dim)
        self.queries = draw(LONGEST, 2 * group, key_dim)
        self.options: dict[str, Any] = {"scale": key_dim**-0.5, "turn": TURN}

    def open(self, number: int) -> CachedSequence:
        self.numbers[sequence := self.cache.open()] = number
        if self.policy is not None:
            sequence.retained = Retained.begin(self.policy, sequence.tables, prompt_tokens=1, trained_tokens=None)
        return sequence

    def fork(self, parent: CachedSequence) -> CachedSequence:
        self.numbers[sequence := self.cache.fork(parent)] = self.numbers[parent]
        return sequence

    def step(self, *requests: tuple[CachedSequence, int]) -> tuple[Plan, Tensor, Any, Any]:
        """Extend and write; plan, queries, and what attention reads."""
        extension = self.cache.extend(requests)
        plan = build_plan(self.cache, extension, logits=[1] * len(requests))
        parts = [(self.numbers[own], slice(own.tokens - count, own.tokens)) for own, count in requests]
        keys, values = (
            torch.cat([of[number][:, rows] for number, rows in parts], dim=1) for of in (self.keys, self.values)
        )
        kept = self.cache.store.write(0, plan.groups[0].writes, keys, values)
        self.extension = extension
        return plan, torch.cat([self.queries[number][rows] for number, rows in parts]), *kept

    def attend(self, function: Any, step: tuple[Plan, Tensor, Any, Any]) -> Tensor:
        plan, queries, keys, values = step
        found: Tensor = function(queries, keys, values, plan.groups[0], **self.options)
        return found

    def commit(self) -> None:
        self.cache.commit(self.extension)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    reach=REACHES,
    block_tokens=st.sampled_from([1, 4, 16, 48]),
    dims=st.sampled_from([(8, 8), (20, 5), (64, 64), (70, 70)]),
    group=st.sampled_from([1, 3]),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    policy=POLICIES,
)
def test_whatever_the_schedule_all_kernels_give_what_the_reference_gives(
    dtype: torch.dtype,
    data: st.DataObject,
    reach: Reach,
    block_tokens: int,
    dims: tuple[int, int],
    group: int,
    softcap: float | None,
    sinks: bool,
    policy: SinkWindow | None,
) -> None:
    layer = Layer(dtype, reach, block_tokens, *dims, group)
    layer.policy = policy
    layer.options |= {"softcap": softcap, "sinks": torch.randn(2 * group) if sinks else None}
    native = kernels_for(layer.cache.store)
    live = [layer.open(0)]
    for number in range(1, data.draw(st.integers(2, 5))):
        kind = data.draw(st.sampled_from(["ragged", "decode", "fork", "truncate"]))
        if kind == "fork":
            parent = data.draw(st.sampled_from(live))
            live += [layer.fork(parent) for _ in range(data.draw(st.integers(1, 3)))]
        if kind == "truncate":
            sequence = data.draw(st.sampled_from(live))
            tokens = data.draw(st.integers(0, sequence.tokens))
            if layer.cache.can_truncate(sequence, tokens):
                layer.cache.truncate(sequence, tokens)
        if kind == "ragged":
            live.append(layer.open(number))
        counts = st.just(1) if kind in ("decode", "fork") else st.sampled_from([1, 1, 2, 5, 18, 40])
        step = layer.step(*[(sequence, data.draw(counts)) for sequence in live])
        expected = layer.attend(reference.attend, step)
        torch.testing.assert_close(layer.attend(torch_ops.attend, step), expected, **TOLERANCE[dtype])
        if native is not None:
            torch.testing.assert_close(layer.attend(native.attend, step), expected, **TOLERANCE[dtype])
        layer.commit()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    reach=REACHES,
    policy=POLICIES,
    block_tokens=st.sampled_from([4, 16, 48]),
    tokens=st.integers(1, 200),
)
def test_natively_a_row_has_the_same_bits_in_any_chunk_batch_and_fork(
    dtype: torch.dtype, data: st.DataObject, reach: Reach, policy: SinkWindow | None, block_tokens: int, tokens: int
) -> None:
    layer = Layer(dtype, reach, block_tokens, 24, 24)
    layer.policy = policy
    native = kernels_for(layer.cache.store)
    if native is None:
        pytest.skip("there are no native kernels here")
    whole = layer.attend(native.attend, layer.step((layer.open(0), tokens)))
    layer.commit()
    mate, own, done = layer.open(1), layer.open(0), 0
    while done < tokens:
        count = min(tokens - done, data.draw(st.sampled_from([1, 1, 3, 16, 17, 90])))
        requests = [(mate, data.draw(st.integers(1, 20))), (own, count)]
        step = layer.step(*requests[mate.tokens > 150 or data.draw(st.booleans()) :])
        found = layer.attend(native.attend, step)[-count:]
        assert torch.equal(found, whole[done : done + count])
        layer.commit()
        done += count
        if data.draw(st.booleans()):
            own = layer.fork(own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_natively_what_is_no_number_reaches_the_rows_that_read_it_and_no_others(dtype: torch.dtype) -> None:
    for bad in ("keys", "values"):
        layer = Layer(dtype, Reach(), 16)
        native = kernels_for(layer.cache.store)
        if native is None:
            pytest.skip("there are no native kernels here")
        getattr(layer, bad)[0, 1, 20, 3] = torch.nan
        found = layer.attend(native.attend, layer.step((layer.open(0), 50)))
        assert found[:20].isfinite().all(), "these rows come before"
        of_head = found[:, 2:].isnan().any(dim=-1).any(dim=-1)
        assert of_head[20:].all() and found[:, :2].isfinite().all()


def test_on_a_store_that_seals_the_native_kernels_serve_as_on_any_other() -> None:
    native = Layer(torch.bfloat16, Reach(), 16)
    plain = CacheLayout(layers=native.cache.layout.layers, dtype=torch.bfloat16)
    store = KVCache(plain, budget_bytes=plain.budget_for(4), device=torch.device("cpu")).store
    assert (kernels_for(native.cache.store) is None) == (kernels_for(store) is None)
    assert kernels_for(Layer(torch.float64, Reach(), 16).cache.store) is None
