"""The most that requests hold at once."""

from __future__ import annotations

from collections.abc import Iterable

from kvloom.cache import KVCache
from kvloom.engine.request import Request
from kvloom.engine.retaining import dropped_tokens


def note_peaks(cache: KVCache, requests: Iterable[Request]) -> None:
    """Note what `requests` hold now, and what their retention policies hid from their last tokens."""
    handed_out = sum(group.pool.handed_out for group in cache.groups)
    for request in requests:
        rows = [row.cached for row in (*request.rows, *request.finished_rows) if row.cached is not None]
        if handed_out != request.handed_out:  # else no row holds a block that none held before
            request.handed_out = handed_out
            held = cache.blocks_held(rows)
            before = request.peak_by_group or held
            request.peak_by_group = tuple(max(pair) for pair in zip(before, held, strict=True))
            request.peak_bytes = max(request.peak_bytes, cache.bytes_of(held, cache.open_blocks_held(rows)))
        request.dropped_tokens = max([request.dropped_tokens, *(dropped_tokens(cache, row) for row in rows)])
