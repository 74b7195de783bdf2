"""Pool, tables and prefix index under random operations, against dictionaries.

The test plays the store: `written` maps a slot to the token in it. What a table holds is read back through its
slots, so an operation that mixes up blocks, counts or copies shows as a wrong token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvloom.blocks import BlockPool, PoolExhausted, PrefixIndex, Table, chain_digests
from kvloom.blocks.runs import BLOCK, COUNT, FIRST, OFFSET

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=11)  # few ids, so that prefixes coincide
EXTRA_KEYS = st.sampled_from([b"", b"other weights"])


@dataclass(eq=False)
class Sequence:
    """A table, and what it should hold."""

    table: Table
    extra_key: bytes
    history: list[int] = field(default_factory=list)  # every token so far, dropped ones included
    first: int = 0  # the lowest position still held

    @property
    def held(self) -> list[tuple[int, int]]:
        return [(position, self.history[position]) for position in range(self.first, len(self.history))]


class BlocksMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(target=sequences, total=st.integers(1, 14), block_tokens=st.sampled_from([1, 2, 4]))
    def start(self, total: int, block_tokens: int) -> Sequence:
        self.size = block_tokens
        self.pool = BlockPool(total)
        self.index = PrefixIndex(self.pool, block_tokens)
        self.written: dict[int, int] = {}
        self.live: list[Sequence] = []
        self.known: dict[tuple[bytes, tuple[int, ...]], int] = {}  # (extra key, prefix) -> block
        self.used: Counter[int] = Counter()
        self.clock = 0
        return self.open(b"")

    def add(self, table: Table, extra_key: bytes, history: list[int], first: int = 0) -> Sequence:
        self.live.append(sequence := Sequence(table, extra_key, list(history), first))
        return sequence

    def counts(self) -> list[int]:
        """Holders of each block, counted from scratch."""
        holders = Counter(block for s in self.live for block in s.table.blocks.tolist())
        holders.update(self.known.values())
        return [holders[block] for block in range(self.pool.total)]

    def snapshot(self, table: Table) -> tuple[object, ...]:
        return table.runs.tolist(), table.position, self.pool.references.tolist(), self.pool.free

    def touch(self, blocks: list[int]) -> None:
        self.clock += 1
        self.used.update(dict.fromkeys(blocks, 0))
        for block in blocks:
            self.used[block] = self.clock

    # ---- the operations ---------------------------------------------------------------------------------

    @rule(target=sequences, extra_key=EXTRA_KEYS)
    def open(self, extra_key: bytes) -> Sequence:
        return self.add(Table(self.pool, self.size), extra_key, [])

    @rule(sequence=sequences, tokens=TOKENS, undo=st.sampled_from([None, None, "before writing", "after writing"]))
    def append(self, sequence: Sequence, tokens: list[int], undo: str | None) -> None:
        table = sequence.table
        before = self.snapshot(table)
        need = table.blocks_for(len(tokens))
        if need > self.pool.free:
            with pytest.raises(PoolExhausted) as caught:
                table.append(len(tokens))
            assert (caught.value.need, caught.value.have) == (need, self.pool.free)
            assert self.snapshot(table) == before
            return
        append = table.append(len(tokens))
        assert len(append.allocated) == need
        assert table.position == len(sequence.history) + len(tokens)
        if undo != "before writing":
            self.write(append, tokens)
        if undo:
            table.undo(append)
            assert self.snapshot(table) == before
        else:
            sequence.history += tokens
            if not before[0]:
                sequence.first = len(sequence.history) - len(tokens)

    def write(self, append, tokens: list[int]) -> None:
        """What the store and the model do; nobody else may hold a block that they write."""
        for copy in append.copies:
            assert self.pool.references[copy.target] == 1
            for offset in range(copy.offset, copy.offset + copy.count):
                self.written[copy.target * self.size + offset] = self.written[copy.source * self.size + offset]
        for slot, token in zip(append.slots.tolist(), tokens, strict=True):
            assert self.pool.references[slot // self.size] == 1, "a shared block was written"
            self.written[slot] = token

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: Sequence) -> Sequence:
        return self.add(sequence.table.fork(), sequence.extra_key, sequence.history, sequence.first)

    @rule(sequence=sequences, data=st.data())
    def truncate(self, sequence: Sequence, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, len(sequence.history)))
        sequence.table.truncate(position)
        del sequence.history[position:]
        sequence.first = min(sequence.first, position)

    @rule(sequence=sequences, data=st.data())
    def drop_before(self, sequence: Sequence, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, len(sequence.history)))
        blocks = len(sequence.table.blocks)
        ends = [first + count for *_, count, first in sequence.table.runs.tolist()]
        gone = sequence.table.drop_before(position)
        assert gone == blocks - len(sequence.table.blocks) == sum(end <= position for end in ends)
        if gone:
            sequence.first = ends[gone - 1]

    @rule(sequence=consumes(sequences))
    def close(self, sequence: Sequence) -> None:
        self.index.touch(sequence.table.blocks)
        self.touch(sequence.table.blocks.tolist())
        sequence.table.close()
        self.live.remove(sequence)

    @rule(sequence=sequences)
    def remember(self, sequence: Sequence) -> None:
        digests = chain_digests(sequence.history, self.size, sequence.extra_key)
        for block, offset, count, first in sequence.table.runs.tolist():
            if offset or count < self.size or first % self.size:
                continue
            depth = first // self.size
            self.index.insert(digests[depth], block, depth=depth)
            key = (sequence.extra_key, tuple(sequence.history[: first + self.size]))
            if key not in self.known and block not in self.known.values():
                self.known[key] = block
                self.used[block] = self.clock

    @rule(target=sequences, tokens=TOKENS, sequence=sequences, extra_key=EXTRA_KEYS, data=st.data())
    def share(self, tokens: list[int], sequence: Sequence, extra_key: bytes, data: st.DataObject) -> Sequence:
        """A new sequence adopts what is known of its tokens: some of another's, then some of its own."""
        tokens = sequence.history[: len(sequence.history) - data.draw(st.integers(0, 3))] + tokens
        match = self.index.longest_match(chain_digests(tokens, self.size, extra_key))
        expected = []
        for end in range(self.size, len(tokens) + 1, self.size):
            if (key := (extra_key, tuple(tokens[:end]))) not in self.known:
                break
            expected.append(self.known[key])
        assert match.blocks.tolist() == expected
        assert match.tokens == len(expected) * self.size
        skipped = data.draw(st.integers(0, len(expected)))  # a window needs the end of a prefix only
        table = Table(self.pool, self.size)
        table.share(match.blocks[skipped:], first=skipped * self.size)
        return self.add(table, extra_key, tokens[: match.tokens], skipped * self.size)

    @precondition(lambda self: self.known)
    @rule(count=st.integers(0, 5))
    def reclaim(self, count: int) -> None:
        counts = self.counts()
        depth_of = {block: len(key[1]) // self.size - 1 for key, block in self.known.items()}
        idle = [block for block in depth_of if counts[block] == 1]
        age = {block: (self.used[block], -depth_of[block]) for block in idle}
        free = self.pool.free
        freed = self.index.reclaim(count)
        assert freed == min(count, len(idle)) == self.pool.free - free
        gone = [block for block in idle if self.pool.references[block] == 0]
        kept = [block for block in idle if block not in gone]
        assert max((age[b] for b in gone), default=(-1, 0)) <= min((age[b] for b in kept), default=(1 << 60, 0))
        self.known = {key: block for key, block in self.known.items() if block not in gone}

    # ---- what holds after every step --------------------------------------------------------------------

    @invariant()
    def every_block_is_free_or_counted(self) -> None:
        assert self.pool.free + self.pool.referenced == self.pool.total
        assert self.pool.references.tolist() == self.counts()

    @invariant()
    def tables_hold_what_the_model_says(self) -> None:
        for sequence in self.live:
            table = sequence.table
            assert table.position == len(sequence.history)
            positions = [first + i for _, _, count, first in table.runs.tolist() for i in range(count)]
            slots = table.slots().tolist()
            assert len(slots) == len(set(slots)) == table.held
            assert list(zip(positions, (self.written[s] for s in slots), strict=True)) == sequence.held

    @invariant()
    def runs_stay_inside_their_blocks(self) -> None:
        for sequence in self.live:
            runs = sequence.table.runs
            assert (runs[:, COUNT] > 0).all()
            assert (runs[:, OFFSET] + runs[:, COUNT] <= self.size).all()
            assert (np.diff(runs[:, FIRST]) > 0).all()
            assert len(set(runs[:, BLOCK].tolist())) == len(runs)

    @invariant()
    def the_index_holds_what_its_digests_name(self) -> None:
        assert len(self.index) == len(self.known)
        for (_, prefix), block in self.known.items():
            slots = range(block * self.size, (block + 1) * self.size)
            assert [self.written[slot] for slot in slots] == list(prefix[-self.size :])

    @invariant()
    def idle_blocks_are_those_that_only_the_index_holds(self) -> None:
        counts = self.counts()
        idle = [block for block in self.known.values() if counts[block] == 1]
        assert sorted(self.index.idle().tolist()) == sorted(idle)


TestBlocks = BlocksMachine.TestCase
TestBlocks.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


# ---- by example ---------------------------------------------------------------------------------------------


def test_the_lowest_free_blocks_are_handed_out_so_that_a_prompt_is_contiguous() -> None:
    pool = BlockPool(8)
    first, second = pool.allocate(3), pool.allocate(2)
    pool.release(first)
    assert pool.allocate(4).tolist() == [0, 1, 2, 5]
    assert second.tolist() == [3, 4]


def test_reclaim_takes_the_least_recently_used_first_and_of_one_chain_the_end_first() -> None:
    pool = BlockPool(6)
    index = PrefixIndex(pool, 1)
    old, new = pool.allocate(3), pool.allocate(3)
    for chain, blocks in (([1, 2, 3], old), ([4, 5, 6], new)):
        for depth, (digest, block) in enumerate(zip(chain_digests(chain, 1, b""), blocks.tolist(), strict=True)):
            index.insert(digest, block, depth=depth)
        index.touch(blocks)
        pool.release(blocks)
    assert index.idle().tolist() == [*old[::-1].tolist(), *new[::-1].tolist()]
    index.touch(old)  # used again
    assert index.idle().tolist() == [*new[::-1].tolist(), *old[::-1].tolist()]
    assert index.reclaim(2) == 2
    assert index.longest_match(chain_digests([4, 5, 6], 1, b"")).tokens == 1
    assert index.longest_match(chain_digests([1, 2, 3], 1, b"")).tokens == 3


def test_a_cold_index_matches_nothing_and_reclaims_nothing() -> None:
    index = PrefixIndex(BlockPool(2), 4)
    match = index.longest_match(chain_digests(range(9), 4, b""))
    assert (match.tokens, len(match.blocks), index.reclaim(5), len(index.idle())) == (0, 0, 0, 0)


def test_a_digest_depends_on_everything_before_it_and_on_the_extra_key() -> None:
    plain = chain_digests([1, 2, 3, 4], 2, b"")
    assert len(plain) == 2
    assert chain_digests([1, 2, 3, 4, 5], 2, b"") == plain, "a block that is not full has no digest"
    assert chain_digests([9, 2, 3, 4], 2, b"")[1] != plain[1]
    assert chain_digests([1, 2, 3, 4], 2, b"image")[1] != plain[1]
    assert chain_digests([1, 2, 3, 4], 2, b"", parents=plain[:1]) == plain


def test_a_truncated_block_that_the_index_holds_is_copied_before_it_is_written() -> None:
    pool = BlockPool(3)
    table, index = Table(pool, 4), PrefixIndex(pool, 4)
    table.append(4)
    index.insert(chain_digests([1, 2, 3, 4], 4, b"")[0], 0, depth=0)
    table.truncate(2)
    (copy,) = table.append(1).copies
    assert (copy.source, copy.target, copy.offset, copy.count) == (0, 1, 0, 2)


def test_appending_after_a_hole_starts_a_new_run() -> None:
    pool = BlockPool(4)
    table = Table(pool, 4)
    table.append(6)
    table.drop_before(6)
    assert (len(table.runs), table.position, table.held) == (0, 6, 0)
    table.append(3)
    assert table.runs.tolist() == [[0, 0, 3, 6]]


def test_a_window_adopts_the_end_of_a_prefix_at_its_own_positions() -> None:
    pool = BlockPool(4)
    owner, window = Table(pool, 4), Table(pool, 4)
    owner.append(12)
    window.share(owner.blocks[1:], first=4)
    assert window.runs.tolist() == [[1, 0, 4, 4], [2, 0, 4, 8]]
    assert (window.position, window.held, window.first_held) == (12, 8, 4)
    assert pool.references.tolist() == [1, 2, 2, 0]
