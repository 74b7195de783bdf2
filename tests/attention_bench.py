"""One attention layer on a cache, driven step by step, with every sequence also kept as a plain list of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor

from kvloom.attention import Plan, build_plan, reference
from kvloom.cache import CachedSequence, CacheLayout, KVCache, LayerShape, Reach

TOLERANCE = {
    torch.float64: {"rtol": 1e-4, "atol": 1e-5},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}


@dataclass(frozen=True, kw_only=True)
class Heads:
    """An attention layer's shape and options."""

    kv_heads: int = 2
    group: int = 2
    key_dim: int = 8
    value_dim: int = 8
    softcap: float | None = None
    sinks: bool = False
    scale: float = 0.5

    def options(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        sinks = torch.randn(self.kv_heads * self.group, generator=generator) if self.sinks else None
        return {"scale": self.scale, "softcap": self.softcap, "sinks": sinks}


PLAIN_HEADS, FULL = Heads(), Reach()


@dataclass(eq=False)
class Sequence:
    """A cached sequence, and its keys and values as plain lists, [kv_heads, dim] each."""

    cached: CachedSequence
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


@dataclass
class Step:
    plan: Plan
    queries: Tensor
    sequences: list[Sequence]
    counts: list[int]


class Bench:
    """One layer on a cache, driven step by step."""

    def __init__(
        self,
        heads: Heads = PLAIN_HEADS,
        *,
        reach: Reach = FULL,
        block_tokens: int = 16,
        blocks: int = 64,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.heads, self.reach, self.dtype = heads, reach, dtype
        shape = LayerShape(kv_heads=heads.kv_heads, key_dim=heads.key_dim, value_dim=heads.value_dim, reach=reach)
        layout = CacheLayout(layers=(shape,), dtype=dtype, block_tokens=block_tokens)
        budget_bytes = blocks * layout.bytes_per_row_of_blocks
        self.cache = KVCache(layout, budget_bytes=budget_bytes, device=torch.device("cpu"))
        self.fill_free_blocks()
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def open(self) -> Sequence:
        return Sequence(self.cache.open())

    def fork(self, parent: Sequence) -> Sequence:
        return Sequence(self.cache.fork(parent.cached), list(parent.keys), list(parent.values))

    def truncate(self, sequence: Sequence, tokens: int) -> None:
        self.cache.truncate(sequence.cached, tokens)
        del sequence.keys[tokens:], sequence.values[tokens:]

    def step(self, *requests: tuple[Sequence, int]) -> Step:
        """Extend, write new random keys and values, draw queries; blocks out of reach are let go afterwards."""
        heads = self.heads
        extension = self.cache.extend([(sequence.cached, count) for sequence, count in requests])
        step_plan = build_plan(self.cache, extension, logits=[1] * len(requests))
        tokens = step_plan.tokens
        keys = self.random(heads.kv_heads, tokens, heads.key_dim)
        values = self.random(heads.kv_heads, tokens, heads.value_dim)
        self.cache.store.write(0, step_plan.groups[0].writes, keys, values)
        row = 0
        for sequence, count in requests:
            sequence.keys += keys[:, row : row + count].unbind(1)
            sequence.values += values[:, row : row + count].unbind(1)
            row += count
        queries = self.random(tokens, heads.kv_heads * heads.group, heads.key_dim)
        sequences, counts = ([request[i] for request in requests] for i in range(2))
        return Step(step_plan, queries, sequences, counts)

    def attend(self, function: Any, step: Step) -> Tensor:
        store = self.cache.store
        group = step.plan.groups[0]
        return function(step.queries, store.keys[0], store.values[0], group, **self.heads.options())

    def let_go(self, step: Step) -> None:
        """Free what fell out of reach, and make it NaN again."""
        for sequence in step.sequences:
            self.cache.release_unseen(sequence.cached)
        self.fill_free_blocks()

    def fill_free_blocks(self) -> None:
        free = np.flatnonzero(self.cache.groups[0].pool.references == 0)
        for tensor in (self.cache.store.keys[0], self.cache.store.values[0]):
            tensor.unflatten(1, (self.cache.blocks, -1))[:, torch.from_numpy(free)] = torch.nan

    def plain(self, step: Step) -> Tensor:
        """The softmax over each sequence's plain list of tokens."""
        rows = []
        for sequence, count in zip(step.sequences, step.counts, strict=True):
            length = len(sequence.keys)
            queries = step.queries[sum(len(r) for r in rows) :][:count].double().transpose(0, 1)
            keys = torch.stack(sequence.keys, 1).double().repeat_interleave(self.heads.group, 0)
            values = torch.stack(sequence.values, 1).double().repeat_interleave(self.heads.group, 0)
            scores = queries @ keys.transpose(1, 2) * self.heads.scale
            if self.heads.softcap is not None:
                scores = self.heads.softcap * torch.tanh(scores / self.heads.softcap)
            position, key = torch.arange(length - count, length)[:, None], torch.arange(length)[None]
            seen = key <= position
            if self.reach.window_tokens is not None:
                seen &= position - key < self.reach.window_tokens
            if self.reach.chunk_tokens is not None:
                seen &= position // self.reach.chunk_tokens == key // self.reach.chunk_tokens
            scores = scores.masked_fill(~seen, -torch.inf)
            if (sinks := self.heads.options()["sinks"]) is not None:
                scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, count, 1)], -1)
            rows.append((scores.softmax(-1)[..., :length] @ values).transpose(0, 1))
        return torch.cat(rows).to(self.dtype)

    def check(self, function: Any, step: Step) -> None:
        """The reference is the plain softmax, and a kernel gives what the reference gives."""
        specified = self.attend(reference.attend, step)
        torch.testing.assert_close(specified, self.plain(step), **TOLERANCE[self.dtype])
        torch.testing.assert_close(self.attend(function, step), specified, **TOLERANCE[self.dtype])


REACHES = st.one_of(
    st.just(Reach()),
    st.sampled_from([1, 3, 8, 30]).map(lambda tokens: Reach(window_tokens=tokens)),
    st.sampled_from([1, 4, 7, 20]).map(lambda tokens: Reach(chunk_tokens=tokens)),
)
HEADS = st.builds(
    Heads,
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3]),
    value_dim=st.sampled_from([8, 8, 5]),
    softcap=st.sampled_from([None, None, 2.0]),
    sinks=st.booleans(),
    scale=st.sampled_from([0.1, 0.5]),
)


def draw_step(data: st.DataObject, bench: Bench, live: list[Sequence], counts: list[int]) -> Step:
    """A step of all `live` sequences, after one of them was forked or cut, or another one joined them, or nothing.

    Args:
        counts: of how many tokens each may run, unless all decode.
    """
    kind = data.draw(st.sampled_from(["ragged", "decode", "fork", "truncate"]))
    if kind == "fork":
        parent = data.draw(st.sampled_from(live))
        live += [bench.fork(parent) for _ in range(data.draw(st.integers(1, 4)))]
    if kind == "truncate":
        sequence = data.draw(st.sampled_from(live))
        tokens = data.draw(st.integers(0, sequence.cached.tokens))
        if bench.cache.can_truncate(sequence.cached, tokens):
            bench.truncate(sequence, tokens)
    if kind == "ragged":
        live.append(bench.open())
    own = st.just(1) if kind in ("decode", "fork") else st.sampled_from(counts)
    return bench.step(*((sequence, data.draw(own)) for sequence in data.draw(st.permutations(live))))
