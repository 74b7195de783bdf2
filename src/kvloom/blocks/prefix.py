"""The prefix index: which blocks already hold the beginning of a token list.

A full block is known by a digest of its tokens, of the digest of the block before it, of an extra key (model,
codec, adapter), and of what stands behind placeholder tokens that begin in it (image content), so equal digests
mean equal keys and values. The idea is that of
vLLM's automatic prefix caching: Kwon et al. 2023, "Efficient Memory Management for Large Language Model
Serving with PagedAttention", section 4.4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvloom.blocks.open import BlockIds
from kvloom.blocks.pool import BlockPool

Digest = bytes

Mark = tuple[int, Digest]
"""A token index at which placeholder tokens begin, and the digest of what stands behind them, such as an image."""


def chain_digests(
    tokens: Sequence[int],
    block_tokens: int,
    extra_key: bytes,
    *,
    parents: Sequence[Digest] = (),
    marks: Sequence[Mark] = (),
) -> list[Digest]:
    """The digest of each full block of `tokens`; `parents` are those already known, of the first blocks.

    A mark enters the block in which it stands, and by the chain all later ones; earlier blocks do not know of it.
    """
    digests = list(parents)
    behind: dict[int, bytes] = {}
    for place, shown in sorted(marks):
        behind[place // block_tokens] = behind.get(place // block_tokens, b"") + shown
    parent = digests[-1] if digests else hashlib.blake2b(extra_key, digest_size=16).digest()
    full = len(tokens) // block_tokens
    for index in range(len(digests), full):
        content = np.asarray(tokens[index * block_tokens : (index + 1) * block_tokens], dtype=np.int64)
        parent = hashlib.blake2b(parent + content.tobytes() + behind.get(index, b""), digest_size=16).digest()
        digests.append(parent)
    return digests


@dataclass(frozen=True)
class PrefixMatch:
    """Blocks that hold the first tokens of a list; both empty and 0 when nothing is known."""

    blocks: BlockIds
    tokens: int


class PrefixIndex:
    """Full blocks by digest. The index is a holder like any other: it keeps one reference a block.

    A block that only the index holds is idle. Idle blocks are reclaimed least recently used first, and of
    equally old ones the deeper first: a block whose predecessor is gone can no longer be found.
    """

    def __init__(self, pool: BlockPool, block_tokens: int) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._block_by_digest: dict[Digest, int] = {}
        self._digest_by_block: dict[int, Digest] = {}
        self._last_used = np.zeros(pool.total, dtype=np.int64)
        self._depth = np.zeros(pool.total, dtype=np.int32)
        self._clock = 0

    def __len__(self) -> int:
        return len(self._block_by_digest)

    def block(self, digest: Digest) -> int | None:
        """The block known by `digest`."""
        return self._block_by_digest.get(digest)

    def longest_match(self, digests: Sequence[Digest]) -> PrefixMatch:
        """The blocks of the longest known prefix of a chain."""
        blocks = []
        for digest in digests:
            block = self._block_by_digest.get(digest)
            if block is None:
                break
            blocks.append(block)
        return PrefixMatch(np.array(blocks, dtype=np.int32), len(blocks) * self._block_tokens)

    def insert(self, digest: Digest, block: int, *, depth: int) -> None:
        """Remember that `block`, the `depth`-th of its chain, holds what `digest` names.

        A digest that is known already keeps its block: a duplicate is not worth a second one.
        """
        if digest in self._block_by_digest or block in self._digest_by_block:
            return
        self._pool.acquire(np.array([block], dtype=np.int32))
        self._block_by_digest[digest] = block
        self._digest_by_block[block] = digest
        self._depth[block] = depth
        self._last_used[block] = self._clock

    def touch(self, blocks: BlockIds) -> None:
        """Mark `blocks` as just used."""
        self._clock += 1
        self._last_used[blocks] = self._clock

    def idle(self) -> BlockIds:
        """Blocks that only the index holds, in the order in which they would be reclaimed."""
        known = np.fromiter(self._digest_by_block, dtype=np.int32, count=len(self._digest_by_block))
        blocks = known[self._pool.references[known] == 1]
        order: BlockIds = blocks[np.lexsort((-self._depth[blocks], self._last_used[blocks]))]
        return order

    def reclaim(self, count: int) -> int:
        """Free up to `count` idle blocks, least recently used first; returns how many it freed."""
        blocks = self.idle()[:count]
        for block in blocks.tolist():
            del self._block_by_digest[self._digest_by_block.pop(block)]
        self._pool.release(blocks)
        return len(blocks)
