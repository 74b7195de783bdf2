"""Rows on one model and one cache: opened, run, remembered, held and closed.

What is here knows tables and forward passes, but neither requests nor decisions: the engine, and the calls
that work by hand on contexts, are built on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kvloom.attention import build_plan
from kvloom.blocks import Mark, PoolExhausted
from kvloom.cache import CachedSequence, Extension, KVCache, adopt_source, place_source, remember_source
from kvloom.cache.retention import Retention
from kvloom.engine.holding import Holding, Holdings
from kvloom.engine.looking import note_views
from kvloom.engine.request import Row
from kvloom.engine.retaining import begin, retain
from kvloom.errors import CacheFull
from kvloom.models import Binding, Media, Source
from kvloom.models.binding import Regime

Taken = TypeVar("Taken")


class CachedRows:
    """The rows of a model that keeps its keys and values in `cache`."""

    def __init__(self, binding: Binding, cache: KVCache, holdings: Holdings) -> None:
        self._binding = binding
        self._cache = cache
        self._holdings = holdings

    def open(
        self,
        token_ids: list[int],
        context: Holding | None = None,
        *,
        logits_of: int = 1,
        becomes: int | None = None,
        source: Source | None = None,
        media: Media | None = None,
        retention: Retention | None = None,
    ) -> Row:
        """A row that starts from a context's tables if they can serve, else from the longest cached prefix.

        Args:
            logits_of: of how many last tokens logits are wanted; these are left to be computed.
            becomes: how long the sequence will be whose rotary factors are used; by default as long as it is.
            source: what it is decoded from, the context's if there is one. The encoder runs if the cache lacks it.
            media: the images and videos of the sequence.
            retention: the policy that it is under, that of the context if this is under one.
        """
        regime = self._binding.regime(len(token_ids) if becomes is None else becomes)
        row = Row(token_ids, None, regime, source=source, media=media)
        row.cached = self._continued(row, context, logits_of, retention)
        if row.cached is None:
            reusable = _reusable(len(token_ids), logits_of, retention)
            self._open_tables(row, token_ids[: reusable + 1])
        assert row.cached is not None, "an open row has tables"
        begin(row.cached, retention, prompt_tokens=len(token_ids), trained_tokens=self._binding.max_tokens)
        return row

    def _continued(
        self, row: Row, context: Holding | None, logits_of: int, retention: Retention | None
    ) -> CachedSequence | None:
        """A fork of a context's tables; None if they cannot serve."""
        if context is None or context.cached is None or context.cached.key != self.key(row.regime, row.source):
            return None
        begins = retention if context.cached.retained is None else None
        reusable = _reusable(len(row.token_ids), logits_of, begins)
        # What is computed again is computed from the start of its block, as if nothing had been sealed yet.
        length = self._cache.unsealed_length(context.cached, min(reusable, context.cached.tokens))
        return self._cut(context.cached, length)

    def ensure_open(self, row: Row) -> None:
        """Give tables to a row that has none."""
        if row.cached is None:
            self._open_tables(row, row.token_ids)

    def renew_regime(self, row: Row) -> None:
        """Forget what was computed for a row whose rotary factors change with the length it has now."""
        regime = self._binding.regime(len(row.token_ids))
        if regime != row.regime:
            self.close(row)
            row.regime, row.logits = regime, None

    def fork_tables(self, row: Row) -> CachedSequence | None:
        """Tables that share all blocks with the row's; None if it has none."""
        return None if row.cached is None else self._cache.fork(row.cached)

    def close(self, row: Row) -> None:
        """Let go of a row's tables."""
        if row.cached is not None:
            self._cache.close(row.cached)
            row.cached = None

    def remember(self, row: Row) -> None:
        """Put a row's full blocks into the prefix index."""
        if row.cached is not None:
            self._cache.remember(row.cached, row.token_ids, extra_key=row.cached.key, marks=_marks(row))

    def hold(self, row: Row, *, claimed: bool) -> Holding:
        """Keep a row's tables; the row has none afterwards."""
        assert row.cached is not None, "only tables can be held"
        cached, row.cached = row.cached, None
        return self._holdings.add(cached, row.regime, claimed=claimed)

    def fork_holding(self, holding: Holding, tokens: int) -> Holding | None:
        """A claimed holding of the first `tokens` tokens of another; None if its tables cannot serve."""
        if holding.cached is None or holding.regime != self._binding.regime(tokens):
            return None
        cached = self._cut(holding.cached, min(tokens, holding.cached.tokens))
        return None if cached is None else self._holdings.add(cached, holding.regime, claimed=True)

    def complete(
        self, row: Row, *, step_tokens: int, logits_of: int = 1, on_held: Callable[[], None] | None = None
    ) -> Tensor:
        """Run all pending tokens of a row, in chunks, and remember its full blocks.

        Returns:
            logits, float[logits_of, vocab], of its last tokens.
        """
        tokens = len(row.token_ids)
        parts = []
        while row.computed < tokens:
            count = min(tokens - row.computed, step_tokens)
            wanted = max(0, row.computed + count - max(row.computed, tokens - logits_of))
            parts.append(self.forward([(row, count)], logits=[wanted], on_held=on_held))
        self.remember(row)
        return torch.cat(parts)

    def forward(
        self,
        work: Sequence[tuple[Row, int]],
        *,
        logits: Sequence[int],
        remember: bool = True,
        on_held: Callable[[], None] | None = None,
    ) -> Tensor:
        """One forward pass over the next tokens of rows of one regime.

        Args:
            work: rows, and how many of their pending tokens run.
            logits: of how many of these tokens logits are wanted, the last ones of each row.
            remember: whether the prefix index shall know full blocks of rows that run several tokens.
            on_held: called before retention policies let go of anything, when most is held.

        Returns:
            logits, float[sum(logits), vocab]. If the pass fails, all tables are as before.
        """
        extension = self._extend(work)
        try:
            looks = [row.look for row, _ in work]
            wanted = [None if look is None else look.wanted for look in looks]
            plan = build_plan(self._cache, extension, logits=logits, device=self._binding.device, wanted=wanted)
            parts = [(row.token_ids, row.computed - count, row.computed) for row, count in work]
            if self._binding.counting is not None:
                plan = self._binding.counting.of_step(plan, parts)
            token_ids = [token for ids, first, end in parts for token in ids[first:end]]
            result = self._binding.forward(
                torch.tensor(token_ids, device=self._binding.device),
                plan,
                self._cache.store,
                regime=work[0][0].regime,
                media=[row.media for row, _ in work],
            )
        except BaseException:
            self._cache.rollback(extension)
            raise
        for row, count in work:
            if count > 1 and remember:
                # Before windows let go of what only the prefix index may still want.
                self.remember(row)
        self._cache.commit(extension)
        if on_held is not None:
            on_held()
        retain(self._cache, extension.sequences, plan)
        note_views(plan, looks)
        return result

    def _extend(self, work: Sequence[tuple[Row, int]]) -> Extension:
        requests = [(row.cached, count) for row, count in work if row.cached is not None]
        return self.with_room(lambda: self._cache.extend(requests))

    def with_room(self, take: Callable[[], Taken]) -> Taken:
        """Do something that takes blocks, giving up unclaimed tables until there are enough."""
        while True:
            try:
                return take()
            except PoolExhausted as exhausted:
                if not self._holdings.release_oldest_unclaimed():
                    raise CacheFull(f"{exhausted}. Drop contexts, or raise budget_bytes.") from exhausted

    def _open_tables(self, row: Row, token_ids: list[int]) -> None:
        """Give a row tables that hold the longest known prefix of `token_ids`, and its source."""
        row.cached = self._cache.open(token_ids, extra_key=self.key(row.regime, row.source), marks=_marks(row))
        if row.source is not None:
            try:
                row.encoded += self._encode(row.cached, row.source)
            except BaseException:
                self.close(row)
                raise

    def _encode(self, cached: CachedSequence, source: Source) -> int:
        """Share a source's keys and values, or have them computed; returns how many tokens were."""
        key = self._binding.fingerprint() + source.key
        if adopt_source(self._cache, cached, key, source.tokens):
            return 0
        slots = self.with_room(lambda: place_source(self._cache, cached, source.tokens))
        self._binding.encode(source, self._cache.store, torch.from_numpy(slots).to(self._binding.device))
        remember_source(self._cache, cached, key)
        return source.tokens

    def key(self, regime: Regime, source: Source | None = None) -> bytes:
        """What keys and values that are computed now depend on besides tokens."""
        from_source = b"" if source is None else source.key
        return self._binding.fingerprint() + repr((regime, self._cache.layout.codec)).encode() + from_source

    def _cut(self, cached: CachedSequence, tokens: int) -> CachedSequence | None:
        """A fork of the first `tokens` tokens; None if a window has let go of what it would need."""
        if not self._cache.can_truncate(cached, tokens):
            return None
        fork = self._cache.fork(cached)
        self._cache.truncate(fork, tokens)
        return fork


def _reusable(tokens: int, logits_of: int, retention: Retention | None) -> int:
    """How many leading tokens of a prompt may come from what full attention has computed before."""
    reusable = tokens - logits_of
    return reusable if retention is None else min(reusable, retention.reusable(tokens))


def _marks(row: Row) -> list[Mark]:
    """What the prefix index knows of the media of a row."""
    return [] if row.media is None else row.media.marks


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """`torch.stack(rows)`, as a view where contiguous rows lie one behind the other already, as those of a pass do."""
    first, size = rows[0], rows[0].nbytes
    storage = first.untyped_storage().data_ptr()
    neighbours = all(
        row.data_ptr() == first.data_ptr() + index * size and row.untyped_storage().data_ptr() == storage
        for index, row in enumerate(rows)
    )
    if not neighbours or not first.is_contiguous():
        return torch.stack(list(rows))
    return first.as_strided((len(rows), *first.shape), (first.numel(), *first.stride()))
