"""Cross-attention's keys and values: computed once a source, in blocks that every sequence of that source shares.

A source has a table of its own in the group of cross-attention, and each sequence that decodes from it a fork of that
table. Nothing is ever appended to it, so a fork never copies, a reordering of beams has nothing to move, and a codec
seals all its blocks at once. The blocks are known by the source's key, so the same source is found again as long as its
blocks are not reclaimed.
"""

from __future__ import annotations

import hashlib

from kvloom.blocks import Table
from kvloom.blocks.runs import Slots, blocks_of
from kvloom.cache.cache import KVCache
from kvloom.cache.sequence import CachedSequence, GroupCache


def adopt_source(cache: KVCache, sequence: CachedSequence, key: bytes, tokens: int) -> bool:
    """Share a known source's blocks with a new sequence; False, with nothing changed, if they are not all there."""
    group, table = _of(cache, sequence)
    digests = _digests(key, tokens, cache.layout.block_tokens)
    match = group.index.longest_match(digests)
    if len(match.blocks) < len(digests):
        return False
    group.index.touch(match.blocks)
    table.share(match.blocks, unused=len(digests) * cache.layout.block_tokens - tokens)
    return True


def place_source(cache: KVCache, sequence: CachedSequence, tokens: int) -> Slots:
    """Make room for a source in new blocks of a sequence; returns int64[tokens], the slots to be written.

    Raises `PoolExhausted`, with nothing changed, if the blocks do not suffice; idle ones are reclaimed.
    """
    group, table = _of(cache, sequence)
    group.ensure_free(blocks_of(tokens, cache.layout.block_tokens))
    slots = table.append(tokens).slots
    if group.pool.open_blocks is not None:
        # It never grows, so its last block is as full as it will be.
        group.pool.open_blocks.seal(table.blocks)
    return slots


def remember_source(cache: KVCache, sequence: CachedSequence, key: bytes) -> None:
    """Let a source be found again, once its keys and values are written."""
    group, table = _of(cache, sequence)
    for depth, digest in enumerate(_digests(key, table.position, cache.layout.block_tokens)):
        group.index.insert(digest, int(table.blocks[depth]), depth=depth)


def _of(cache: KVCache, sequence: CachedSequence) -> tuple[GroupCache, Table]:
    group = cache.groups[-1]
    assert group.group.reach.cross, "only a model with cross-attention has sources"
    return group, sequence.tables[-1]


def _digests(key: bytes, tokens: int, block_tokens: int) -> list[bytes]:
    """What each block of a source is known by, the last and perhaps partial one included."""
    blocks = blocks_of(tokens, block_tokens)
    return [hashlib.blake2b(b"%d of %d " % (block, tokens) + key, digest_size=16).digest() for block in range(blocks)]
