"""What is left of a cache."""

from __future__ import annotations

from kvloom.cache import KVCache


def available_blocks(cache: KVCache) -> int:
    """Blocks that a request can still have in every layer group: free ones, and those that only the index holds."""
    return min(group.pool.free + len(group.index.idle()) for group in cache.groups)
