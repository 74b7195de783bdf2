"""Tables to and from elsewhere: files, and caches of transformers. Nothing is computed for what comes in."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from kvloom.cache import KVCache, Store, remember_source
from kvloom.cache.placement import Placement
from kvloom.cache.retention import Retention
from kvloom.cache.snapshot import Beside, Origin, SnapshotReader, as_regime, write_snapshot
from kvloom.engine.foreign import Pair
from kvloom.engine.holding import Holding, Restored
from kvloom.engine.request import Row
from kvloom.engine.rows import CachedRows
from kvloom.errors import InvalidRequest
from kvloom.exclusive import interruptible
from kvloom.models import Binding, Media, Source
from kvloom.models.beside import read_beside


class Transfers:
    """What leaves one cache as it is, and what comes to it as it was.

    Args:
        rows: of the same binding and cache, among which the newcomers are.
    """

    def __init__(self, binding: Binding, cache: KVCache, rows: CachedRows) -> None:
        self._binding = binding
        self._cache = cache
        self._rows = rows

    def save(
        self,
        holding: Holding,
        token_ids: Sequence[int],
        path: str | os.PathLike[str],
        origin: Origin,
        beside: Beside,
        retention: Retention | None,
    ) -> None:
        """Write a holding's tables and what they hold into a file, with what the sequence stands on besides.

        Args:
            retention: the policy that the context is under.
        """
        assert holding.cached is not None, "only tables can be saved"
        if holding.cached.foreign:
            raise InvalidRequest("a context that began with an imported cache cannot be saved. Prefill its token_ids.")
        with interruptible():
            write_snapshot(
                path,
                self._cache,
                holding.cached,
                token_ids=token_ids,
                regime=as_regime(holding.regime),
                origin=origin,
                beside=beside,
                retention=retention,
            )

    def restore(self, snapshot: SnapshotReader, placements: Sequence[Placement]) -> Restored:
        """What a snapshot holds, in blocks of its own; the full ones, and its source, can be found again."""
        cached = self._rows.with_room(lambda: self._cache.place(placements, tokens=snapshot.tokens))
        row = Row(snapshot.token_ids, cached, snapshot.regime)
        try:
            cached.retained = snapshot.retained(placements, self._cache.layout, self._binding.max_tokens)
            with interruptible():
                snapshot.load(self._cache, cached)
            row.source, row.media = self._read_beside(snapshot, placements)
            cached.key = self._rows.key(row.regime, row.source)
            if row.source is not None:
                remember_source(self._cache, cached, self._binding.fingerprint() + row.source.key)
            self._rows.remember(row)
        except BaseException:
            self._rows.close(row)
            raise
        return Restored(row.token_ids, self._rows.hold(row, claimed=True), row.source, row.media, snapshot.retention)

    def _read_beside(
        self, snapshot: SnapshotReader, placements: Sequence[Placement]
    ) -> tuple[Source | None, Media | None]:
        """The source and the images of a snapshot, whose digest is right."""
        try:
            source, media = read_beside(snapshot.beside, tokens=len(snapshot.token_ids))
        except (ValueError, KeyError, TypeError) as error:
            raise snapshot.corrupt(f"it holds {error}") from error
        held = int(placements[-1].runs[:, 1].sum()) if self._binding.encoder is not None else 0
        if held != (0 if source is None else source.tokens):
            raise snapshot.corrupt("it holds another source than its keys and values are of")
        return source, media

    def placements_needed(self, tokens: int) -> list[Placement]:
        """For each layer group, where the tokens lie that a sequence of `tokens` tokens must hold to go on."""
        layout = self._cache.layout
        firsts = [group.reach.first_needed(tokens) for group in layout.groups]
        return [
            Placement.of_positions(np.arange(first, tokens, dtype=np.int64), layout.block_tokens) for first in firsts
        ]

    def adopt(self, token_ids: list[int], pairs: Sequence[Pair], placements: Sequence[Placement]) -> Holding:
        """A claimed holding of keys and values that were computed elsewhere, each [kv_heads, tokens, dim]."""
        store, tokens, device = self._cache.store, pairs[0][0].shape[1], self._binding.device
        if not isinstance(store, Store):
            raise InvalidRequest("an int8 cache cannot take over keys and values. Attach with `codec='native'`.")
        regime = self._binding.regime(tokens)
        key = self._rows.key(regime)
        cached = self._rows.with_room(lambda: self._cache.place(placements, tokens=tokens, extra_key=key))
        cached.foreign = True
        row = Row(token_ids, cached, regime)
        try:
            for layer, group in enumerate(self._cache.layout.group_of_layer):
                table = cached.tables[group]
                held, slots = torch.from_numpy(table.positions()), torch.from_numpy(table.slots()).to(device)
                keys, values = (part.index_select(1, held.to(part.device)).to(device) for part in pairs[layer])
                store.write(layer, slots, keys, values)
        except BaseException:
            self._rows.close(row)
            raise
        return self._rows.hold(row, claimed=True)
