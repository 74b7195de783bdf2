"""The facade over pools, tables, prefix indices and the store.

Floors above hold `CachedSequence` handles and call `open`, `extend`, `fork`, `truncate` and `close`. An
extension is a transaction: it is made for all the sequences of a step at once, and is either committed
after the forward pass or rolled back, which leaves tables and counts as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvloom.blocks import Append, BlockPool, PoolExhausted, PrefixIndex, PrefixMatch, Table, chain_digests
from kvloom.blocks.table import Slots, pieces
from kvloom.cache.layout import CacheLayout, LayerGroup
from kvloom.cache.retention import Retained
from kvloom.cache.store import Store
from kvloom.errors import CacheFull


@dataclass
class GroupCache:
    """Pool and prefix index of one layer group."""

    group: LayerGroup
    pool: BlockPool
    index: PrefixIndex

    @property
    def available(self) -> int:
        """Blocks that can be had: free, or idle in the prefix index."""
        return self.pool.free + len(self.index.idle())

    def ensure_free(self, count: int) -> None:
        """Reclaim idle blocks until `count` are free, as far as there are any."""
        if self.pool.free < count:
            self.index.reclaim(count - self.pool.free)


class CachedSequence:
    """One sequence's tables, one a layer group, and what its retention policy knows of it (None without one).

    Made by `KVCache.open` and `fork`. `foreign` if it began with keys and values that this model has not computed, so
    that nothing of it may be found by others.
    """

    def __init__(self, tables: list[Table], retained: Retained | None = None, *, foreign: bool = False) -> None:
        self.tables = tables
        self.retained = retained
        self.foreign = foreign

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are in the cache, or were before they left a window."""
        return self.tables[0].position

    @property
    def exact_tokens(self) -> int:
        """How many of the first ones have the keys and values of full attention, as this model computes it."""
        if self.foreign:
            return 0
        limit = None if self.retained is None else self.retained.exact_tokens
        return self.tokens if limit is None else min(limit, self.tokens)


@dataclass(frozen=True)
class Extension:
    """The slots of one step's new tokens.

    Attributes:
        sequences: the sequences that were extended, in the order of the ragged row.
        counts: new tokens of each.
        appends: for each layer group, one `Append` a sequence; none for cross-attention, which only reads.
    """

    sequences: tuple[CachedSequence, ...]
    counts: tuple[int, ...]
    appends: tuple[tuple[Append, ...], ...]

    def slots(self, group: int) -> Slots:
        """int64[tokens], where the ragged row's keys and values go in `group`; none in cross-attention's."""
        return np.concatenate([np.empty(0, dtype=np.int64), *(append.slots for append in self.appends[group])])


class KVCache:
    """A paged, forkable cache of keys and values with a fixed number of blocks.

    Args:
        layout: what each layer keeps.
        budget_bytes: the most that all tensors together may take; rounded down to whole blocks.
        device: where the tensors live.
    """

    def __init__(self, layout: CacheLayout, *, budget_bytes: int, device: torch.device) -> None:
        blocks = layout.blocks_in(budget_bytes)
        if blocks < 1:
            raise CacheFull(
                f"budget_bytes={budget_bytes:,} is below one block: a block of {layout.block_tokens} tokens "
                f"takes {layout.bytes_per_row_of_blocks:,} bytes. Raise budget_bytes."
            )
        self.layout = layout
        self.blocks = blocks
        try:
            self.store = Store(layout, blocks, device)
        except (RuntimeError, MemoryError) as error:
            raise CacheFull(
                f"a cache of budget_bytes={budget_bytes:,} cannot be allocated on {device}. Lower budget_bytes."
            ) from error
        self.groups = tuple(
            GroupCache(group, pool := BlockPool(blocks), PrefixIndex(pool, layout.block_tokens))
            for group in layout.groups
        )
        # Cross-attention comes last, so that these are a sequence's first tables.
        self.own_groups = tuple(group for group in self.groups if not group.group.reach.cross)

    @property
    def available_blocks(self) -> int:
        """Blocks that a request can still have in every group: free ones and idle ones."""
        return min(group.available for group in self.groups)

    def open(self, tokens: Sequence[int] = (), *, extra_key: bytes = b"", reuse: bool = True) -> CachedSequence:
        """A new sequence that already holds the longest known prefix of `tokens`.

        The last token is never matched, because its logits produce the first output.
        """
        sequence = CachedSequence([Table(group.pool, self.layout.block_tokens) for group in self.groups])
        if reuse and len(tokens) > 1:
            self._adopt_prefix(sequence, chain_digests(tokens[:-1], self.layout.block_tokens, extra_key))
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
            self.store.copy(group.group, [copy for append in made_in_group for copy in append.copies])
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
        """Accept an extension: blocks that no later query can see are freed."""
        for sequence in extension.sequences:
            self.release_unseen(sequence)

    def release_unseen(self, sequence: CachedSequence) -> None:
        """Free what fell out of every window of `sequence`."""
        for table, group in self._own_tables(sequence):
            if not group.group.reach.unlimited:
                table.drop_before(group.group.reach.first_needed(table.position))

    def remember(self, sequence: CachedSequence, tokens: Sequence[int], *, extra_key: bytes = b"") -> None:
        """Put the full blocks of `sequence`, which hold `tokens`, into the prefix index, as far as they are exact."""
        size = self.layout.block_tokens
        digests = chain_digests(tokens[: sequence.exact_tokens], size, extra_key)
        for table, group in self._own_tables(sequence):
            for block, _, count, first in table.runs.tolist():
                if count == size and first % size == 0 and first // size < len(digests):
                    group.index.insert(digests[first // size], block, depth=first // size)

    def place(self, positions: Sequence[Slots], *, tokens: int) -> tuple[CachedSequence, tuple[Slots, ...]]:
        """A sequence of `tokens` tokens, of which each group holds those at its `positions`, in blocks of its own.

        Args:
            positions: of cross-attention those of the source's tokens.
            tokens: of the sequence.

        Returns:
            the sequence, and for each group the int64 slots, which are still to be written.

        Raises `PoolExhausted`, with nothing changed, if the blocks do not suffice; idle ones are reclaimed.
        """
        sequence = CachedSequence([Table(group.pool, self.layout.block_tokens) for group in self.groups])
        try:
            slots = []
            for table, group, own in zip(sequence.tables, self.groups, positions, strict=True):
                group.ensure_free(len(pieces(own, self.layout.block_tokens)[0]))
                slots.append(table.place(own, end=len(own) if group.group.reach.cross else tokens))
        except BaseException:
            self.close(sequence)
            raise
        return sequence, tuple(slots)

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """A sequence with the same past; every block is shared until one of the two writes."""
        tables = [table.fork() for table in sequence.tables]
        return CachedSequence(tables, sequence.retained, foreign=sequence.foreign)

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

    def truncate(self, sequence: CachedSequence, tokens: int) -> None:
        """Forget the tokens at position `tokens` and beyond; see `can_truncate`."""
        assert self.can_truncate(sequence, tokens), "a window has already let go of what this length needs"
        for table, _ in self._own_tables(sequence):
            table.truncate(tokens)

    def close(self, sequence: CachedSequence) -> None:
        """Let go of a sequence's blocks; those in the prefix index stay until they are reclaimed."""
        for table, group in zip(sequence.tables, self.groups, strict=True):
            group.index.touch(table.blocks)
            table.close()

    def blocks_held(self, sequences: Sequence[CachedSequence]) -> tuple[int, ...]:
        """For each layer group, the distinct blocks that `sequences` hold together."""
        return tuple(
            len(np.unique(np.concatenate([sequence.tables[index].blocks for sequence in sequences])))
            if sequences
            else 0
            for index in range(len(self.groups))
        )

    def bytes_of(self, blocks_by_group: Sequence[int]) -> int:
        """Bytes of that many blocks in each group."""
        return sum(
            blocks * self.layout.bytes_per_block(group.group)
            for blocks, group in zip(blocks_by_group, self.groups, strict=True)
        )

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


def _undo(done: Sequence[tuple[Table, Append]]) -> None:
    for table, append in reversed(done):
        table.undo(append)


__all__ = ["CachedSequence", "Extension", "GroupCache", "KVCache", "PoolExhausted"]
