"""The cache facade under random operations, with real tensors, against plain token lists.

Every key and value is a number that depends on the whole history of its token, as in a model, and on the extra
key and the layer. So whatever is read from a wrong slot, an unwritten one or somebody else's shows.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from dataclasses import dataclass
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from counting import available_blocks
from kvloom.blocks import PoolExhausted
from kvloom.blocks.runs import COUNT, FIRST
from kvloom.blocks.table import Table
from kvloom.cache import CachedSequence, CacheLayout, Extension, KVCache, LayerShape, Reach
from kvloom.cache.placement import Placement
from kvloom.cache.snapshot import Beside, Origin, open_snapshot, write_snapshot

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)
ORIGIN = Origin(model="numbers", fingerprint="0", dtype="float32")
EXTRA_KEYS = st.sampled_from([b"", b"other weights"])
REACHES = st.one_of(
    st.integers(1, 9).map(lambda tokens: Reach(window_tokens=tokens)),
    st.integers(1, 9).map(lambda tokens: Reach(chunk_tokens=tokens)),
)


def layout_of(limited: Reach, block_tokens: int) -> CacheLayout:
    return CacheLayout(
        layers=(
            LayerShape(kv_heads=1, key_dim=2, value_dim=3, reach=limited),
            LayerShape(kv_heads=2, key_dim=1, value_dim=1),
            LayerShape(kv_heads=1, key_dim=1, value_dim=2, reach=limited),
        ),
        dtype=torch.float32,
        block_tokens=block_tokens,
    )


def cache_of(limited: Reach, *, block_tokens: int, blocks: int) -> KVCache:
    layout = layout_of(limited, block_tokens)
    cache = KVCache(layout, budget_bytes=blocks * layout.bytes_per_row_of_blocks, device=torch.device("cpu"))
    for tensor in (*cache.store.keys, *cache.store.values):
        tensor.fill_(torch.nan)
    return cache


@functools.cache
def number(extra_key: bytes, history: tuple[int, ...], layer: int) -> float:
    """What the key of the last token of `history` is made of."""
    digest = hashlib.blake2b(extra_key + bytes([255, layer, *history]), digest_size=3).digest()
    return float(int.from_bytes(digest, "big"))


@dataclass(eq=False)
class Sequence:
    cached: CachedSequence
    extra_key: bytes
    history: list[int]


class CacheMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(target=sequences, limited=REACHES, block_tokens=st.sampled_from([1, 2, 4]), blocks=st.integers(3, 20))
    def start(self, limited: Reach, block_tokens: int, blocks: int) -> Sequence:
        self.cache = cache_of(limited, block_tokens=block_tokens, blocks=blocks)
        self.limited = limited
        self.live: list[Sequence] = []
        return self.open([0], b"")

    def snapshot(self) -> list[object]:
        return [[(table.runs.tolist(), table.position) for table in sequence.cached.tables] for sequence in self.live]

    def holders(self, group: int) -> list[int]:
        counts = np.zeros(self.cache.blocks, dtype=int)
        for sequence in self.live:
            counts[sequence.cached.tables[group].blocks] += 1
        counts[list(self.cache.groups[group].index._digest_by_block)] += 1
        return counts.tolist()

    def write(self, extension: Extension, sequences: list[Sequence], tokens: list[list[int]]) -> None:
        """A forward pass: each layer puts the keys and values of the new tokens into the store."""
        for layer, shape in enumerate(self.cache.layout.layers):
            numbers = [
                number(sequence.extra_key, (*sequence.history, *own[: i + 1]), layer)
                for sequence, own in zip(sequences, tokens, strict=True)
                for i in range(len(own))
            ]
            row = torch.tensor(numbers)[None, :, None]
            slots = torch.from_numpy(extension.slots(self.cache.layout.group_of_layer[layer]))
            self.cache.store.write(
                layer,
                slots,
                row.expand(shape.kv_heads, -1, shape.key_dim),
                -row.expand(shape.kv_heads, -1, shape.value_dim),
            )

    # ---- the operations ---------------------------------------------------------------------------------

    @rule(target=sequences, tokens=TOKENS, extra_key=EXTRA_KEYS)
    def open(self, tokens: list[int], extra_key: bytes) -> Sequence:
        cached = self.cache.open(tokens, extra_key=extra_key)
        assert cached.tokens < len(tokens), "the last token's logits are needed, so it is never matched"
        assert cached.tokens % self.cache.layout.block_tokens == 0
        self.live.append(sequence := Sequence(cached, extra_key, tokens[: cached.tokens]))
        return sequence

    @rule(target=sequences, sequence=sequences, ending=TOKENS, extra_key=EXTRA_KEYS)
    def open_with_the_history_of_another(self, sequence: Sequence, ending: list[int], extra_key: bytes) -> Sequence:
        return self.open(sequence.history + ending, extra_key)

    @rule(
        chosen=st.lists(sequences, min_size=1, max_size=4, unique_by=id),
        data=st.data(),
        fate=st.sampled_from(["commit", "commit", "commit", "roll back", "fail after writing"]),
    )
    def extend(self, chosen: list[Sequence], data: st.DataObject, fate: str) -> None:
        tokens = [data.draw(TOKENS) for _ in chosen]
        before = self.snapshot()
        free_or_idle = available_blocks(self.cache)
        most = [
            sum(s.cached.tables[group].blocks_for(len(own)) for s, own in zip(chosen, tokens, strict=True))
            for group in range(2)
        ]
        requests = [(s.cached, len(own)) for s, own in zip(chosen, tokens, strict=True)]
        try:
            extension = self.cache.extend(requests)
        except PoolExhausted:
            assert max(most) > free_or_idle, "refused although there was room"
            assert self.snapshot() == before
            return
        if fate != "roll back":
            self.write(extension, chosen, tokens)
        if fate == "commit":
            for sequence, own in zip(chosen, tokens, strict=True):
                sequence.history = sequence.history + own
            self.cache.commit(extension)
            for sequence in chosen:
                self.check_freed(sequence)
        else:
            self.cache.rollback(extension)
            assert self.snapshot() == before

    def check_freed(self, sequence: Sequence) -> None:
        """A limited group keeps no block that lies wholly before what the next query sees."""
        needed = self.limited.first_needed(len(sequence.history))
        runs = sequence.cached.tables[1].runs
        assert (runs[:, FIRST] + runs[:, COUNT] > needed).all()

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: Sequence) -> Sequence:
        cached = self.cache.fork(sequence.cached)
        self.live.append(child := Sequence(cached, sequence.extra_key, list(sequence.history)))
        return child

    @rule(target=sequences, sequence=sequences)
    def save_and_restore(self, sequence: Sequence) -> Any:
        """Into a file and back, beside what is there; the invariants look at what was read."""
        if not sequence.history:
            return multiple()
        free_or_idle, before = available_blocks(self.cache), self.snapshot()
        with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):
            path = f"{folder}/a.kv"
            write_snapshot(
                path,
                self.cache,
                sequence.cached,
                token_ids=[*sequence.history, 7],
                regime=(3,),
                origin=ORIGIN,
                beside=Beside(),
            )
            with open_snapshot(path) as file:
                assert (file.origin, file.regime, file.token_ids) == (ORIGIN, (3,), [*sequence.history, 7])
                try:
                    cached = self.cache.place(file.placements(self.cache.layout), tokens=file.tokens)
                except PoolExhausted:
                    assert max(len(table.runs) for table in sequence.cached.tables) > free_or_idle
                    assert self.snapshot() == before
                    return multiple()
                file.load(self.cache, cached)
        for table, original in zip(cached.tables, sequence.cached.tables, strict=True):
            assert positions_of(table) == positions_of(original), "the same tokens, in other blocks"
        self.live.append(copy := Sequence(cached, sequence.extra_key, list(sequence.history)))
        return copy

    @rule(sequence=sequences, data=st.data())
    def truncate(self, sequence: Sequence, data: st.DataObject) -> None:
        tokens = data.draw(st.integers(0, len(sequence.history)))
        possible = all(
            set(range(group.group.reach.first_needed(tokens), tokens)) <= set(positions_of(table))
            for table, group in zip(sequence.cached.tables, self.cache.groups, strict=True)
        )
        assert self.cache.can_truncate(sequence.cached, tokens) == possible
        if possible:
            self.cache.truncate(sequence.cached, tokens)
            sequence.history = sequence.history[:tokens]

    @rule(sequence=sequences)
    def remember(self, sequence: Sequence) -> None:
        self.cache.remember(sequence.cached, sequence.history, extra_key=sequence.extra_key)

    @rule(sequence=consumes(sequences))
    def close(self, sequence: Sequence) -> None:
        self.cache.close(sequence.cached)
        self.live.remove(sequence)

    # ---- what holds after every step --------------------------------------------------------------------

    @invariant()
    def every_block_is_free_or_counted(self) -> None:
        for group, own in enumerate(self.cache.groups):
            assert own.pool.free + own.pool.referenced == own.pool.total
            assert own.pool.references.tolist() == self.holders(group)

    @invariant()
    def what_the_next_query_sees_is_in_the_store(self) -> None:
        for sequence in self.live:
            length = len(sequence.history)
            assert [table.position for table in sequence.cached.tables] == [length, length]
            for layer in range(len(self.cache.layout.layers)):
                index = self.cache.layout.group_of_layer[layer]
                table = sequence.cached.tables[index]
                positions = positions_of(table)
                needed = self.cache.groups[index].group.reach.first_needed(length)
                assert set(range(needed, length)) <= set(positions)
                expected = torch.tensor(
                    [number(sequence.extra_key, tuple(sequence.history[: p + 1]), layer) for p in positions]
                )
                slots = torch.from_numpy(table.slots())
                assert (self.cache.store.keys[layer][:, slots] == expected[:, None]).all()
                assert (self.cache.store.values[layer][:, slots] == -expected[:, None]).all()


def positions_of(table: Table) -> list[int]:
    return [first + i for _, _, count, first in table.runs.tolist() for i in range(count)]


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


# ---- by example ---------------------------------------------------------------------------------------------


def run(cache: KVCache, *requests: tuple[CachedSequence, int]) -> None:
    cache.commit(cache.extend(requests))


@pytest.fixture
def three_blocks() -> KVCache:
    return cache_of(Reach(window_tokens=100), block_tokens=4, blocks=3)


def test_a_block_that_a_copy_let_go_of_is_not_reclaimed_before_the_rollback(three_blocks: KVCache) -> None:
    cache = three_blocks
    first, second = cache.open(), cache.open()
    run(cache, (first, 4))
    cache.remember(first, [1, 2, 3, 4])
    cache.truncate(first, 2)  # a partial block that the index holds too: the next write copies it
    run(cache, (second, 4))
    with pytest.raises(PoolExhausted):
        cache.extend([(first, 1), (second, 4)])
    assert [group.pool.references[0] - 1 for group in cache.groups] == [1, 1]
    assert first.tables[0].runs.tolist() == [[0, 0, 2, 0]]


def test_idle_blocks_are_reclaimed_when_a_sequence_needs_them(three_blocks: KVCache) -> None:
    old = three_blocks.open()
    run(three_blocks, (old, 9))
    three_blocks.remember(old, list(range(9)))
    three_blocks.close(old)
    assert available_blocks(three_blocks) == 3
    assert [group.pool.free for group in three_blocks.groups] == [1, 1]
    assert three_blocks.open(range(9)).tokens == 8
    run(three_blocks, (three_blocks.open(), 4))


def test_an_extension_that_fails_leaves_no_block_behind(three_blocks: KVCache) -> None:
    first, second = three_blocks.open(), three_blocks.open()
    with pytest.raises(PoolExhausted):
        three_blocks.extend([(first, 8), (second, 8)])
    assert available_blocks(three_blocks) == 3
    assert first.tokens == second.tokens == 0


@pytest.mark.parametrize("reach", [Reach(window_tokens=5), Reach(chunk_tokens=8), Reach(window_tokens=1)], ids=str)
def test_a_prefix_is_found_again_up_to_its_last_full_block_but_never_to_the_last_token(reach: Reach) -> None:
    cache = cache_of(reach, block_tokens=4, blocks=16)
    tokens = list(range(16))
    sequence = cache.open(tokens)
    for done in range(0, 16, 4):  # chunks, so that a window group is remembered before it lets go
        run(cache, (sequence, 4))
        cache.remember(sequence, tokens[: done + 4])
    assert cache.open(tokens).tokens == 12
    assert cache.open([*tokens, 99]).tokens == 16
    assert cache.open([*tokens[:11], 99, 99]).tokens == 8
    assert cache.open(tokens, extra_key=b"other").tokens == 0
    assert cache.open([]).tokens == cache.open([0]).tokens == 0


def test_a_window_that_was_let_go_of_is_not_matched() -> None:
    cache = cache_of(Reach(window_tokens=4), block_tokens=4, blocks=16)
    sequence = cache.open()
    run(cache, (sequence, 16))
    cache.remember(sequence, list(range(16)))  # the window group holds the last block only
    assert cache.open([*range(12), 99]).tokens == 0, "the full group knows 12 tokens, the window group none of them"
    assert cache.open([*range(16), 99]).tokens == 16


def test_a_chunk_that_ended_can_not_be_cut_into() -> None:
    cache = cache_of(Reach(chunk_tokens=8), block_tokens=4, blocks=8)
    sequence = cache.open()
    run(cache, (sequence, 8))
    assert sequence.tables[1].held == 0
    assert [tokens for tokens in range(9) if cache.can_truncate(sequence, tokens)] == [0, 8]


def test_a_window_group_holds_a_bounded_number_of_blocks_however_long_the_sequence() -> None:
    cache = cache_of(Reach(window_tokens=6), block_tokens=4, blocks=64)
    sequence = cache.open()
    for _ in range(200):
        run(cache, (sequence, 1))
        assert cache.blocks_held([sequence])[1] <= 3
    assert cache.blocks_held([sequence])[0] == 50


def test_the_distinct_blocks_of_forks_are_counted_once() -> None:
    cache = cache_of(Reach(window_tokens=100), block_tokens=4, blocks=16)
    parent = cache.open()
    run(cache, (parent, 10))
    child = cache.fork(parent)
    assert cache.blocks_held([parent, child]) == (3, 3)
    run(cache, (parent, 1), (child, 1))  # one of the two copies the partial block
    assert cache.blocks_held([parent, child]) == (4, 4)
    assert cache.blocks_held([]) == (0, 0)
    assert cache.bytes_of((1, 1)) == cache.layout.bytes_per_row_of_blocks


def test_placed_tokens_lie_in_their_blocks_where_appended_ones_would() -> None:
    cache = cache_of(Reach(window_tokens=6), block_tokens=4, blocks=8)
    positions = np.array([0, 1, 2, 3, 4, 5, 6]), np.array([1, 2, 3, 4, 6])  # the second with a gap
    sequence = cache.place([Placement.of_positions(own, 4) for own in positions], tokens=7)
    slots = [table.slots() for table in sequence.tables]
    full, gaps = (table.runs[:, 1:].tolist() for table in sequence.tables)
    assert full == [[0, 4, 0], [0, 3, 4]]
    assert gaps == [[1, 3, 1], [0, 1, 4], [2, 1, 6]]
    assert [sorted(own) for own in slots] == [own.tolist() for own in slots], "each slot once, in token order"
    assert [table.positions().tolist() for table in sequence.tables] == [own.tolist() for own in positions]
    run(cache, (sequence, 2))
    assert sequence.tables[0].runs[:, 1:].tolist() == [[0, 4, 0], [0, 4, 4], [0, 1, 8]]
    cache.close(sequence)
    assert [group.pool.free for group in cache.groups] == [8, 8]
