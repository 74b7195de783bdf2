"""The facade over pools, tables, prefix indices and the store.

Floors above hold `CachedSequence` handles and call `open`, `extend`, `fork`, `truncate` and `close`. An
extension is a transaction: it is made for all the sequences of a step at once, and is either committed
after the forward pass or rolled back, which leaves tables and counts as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from kvloom.blocks import (
    Append,
    BlockCopy,
    BlockPool,
    Mark,
    PrefixIndex,
    PrefixMatch,
    Table,
    chain_digests,
)
from kvloom.cache.landing import Written
from kvloom.cache.layout import CacheLayout
from kvloom.cache.placement import Placement, Stored
from kvloom.cache.sequence import CachedSequence, Extension, GroupCache
from kvloom.cache.store import make_store
from kvloom.errors import CacheFull


class KVCache:
    """A paged, forkable cache of keys and values with a fixed number of blocks.

    Args:
        layout: what each layer keeps.
        budget_bytes: the most that all tensors together may take; rounded down to whole blocks.
        device: where the tensors live.

    Attributes:
        blocks: of each group's pool.
        open_blocks: how many of them can be open at once; None if they stay open for as long as they are held.
    """

    def __init__(self, layout: CacheLayout, *, budget_bytes: int, device: torch.device) -> None:
        self.layout = layout
        self.blocks = blocks = layout.pool_blocks(budget_bytes)
        try:
            self.store = make_store(layout, blocks, device)
        except (RuntimeError, MemoryError) as error:
            raise CacheFull(
                f"a cache of budget_bytes={budget_bytes:,} cannot be allocated on {device}. Lower budget_bytes."
            ) from error
        self.open_blocks = layout.open_blocks(blocks) if layout.seals else None
        self.groups = tuple(
            GroupCache(
                group,
                pool := BlockPool(blocks, open_places=self.open_blocks),
                PrefixIndex(pool, layout.block_tokens),
            )
            for group in layout.groups
        )
        # Cross-attention comes last, so that these are a sequence's first tables.
        self.own_groups = tuple(group for group in self.groups if not group.group.reach.cross)

    @property
    def capacity(self) -> tuple[int, ...]:
        """What can be reserved: blocks of each layer group, and open blocks where they have an arena of their own."""
        return self.blocks_and_open((self.blocks,) * len(self.groups), self.open_blocks or 0)

    def blocks_and_open(self, blocks: tuple[int, ...], open_blocks: int) -> tuple[int, ...]:
        """A number of blocks for each layer group, and of open blocks where they have an arena of their own."""
        return blocks if self.open_blocks is None else (*blocks, open_blocks)

    @property
    def blocks_in_use(self) -> int:
        """Blocks held by anyone, idle ones included, in the fullest group."""
        return max(group.pool.total - group.pool.free for group in self.groups)

    def open(self, tokens: Sequence[int] = (), *, extra_key: bytes = b"", marks: Sequence[Mark] = ()) -> CachedSequence:
        """A new sequence that already holds the longest known prefix of `tokens`.

        The last token is never matched, because its logits produce the first output.

        Args:
            marks: what stands behind placeholder tokens, see `chain_digests`.
        """
        tables = [Table(group.pool, self.layout.block_tokens) for group in self.groups]
        sequence = CachedSequence(tables, key=extra_key)
        if len(tokens) > 1:
            self._adopt_prefix(sequence, chain_digests(tokens[:-1], self.layout.block_tokens, extra_key, marks=marks))
        return sequence

    def extend(self, requests: Sequence[tuple[CachedSequence, int]]) -> Extension:
        """Make room for `count` new tokens in each sequence, copying shared blocks before they are written.

        Raises `PoolExhausted`, with all tables as before, if the blocks do not suffice; idle prefix blocks may have
        been reclaimed. Between an extension and its commit or rollback no sequence may be closed.
        """
        assert len({id(sequence) for sequence, _ in requests}) == len(requests), "a sequence is extended once a step"
        done: list[tuple[Table, Append]] = []
        appends: list[tuple[Append, ...]] = []
        try:
            for index, group in enumerate(self.own_groups):
                made = []
                # Once for all: a block that a copy-on-write lets go of must not be reclaimed before a rollback.
                group.ensure_free(sum(s.tables[index].blocks_for(count) for s, count in requests))
                for sequence, count in requests:
                    table = sequence.tables[index]
                    made.append(table.append(count))
                    done.append((table, made[-1]))
                appends.append(tuple(made))
        except BaseException:
            _undo(done)
            raise
        for group, made_in_group in zip(self.own_groups, appends, strict=True):
            self.store.copy(group.group, [_placed(copy, group.pool) for own in made_in_group for copy in own.copies])
        sequences, counts = zip(*requests, strict=True) if requests else ((), ())
        appends += [()] * (len(self.groups) - len(self.own_groups))
        return Extension(tuple(sequences), tuple(counts), tuple(appends))

    def rollback(self, extension: Extension) -> None:
        """Undo an extension whose step failed."""
        _undo(
            [
                (sequence.tables[index], append)
                for index, appends in enumerate(extension.appends[: len(self.own_groups)])
                for sequence, append in zip(extension.sequences, appends, strict=True)
            ]
        )

    def commit(self, extension: Extension) -> None:
        """Accept an extension: full blocks are sealed, those that no later query can see are freed."""
        for index, appends in enumerate(extension.appends[: len(self.own_groups)]):
            for sequence, append in zip(extension.sequences, appends, strict=True):
                sequence.tables[index].seal(append)
        for sequence in extension.sequences:
            self.release_unseen(sequence)

    def written(self, extension: Extension, group: int) -> tuple[Written, ...]:
        """The blocks of each sequence that an extension writes, in a cache that seals them."""
        pool = self.groups[group].pool
        return tuple(
            Written.of(sequence.tables[group].runs, count, pool, self.layout.block_tokens)
            for sequence, count in zip(extension.sequences, extension.counts, strict=True)
        )

    def release_unseen(self, sequence: CachedSequence) -> None:
        """Free what fell out of every window of `sequence`."""
        for table, group in self._own_tables(sequence):
            if not group.group.reach.unlimited:
                table.drop_before(group.group.reach.first_needed(table.position))

    def remember(
        self, sequence: CachedSequence, tokens: Sequence[int], *, extra_key: bytes = b"", marks: Sequence[Mark] = ()
    ) -> None:
        """Put the full blocks of `sequence`, which hold `tokens`, into the prefix index, as far as they are exact."""
        size = self.layout.block_tokens
        digests = chain_digests(tokens[: sequence.exact_tokens], size, extra_key, marks=marks)
        for table, group in self._own_tables(sequence):
            for block, _, count, first in table.runs.tolist():
                if count == size and first % size == 0 and first // size < len(digests):
                    group.index.insert(digests[first // size], block, depth=first // size)

    def place(self, placements: Sequence[Placement], *, tokens: int, extra_key: bytes = b"") -> CachedSequence:
        """A sequence of `tokens` tokens in blocks of its own, of which each group holds those of its placement.

        Its slots (`held`) are still to be written. Raises `PoolExhausted`, with nothing changed, if the blocks do not
        suffice; idle ones are reclaimed.
        """
        tables = [Table(group.pool, self.layout.block_tokens) for group in self.groups]
        sequence = CachedSequence(tables, key=extra_key)
        try:
            for table, group, own in zip(sequence.tables, self.groups, placements, strict=True):
                group.ensure_free(len(own.runs))
                end = int(own.runs[:, 1].sum()) if group.group.reach.cross else tokens
                table.place(own.runs, end=end, last_is_open=own.last_is_open)
        except BaseException:
            self.close(sequence)
            raise
        return sequence

    def placements(self, sequence: CachedSequence) -> tuple[Placement, ...]:
        """For each layer group, how the tokens of a sequence lie in blocks."""
        return tuple(Placement.of(table, own.pool) for table, own in zip(sequence.tables, self.groups, strict=True))

    def held(self, sequence: CachedSequence) -> tuple[Stored, ...]:
        """For each layer group, where the tokens of a sequence lie in the store."""
        return tuple(
            Stored.of(table, group.pool, self.layout.block_tokens)
            for table, group in zip(sequence.tables, self.groups, strict=True)
        )

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """A sequence with the same past; every block is shared until one of the two writes."""
        tables = [table.fork() for table in sequence.tables]
        return CachedSequence(tables, sequence.retained, foreign=sequence.foreign, key=sequence.key)

    def can_truncate(self, sequence: CachedSequence, tokens: int) -> bool:
        """Whether a sequence cut to `tokens` would still hold all that its windows, and its retention policy, need."""
        for table, group in self._own_tables(sequence):
            reach = group.group.reach
            if reach.unlimited and sequence.retained is not None:
                if tokens < sequence.tokens and not sequence.retained.policy.can_cut(table, tokens):
                    return False
            elif reach.first_needed(tokens) < min(tokens, table.first_held):
                return False
        return True

    def unsealed_length(self, sequence: CachedSequence, tokens: int) -> int:
        """The greatest length up to `tokens` to which a sequence can be cut without cutting into a sealed block.

        What is computed from there on is what it was before: the block is filled anew from its first token.
        """
        while (length := min(table.unsealed_length(tokens) for table, _ in self._own_tables(sequence))) < tokens:
            tokens = length
        return tokens

    def truncate(self, sequence: CachedSequence, tokens: int) -> None:
        """Forget the tokens at position `tokens` and beyond; see `can_truncate`.

        A sealed block that is cut keeps its codes; what is appended then begins a block of its own.
        """
        assert self.can_truncate(sequence, tokens), "a window has already let go of what this length needs"
        for table, _ in self._own_tables(sequence):
            table.truncate(tokens)
        if sequence.retained is not None:
            sequence.retained = sequence.retained.cut(tokens)

    def close(self, sequence: CachedSequence) -> None:
        """Let go of a sequence's blocks; those in the prefix index stay until they are reclaimed."""
        for table, group in zip(sequence.tables, self.groups, strict=True):
            group.index.touch(table.blocks)
            table.close()

    def blocks_held(self, sequences: Sequence[CachedSequence]) -> tuple[int, ...]:
        """For each layer group, the distinct blocks that `sequences` hold together."""
        if len(sequences) <= 1:
            return tuple(sum(len(own.tables[index].blocks) for own in sequences) for index in range(len(self.groups)))
        return tuple(
            len(np.unique(np.concatenate([sequence.tables[index].blocks for sequence in sequences])))
            for index in range(len(self.groups))
        )

    def open_blocks_held(self, sequences: Sequence[CachedSequence]) -> tuple[int, ...]:
        """Of these, for each layer group, how many have a place in the arena of open blocks."""
        return tuple(
            0
            if (places := group.pool.open_blocks) is None
            else len({int(block) for own in sequences for block in places.open_among(own.tables[index].blocks[-1:])})
            for index, group in enumerate(self.groups)
        )

    def bytes_of(self, blocks_by_group: Sequence[int], open_blocks_by_group: Sequence[int] = ()) -> int:
        """Bytes of that many blocks in each group, and of so many open ones among them."""
        open_blocks = open_blocks_by_group or (0,) * len(self.groups)
        return sum(
            blocks * self.layout.bytes_per_block(group.group) + opened * self.layout.bytes_per_open_block(group.group)
            for blocks, opened, group in zip(blocks_by_group, open_blocks, self.groups, strict=True)
        )

    def bytes_held(self, sequences: Sequence[CachedSequence]) -> int:
        """Bytes of all that `sequences` hold together."""
        return self.bytes_of(self.blocks_held(sequences), self.open_blocks_held(sequences))

    def _own_tables(self, sequence: CachedSequence) -> Iterator[tuple[Table, GroupCache]]:
        """The tables that hold the sequence's own tokens, with their groups: all but cross-attention's."""
        return zip(sequence.tables, self.own_groups, strict=False)

    def _adopt_prefix(self, sequence: CachedSequence, digests: list[bytes]) -> None:
        size = self.layout.block_tokens
        length = self._usable_blocks(digests)
        for table, group in self._own_tables(sequence):
            first = group.group.reach.first_needed(length * size) // size if length else 0
            match: PrefixMatch = group.index.longest_match(digests[first:length])
            group.index.touch(match.blocks)
            table.share(match.blocks, first=first * size)

    def _usable_blocks(self, digests: list[bytes]) -> int:
        """How many blocks of a chain can be reused: every group must know what its next query will see."""
        usable = np.ones(len(digests) + 1, dtype=bool)
        for group in self.own_groups:
            known = np.array([group.index.block(digest) is not None for digest in digests], dtype=bool)
            misses_before = np.concatenate([[0], np.cumsum(~known)])
            lengths = np.arange(len(digests) + 1)
            first = group.group.reach.first_visible(lengths * self.layout.block_tokens) // self.layout.block_tokens
            usable &= misses_before[lengths] == misses_before[np.minimum(first, lengths)]
        return int(np.flatnonzero(usable)[-1])


def _placed(copy: BlockCopy, pool: BlockPool) -> BlockCopy:
    """A copy between the places of two open blocks, where these have an arena of their own."""
    if pool.open_blocks is None:
        return copy
    source, target = pool.open_blocks.place(copy.source), pool.open_blocks.place(copy.target)
    return BlockCopy(source, target, copy.offset, copy.count)


def _undo(done: Sequence[tuple[Table, Append]]) -> None:
    for table, append in reversed(done):
        table.undo(append)
