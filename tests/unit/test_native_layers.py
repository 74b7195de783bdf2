"""Decoder layers in one native call are their readable twin, whatever their shape."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.attention import Plan, build_plan, reference
from kvloom.attention.native import NativeAttention, bounds_facts, sealed_facts
from kvloom.cache import CacheLayout, Codec, Int8Store, KVCache, LayerShape, MixedKept, Sealed, Store
from kvloom.cache.codec import encode_keys, encode_values
from kvloom.native.layers import (
    GroupStep,
    LayerWeights,
    NativeLayers,
    NormWeight,
    ProjectionWeight,
    native_order_bytes,
)
from kvloom.native.library import load
from kvloom.native.linear import ReferenceLinear
from kvloom.native.reference import rotary_factors, run_layer
from native_targets import targets

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
PAST_TOKENS, NEW_TOKENS, OTHER_TOKENS = 9, 4, 3

every_target = pytest.mark.parametrize("target", targets())


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer's sizes, and which of its optional parts it has."""

    hidden: int
    kv_heads: int
    group: int
    half: int
    inner: int
    biased: bool = False
    head_norms: bool = False


SHAPES = st.builds(
    Shape,
    hidden=st.integers(1, 150),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half=st.integers(1, 40),
    inner=st.integers(1, 150),
    biased=st.booleans(),
    head_norms=st.booleans(),
)


def random_layer(shape: Shape, dtype: torch.dtype, seed: int) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)
    dim = 2 * shape.half

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    def norm(columns: int) -> NormWeight:
        return NormWeight(numbers(columns), 1e-6)

    def projection(inner: int, outputs: int) -> ProjectionWeight:
        weight = numbers(outputs, inner) / inner**0.5
        return ProjectionWeight(ReferenceLinear().pack(weight), numbers(outputs) if shape.biased else None)

    return LayerWeights(
        input_norm=norm(shape.hidden),
        query_norm=norm(dim) if shape.head_norms else None,
        key_norm=norm(dim) if shape.head_norms else None,
        post_norm=norm(shape.hidden),
        query=projection(shape.hidden, shape.kv_heads * shape.group * dim),
        key=projection(shape.hidden, shape.kv_heads * dim),
        value=projection(shape.hidden, shape.kv_heads * dim),
        output=projection(shape.kv_heads * shape.group * dim, shape.hidden),
        gate=projection(shape.hidden, shape.inner),
        up=projection(shape.hidden, shape.inner),
        down=projection(shape.inner, shape.hidden),
        heads=shape.kv_heads * shape.group,
        kv_heads=shape.kv_heads,
        dim=dim,
        scale=dim**-0.5,
        group=0,
    )


class Pass:
    """A step of two sequences, one behind a past of random keys and values, on a cache of one layer."""

    def __init__(
        self, layer: LayerWeights, dtype: torch.dtype, codec: Codec = "native", past: int = PAST_TOKENS
    ) -> None:
        self.layer, self.dtype = layer, dtype
        shape = LayerShape(kv_heads=layer.kv_heads, key_dim=layer.dim, value_dim=layer.dim)
        layout = CacheLayout(layers=(shape,), dtype=dtype, block_tokens=4, codec=codec, block_bounds=True)
        self.cache = KVCache(layout, budget_bytes=layout.budget_for(16), device=torch.device("cpu"))
        self.bounds = self.cache.store.bounds[0].zero_()
        generator = torch.Generator().manual_seed(1)
        for kept in (self.natives.keys[0], self.natives.values[0]):
            kept.copy_(torch.randn(kept.shape, generator=generator))
        for sealed in self.sealed:
            sealed.codes.random_(-127, 128, generator=generator)
            sealed.scales.copy_(torch.rand(sealed.scales.shape, generator=generator) / 50)
        first, second = self.cache.open(), self.cache.open()
        self.cache.commit(self.cache.extend([(first, past)]))
        extension = self.cache.extend([(first, NEW_TOKENS), (second, OTHER_TOKENS)])
        self.plan: Plan = build_plan(self.cache, extension, logits=[1, 1])
        frequencies = 1 / 10_000 ** (torch.arange(layer.dim // 2) / layer.dim)
        self.factors = rotary_factors(self.plan.positions, frequencies, 1.25, dtype)
        own = torch.Generator().manual_seed(2)
        self.hidden = torch.randn(self.plan.tokens, layer.hidden, generator=own).to(dtype)

    @property
    def natives(self) -> Store:
        """Where numbers are kept."""
        store = self.cache.store
        return store.open if isinstance(store, Int8Store) else store

    @property
    def sealed(self) -> list[Sealed]:
        """Of keys and of values, if full blocks are sealed."""
        store = self.cache.store
        return [store.sealed_keys[0], store.sealed_values[0]] if isinstance(store, Int8Store) else []

    def by_twin(self) -> Tensor:
        """Under int8 it reads the codes that are there, as the kernels have left them."""
        store, group = self.cache.store, self.plan.groups[0]

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if self.sealed:
                kept = map(MixedKept, self.sealed, self.in_native_order(keys, values))
            else:
                kept = store.write(0, group.writes, keys, values)
            return reference.attend(queries, *kept, group, scale=self.layer.scale)

        return run_layer(self.layer, self.hidden, self.factors, attend)

    def in_native_order(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        earlier = self.plan.groups[0].writes.earlier_slots
        both = ((self.natives.keys[0], keys), (self.natives.values[0], values))
        return [torch.cat([own[:, earlier], new], dim=1) for own, new in both]

    def by_kernels(self, target: str) -> Tensor:
        layer, group, rows = self.layer, self.plan.groups[0], self.plan.tokens
        attention = NativeAttention(load(target))
        layers = NativeLayers(attention.library, [layer], self.dtype)
        layers.scratch.reserve(rows)
        layers.scratch["hidden"][:rows] = self.hidden
        schedule = attention.schedule_for(group, heads=layer.heads, kv_heads=layer.kv_heads)
        wanted = attention.bytes_for(schedule, self.dtype, heads=layer.heads, kv_heads=layer.kv_heads, dim=layer.dim)
        if self.sealed:
            wanted += native_order_bytes(group.writes, self.dtype, rows=rows, kv_heads=layer.kv_heads, dim=layer.dim)
        memory = layers.scratch.memory(wanted)
        steps = [GroupStep(group.writes, schedule.numbers.ctypes.data)]
        facts = [sealed_facts(*self.sealed)] if self.sealed else []
        kept = layers.keys_values(self.natives.keys, self.natives.values, facts, [bounds_facts(self.bounds, 4)])
        layers.run(kept, self.factors, steps, memory, rows=rows, first=0, count=1)
        return layers.scratch["hidden"][:rows].clone()


@every_target
@settings(max_examples=20, deadline=None)
@given(
    shape=SHAPES,
    dtype=st.sampled_from(list(TOLERANCE)),
    codec=st.sampled_from(["native", "int8"]),
    past=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_a_layer_is_its_twin(target: str, shape: Shape, dtype: torch.dtype, codec: Codec, past: int, seed: int) -> None:
    assume(dtype in load(target).dtypes)
    one = Pass(random_layer(shape, dtype, seed), dtype, codec, past)
    found, expected = one.by_kernels(target).double(), one.by_twin().double()
    error = (found - expected).norm(dim=-1)
    assert bool((error <= TOLERANCE[dtype] * (expected.norm(dim=-1) + one.hidden.double().norm(dim=-1))).all())


@every_target
@settings(max_examples=10, deadline=None)
@given(shape=SHAPES, dtype=st.sampled_from(list(TOLERANCE)), past=st.integers(1, 12))
def test_a_layer_seals_the_keys_and_values_that_it_keeps_where_nothing_is_sealed(
    target: str, shape: Shape, dtype: torch.dtype, past: int
) -> None:
    """And of what stays open, the new tokens lie in their places; all else is as it was."""
    assume(dtype in load(target).dtypes)
    layer = random_layer(shape, dtype, seed=3)
    native, one = Pass(layer, dtype, past=past), Pass(layer, dtype, "int8", past)
    landing, slots = one.plan.groups[0].writes, native.plan.groups[0].write_slots
    before = [own.codes.clone() for own in one.sealed]
    opened = [own[0].clone() for own in (one.natives.keys, one.natives.values)]
    native.by_kernels(target), one.by_kernels(target)
    new = [own[0][:, slots] for own in (native.natives.keys, native.natives.values)]
    order = one.in_native_order(*new)
    for index, encode in enumerate((encode_keys, encode_values)):
        codes, scales = encode(order[index][:, landing.filled_from])
        sealed, by_block = one.sealed[index], (layer.kv_heads, -1, 4, layer.dim)
        blocks = sealed.scales if not index else sealed.scales.view(layer.kv_heads, -1, 4)
        assert torch.equal(blocks[:, landing.filled_blocks], scales)
        before[index].view(by_block)[:, landing.filled_blocks] = codes
        assert torch.equal(sealed.codes, before[index])
        opened[index][:, landing.open_slots] = new[index][:, landing.open_rows]
        assert torch.equal((one.natives.keys, one.natives.values)[index][0], opened[index])


@every_target
@settings(max_examples=10, deadline=None)
@given(
    shape=SHAPES,
    dtype=st.sampled_from(list(TOLERANCE)),
    codec=st.sampled_from(["native", "int8"]),
    past=st.integers(1, 12),
)
def test_a_layer_notes_the_bounds_of_the_blocks_that_it_fills_and_of_no_others(
    target: str, shape: Shape, dtype: torch.dtype, codec: Codec, past: int
) -> None:
    """Of the keys that are read: under int8 of those that codes stand for."""
    assume(dtype in load(target).dtypes)
    one = Pass(random_layer(shape, dtype, seed=3), dtype, codec, past)
    one.by_kernels(target)
    expected = torch.zeros_like(one.bounds)
    for source in one.plan.groups[0].sources:
        for block, _, count, first in source.runs.tolist():
            if count == 4 and first + count > source.first_position:
                slots = torch.arange(4 * block, 4 * block + 4)
                keys = one.sealed[0].read(slots, dtype) if one.sealed else one.natives.keys[0][:, slots]
                expected[0, :, block], expected[1, :, block] = keys.amin(dim=1), keys.amax(dim=1)
    assert torch.equal(one.bounds, expected)


@every_target
@pytest.mark.parametrize(
    "number", [-torch.inf, -200.0, -90.0, -87.0, 0.0, 88.0, 89.0, 200.0, torch.inf, torch.nan], ids=str
)
def test_extreme_numbers_are_activated_as_pytorch_activates_them(target: str, number: float) -> None:
    """The gate is its bias, `up` is 1, and all rows get what comes of it."""
    zeros = {name: ReferenceLinear().pack(torch.zeros(1, 5)) for name in ("gate", "up")}
    layer = random_layer(Shape(hidden=5, kv_heads=1, group=1, half=2, inner=1), torch.float32, seed=0)
    layer = LayerWeights(
        **vars(layer)
        | {name: ProjectionWeight(packed, torch.ones(1)) for name, packed in zeros.items()}
        | {"gate": ProjectionWeight(zeros["gate"], torch.tensor([number]))}
    )
    one = Pass(layer, torch.float32)
    torch.testing.assert_close(one.by_kernels(target), one.by_twin(), rtol=1e-5, atol=1e-5, equal_nan=True)
