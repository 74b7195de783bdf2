"""Sources in the cache: written once, read by whoever decodes from them, and counted like everything else."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.attention import build_plan, reference, torch_ops
from kvloom.blocks import PoolExhausted
from kvloom.cache import (
    CachedSequence,
    CacheLayout,
    KVCache,
    LayerShape,
    Reach,
    adopt_source,
    place_source,
    remember_source,
)

SELF, CROSS = 0, 1
SHAPES = (
    LayerShape(kv_heads=1, key_dim=2, value_dim=2),
    LayerShape(kv_heads=2, key_dim=4, value_dim=4, reach=Reach(cross=True)),
)
LENGTHS = (1, 4, 6, 8, 11)
"""Of the sources, in tokens; a block has four."""


def make_cache(blocks: int) -> KVCache:
    layout = CacheLayout(layers=SHAPES, dtype=torch.float32, block_tokens=4)
    return KVCache(layout, budget_bytes=blocks * layout.bytes_per_row_of_blocks, device=torch.device("cpu"))


def content(source: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(source)
    keys, values = (torch.randn(2, LENGTHS[source], 4, generator=generator) for _ in range(2))
    return keys, values


class Sources:
    """A cache, the sequences that live in it, and what was encoded."""

    def __init__(self, blocks: int) -> None:
        self.cache = make_cache(blocks)
        self.live: list[tuple[CachedSequence, int]] = []
        self.encoded = 0

    def open(self, source: int) -> None:
        sequence = self.cache.open()
        key = b"source %d" % source
        if not adopt_source(self.cache, sequence, key, LENGTHS[source]):
            try:
                slots = place_source(self.cache, sequence, LENGTHS[source])
            except PoolExhausted:
                self.cache.close(sequence)
                return
            self.cache.store.write(CROSS, torch.from_numpy(slots), *content(source))
            remember_source(self.cache, sequence, key)
            self.encoded += 1
        self.live.append((sequence, source))

    def extend(self, index: int, count: int) -> None:
        try:
            self.cache.commit(self.cache.extend([(self.live[index][0], count)]))
        except PoolExhausted:
            return

    def check(self) -> None:
        for group in self.cache.groups:
            assert group.pool.free + group.pool.referenced == group.pool.total
        for sequence, source in self.live:
            slots = torch.from_numpy(sequence.tables[-1].slots())
            keys, values = content(source)
            assert torch.equal(self.cache.store.keys[CROSS][:, slots], keys)
            assert torch.equal(self.cache.store.values[CROSS][:, slots], values)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["open", "fork", "extend", "truncate", "close"]), st.integers(0, 999)), max_size=40
)


@settings(max_examples=80)
@given(ACTIONS, st.integers(3, 12))
def test_whatever_happens_a_sequence_reads_its_own_source(actions: list[tuple[str, int]], blocks: int) -> None:
    sources = Sources(blocks)
    for name, number in actions:
        if name == "open":
            sources.open(number % len(LENGTHS))
        elif sources.live:
            index = number % len(sources.live)
            sequence, source = sources.live[index]
            if name == "fork":
                sources.live.append((sources.cache.fork(sequence), source))
            elif name == "extend":
                sources.extend(index, 1 + number % 6)
            elif name == "truncate":
                sources.cache.truncate(sequence, number % (sequence.tokens + 1))
            else:
                sources.cache.close(sequence)
                del sources.live[index]
        sources.check()
    for sequence, _ in sources.live:
        sources.cache.close(sequence)
    for group in sources.cache.groups:
        assert group.pool.referenced == len(group.index), "only the index holds what is left"


def test_forks_of_a_source_take_no_blocks_and_its_second_user_finds_it() -> None:
    sources = Sources(8)
    sources.open(4)
    held = sources.cache.groups[1].pool.referenced
    assert held == 3
    forks = [sources.cache.fork(sources.live[0][0]) for _ in range(5)]
    sources.open(4)
    assert sources.encoded == 1 and sources.cache.groups[1].pool.referenced == held
    for sequence in (*forks, *(own for own, _ in sources.live)):
        sources.cache.close(sequence)
    sources.live.clear()
    sources.open(4)
    assert sources.encoded == 1, "it was kept while nobody needed the room"


def dense(queries: Tensor, source: int, scale: float) -> Tensor:
    """The formula as it stands: each query over its whole source. [tokens, heads, dim]"""
    keys, values = (own.repeat_interleave(queries.shape[1] // 2, 0) for own in content(source))
    scores = torch.einsum("thd,hsd->hts", queries, keys) * scale
    return torch.einsum("hts,hsd->thd", scores.softmax(-1), values)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, len(LENGTHS) - 1), st.integers(1, 4)), min_size=1, max_size=7))
def test_every_row_attends_to_all_of_its_source_and_to_nothing_else(rows: list[tuple[int, int]]) -> None:
    sources = Sources(64)
    for source, _ in rows:
        sources.open(source)
    extension = sources.cache.extend(
        [(sequence, count) for (sequence, _), (_, count) in zip(sources.live, rows, strict=True)]
    )
    plan = build_plan(sources.cache, extension, logits=[1] * len(rows)).groups[CROSS]
    tokens = sum(count for _, count in rows)
    queries = torch.randn(tokens, 4, 4, generator=torch.Generator().manual_seed(1))
    store = sources.cache.store
    got = torch_ops.attend(queries, store.keys[CROSS], store.values[CROSS], plan, scale=0.5)
    starts = np.cumsum([0, *(count for _, count in rows)])
    expected = torch.cat(
        [dense(queries[a:b], source, 0.5) for (source, _), a, b in zip(rows, starts[:-1], starts[1:], strict=True)]
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    slow = reference.attend(queries, store.keys[CROSS], store.values[CROSS], plan, scale=0.5)
    torch.testing.assert_close(slow, expected, atol=1e-5, rtol=1e-5)
    assert plan.writes.numel() == 0
    assert len(plan.spans) <= len({source for source, _ in rows}), "a source is read once, however many rows read it"
