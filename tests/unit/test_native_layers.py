"""Decoder layers in one native call are their readable twin, whatever their shape."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.attention import Plan, build_plan, reference
from kvloom.attention.native import NativeAttention
from kvloom.cache import CacheLayout, KVCache, LayerShape
from kvloom.native.layers import GroupStep, LayerWeights, NativeLayers, NormWeight, ProjectionWeight
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

    def __init__(self, layer: LayerWeights, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype
        shape = LayerShape(kv_heads=layer.kv_heads, key_dim=layer.dim, value_dim=layer.dim)
        layout = CacheLayout(layers=(shape,), dtype=dtype, block_tokens=4)
        self.cache = KVCache(layout, budget_bytes=16 * layout.bytes_per_row_of_blocks, device=torch.device("cpu"))
        generator = torch.Generator().manual_seed(1)
        for kept in (self.cache.store.keys[0], self.cache.store.values[0]):
            kept.copy_(torch.randn(kept.shape, generator=generator))
        first, second = self.cache.open(), self.cache.open()
        self.cache.commit(self.cache.extend([(first, PAST_TOKENS)]))
        extension = self.cache.extend([(first, NEW_TOKENS), (second, OTHER_TOKENS)])
        self.plan: Plan = build_plan(self.cache, extension, logits=[1, 1])
        frequencies = 1 / 10_000 ** (torch.arange(layer.dim // 2) / layer.dim)
        self.factors = rotary_factors(self.plan.positions, frequencies, 1.25, dtype)
        self.hidden = torch.randn(self.plan.tokens, layer.hidden, generator=generator).to(dtype)

    def by_twin(self) -> Tensor:
        store, group = self.cache.store, self.plan.groups[0]

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            store.write(0, group.writes, keys, values)
            return reference.attend(queries, store.keys[0], store.values[0], group, scale=self.layer.scale)

        return run_layer(self.layer, self.hidden, self.factors, attend)

    def by_kernels(self, target: str) -> Tensor:
        layer, group, rows = self.layer, self.plan.groups[0], self.plan.tokens
        attention = NativeAttention(load(target))
        layers = NativeLayers(attention.library, [layer], self.dtype)
        layers.scratch.reserve(rows)
        layers.scratch["hidden"][:rows] = self.hidden
        schedule = attention.schedule_for(group, heads=layer.heads, kv_heads=layer.kv_heads)
        memory = layers.scratch.memory(
            attention.bytes_for(schedule, self.dtype, heads=layer.heads, kv_heads=layer.kv_heads, dim=layer.dim)
        )
        steps = [GroupStep(group.write_slots, schedule.numbers.ctypes.data)]
        kept = layers.keys_values(self.cache.store.keys, self.cache.store.values)
        layers.run(kept, self.factors, steps, memory, rows=rows, first=0, count=1)
        return layers.scratch["hidden"][:rows].clone()


@every_target
@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, dtype=st.sampled_from(list(TOLERANCE)), seed=st.integers(0, 99))
def test_a_layer_is_its_twin(target: str, shape: Shape, dtype: torch.dtype, seed: int) -> None:
    assume(dtype in load(target).dtypes)
    one = Pass(random_layer(shape, dtype, seed), dtype)
    found, expected = one.by_kernels(target).double(), one.by_twin().double()
    error = (found - expected).norm(dim=-1)
    assert bool((error <= TOLERANCE[dtype] * (expected.norm(dim=-1) + one.hidden.double().norm(dim=-1))).all())


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
