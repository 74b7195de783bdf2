"""The forward passes of a step: rows are prepared, and those that the schedule picks are run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from kvloom.cache import KVCache
from kvloom.engine.peaks import note_peaks
from kvloom.engine.request import Request
from kvloom.engine.rows import CachedRows
from kvloom.engine.scheduler import Scheduled
from kvloom.models import Binding


def prepare(rows: CachedRows, requests: Iterable[Request]) -> None:
    """Renew what depends on length, and give tables to the next row of each request that must compute its prompt.

    Tables are given as late as that, so that a row finds what the rows before it have computed.
    """
    for request in requests:
        for row in request.rows:
            rows.renew_regime(row)
        for row in request.rows:
            if row.pending > 1:
                rows.ensure_open(row)
            if row.pending > 1:
                break  # a row that found all but its last token runs as a decode step, beside the next


def forward_cached(rows: CachedRows, cache: KVCache, scheduled: Sequence[Scheduled]) -> int:
    """One pass a rotary regime; rows that are complete get their logits. Returns the prompt tokens computed."""
    for regime in dict.fromkeys(item.row.regime for item in scheduled):
        _forward_together(rows, cache, [item for item in scheduled if item.row.regime == regime])
    for item in scheduled:
        item.request.computed_prompt_tokens += item.prompt_tokens_run
    return sum(item.prompt_tokens_run for item in scheduled)


def _forward_together(rows: CachedRows, cache: KVCache, items: Sequence[Scheduled]) -> None:
    requests = {id(item.request): item.request for item in items}.values()
    ends = [item.row.computed + item.count == len(item.row.token_ids) for item in items]
    logits = rows.forward(
        [(item.row, item.count) for item in items],
        logits=[int(end) for end in ends],
        on_held=partial(note_peaks, cache, requests),
    )
    complete = [item.row for item, end in zip(items, ends, strict=True) if end]
    for row, own in zip(complete, logits, strict=True):
        row.logits = own


def forward_uncached(binding: Binding, requests: Iterable[Request]) -> int:
    """Whole sequences through the model's own forward; the rows of a request are equally long.

    Returns:
        the prompt tokens computed.
    """
    computed = 0
    for request in requests:
        token_ids = torch.tensor([row.token_ids for row in request.rows], device=binding.device)
        every = binding.forward_uncached(token_ids, source=request.source, media=request.media)
        for row, logits in zip(request.rows, every, strict=True):
            row.logits = logits[-1]
        if request.wanted is not None:
            views = binding.views_of(token_ids, request.wanted, source=request.source, media=request.media)
            for row, view in zip(request.rows, views, strict=True):
                assert row.look is not None, "the rows of a request are looked at alike"
                row.look.add(view)
        request.computed_source_tokens += request.source_tokens
        request.computed_prompt_tokens += (prompt_tokens := len(request.rows) * len(request.prompt_ids))
        computed += prompt_tokens
    return computed
