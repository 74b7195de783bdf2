"""Spans where full blocks are sealed: a row reads the blocks that ended before its own as codes, its own natively.

So what a row reads does not depend on which tokens ran in the same step: a chunk of a prompt reads its own full
blocks as codes too, as the rows that decode behind it will.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kvloom.attention.source import Rows, Runs, Source, before_position, from_position, native_orders, written_of
from kvloom.attention.spans import Choice, Reader, Span, SpanBuilder, additive, as_tensor, positions_of
from kvloom.blocks.runs import BLOCK, COUNT, FIRST, expand_runs
from kvloom.cache.retention import Part


class SealedSpans(SpanBuilder):
    """Turns the sources of one layer group into spans."""

    def build(self, sources: Sequence[Source]) -> tuple[Span, ...]:
        """Spans over codes, then spans in native order."""
        orders = native_orders(sources)
        spans: list[Span] = []
        readers: list[Reader] = []
        fragments: list[_Fragment] = []
        for source, order in zip(sources, orders, strict=True):
            if source.hides:
                assert source.sight is not None, "only a sight hides"
                for part in source.sight.parts(source.runs, source.queries):
                    self._see_part(source, order, part, readers, spans)
                continue
            fragments += _fragments(source, order)
            if source.chooses:
                spans += [own for index in range(source.count) for own in self._chosen_spans(source, index)]
            else:
                self._see_past(source, readers, spans)
        return (*self._shared(readers), *spans, *self._native_spans(fragments))

    # What ended before a row's own block.

    def _see_past(self, source: Source, readers: list[Reader], spans: list[Span]) -> None:
        """A reader of what came before the step, and a masked span over the chunk's own blocks, or over all of it."""
        own = written_of(source).runs
        seen_first = int(self._reach.first_visible(np.array([source.first_position]))[0])
        past = from_position(source.runs[: len(source.runs) - len(own)], seen_first)
        if not self._hides(source, past):
            if len(past):
                readers.append(Reader(_rows(source), past, None))
            past = past[:0]
        ended = own[own[:, BLOCK] != own[-1, BLOCK]]
        if not len(past) + len(ended):
            return
        runs = np.concatenate([past, ended])
        queries = source.queries
        seen = positions_of(runs) >= self._reach.first_visible(queries)[:, None]
        self._masked(source, runs, seen & (_blocks_of_keys(source, runs) < _blocks_of_queries(source)[:, None]), spans)

    def _masked(
        self, source: Source, runs: Runs, seen: npt.NDArray[np.bool_], spans: list[Span], part: Part | None = None
    ) -> None:
        """A span over the codes of `runs` for those queries that see any, bool[queries, keys]."""
        first = 0 if part is None else part.queries
        index = np.flatnonzero(seen.any(axis=1))
        if not len(index):
            return
        mask = None if seen[index].all() else additive(seen[None, index], self._device)
        shift = None if part is None or part.shift is None else part.shift[index]
        read = self._read(runs, gathered=part is not None)
        spans.append(self._span(source.first_row + first + index[None], read, mask, shift))

    def _shared(self, readers: list[Reader]) -> list[Span]:
        """Spans over the pasts, of which what several have in common is read once."""
        spans: list[Span] = []
        private: list[Reader] = []
        self._share(readers, spans, private)
        chunks = [reader for reader in private if len(reader.rows) > 1]
        spans += [self._span(reader.rows[None], self._read(reader.past)) for reader in chunks]
        for stretch in sorted({reader.stretch for reader in private}):
            spans += self._decode_spans([r for r in private if len(r.rows) == 1 and r.stretch == stretch])
        return spans

    # What a retention policy lets a row see.

    def _see_part(self, source: Source, order: Rows, part: Part, readers: list[Reader], spans: list[Span]) -> None:
        """The codes and the native tokens of a part, for the queries that read it."""
        if not len(part.runs):
            return
        keys, queries = _blocks_of_keys(source, part.runs), _blocks_of_queries(source)[part.queries :]
        seen = np.ones((len(queries), len(keys)), dtype=bool) if part.seen is None else part.seen
        seen = seen & (positions_of(part.runs) <= source.queries[part.queries :, None])
        # The last block is open, or no query stands behind it: there may be no codes of it.
        ended = part.runs[:, BLOCK] != written_of(source).runs[-1, BLOCK]
        past, in_past = part.runs[ended], np.repeat(ended, part.runs[:, COUNT])
        if len(past) and source.count == 1:
            shift = 0 if part.shift is None else int(part.shift[0])
            readers.append(Reader(_rows(source), past, None, shift, part.stretch, gathered=True))
        elif len(past):
            self._masked(source, past, (seen & (keys < queries[:, None]))[:, in_past], spans, part)
        self._see_own_blocks(source, order, part, seen & (keys == queries[:, None]), spans)

    def _see_own_blocks(
        self, source: Source, order: Rows, part: Part, seen: npt.NDArray[np.bool_], spans: list[Span]
    ) -> None:
        used = np.flatnonzero(seen.any(axis=0))
        index = np.flatnonzero(seen.any(axis=1))
        if not len(used):
            return
        keys = np.searchsorted(positions_of(written_of(source).runs), positions_of(part.runs)[used])
        own = seen[np.ix_(index, used)]
        mask = None if own.all() else additive(own[None], self._device)
        shift = None if part.shift is None else part.shift[index]
        rows = source.first_row + part.queries + index[None]
        span = self._span(rows, as_tensor(order[keys][None], self._device), mask, shift)
        spans.append(replace(span, native=True))

    def _chosen_spans(self, source: Source, index: int) -> list[Span]:
        """What one query reads of the codes: some of the full blocks before the step, and all of the other runs."""
        assert source.read_tokens is not None, "only a limited source chooses"
        runs = before_position(source.runs, source.first_position + index + 1)
        full = (runs[:, COUNT] == self._block_tokens) & (runs[:, FIRST] + runs[:, COUNT] <= source.first_position)
        take = max(0, source.read_tokens // self._block_tokens - int((~full).sum()))
        sealed = runs[:, BLOCK] != runs[-1, BLOCK]
        row = np.array([[source.first_row + index]])
        if take >= full.sum():
            return [self._span(row, self._read(runs[sealed], gathered=True))] if sealed.any() else []
        always = expand_runs(runs[~full & sealed], self._block_tokens)
        if not take + len(always):
            return []
        blocks = runs[full, BLOCK].astype(np.int64)
        return [self._span(row, Choice(as_tensor(blocks, self._device), take, as_tensor(always, self._device)))]

    # A row's own block.

    def _native_spans(self, fragments: list[_Fragment]) -> list[Span]:
        alike: dict[int, list[_Fragment]] = {}
        for fragment in fragments:
            alike.setdefault(len(fragment.rows), []).append(fragment)
        return [self._native_span(own) for own in alike.values()]

    def _native_span(self, fragments: list[_Fragment]) -> Span:
        """One span over as many rows of each of several blocks; a padded key repeats one of the block's own."""
        longest = max(len(own.keys) for own in fragments)
        keys = np.stack([np.pad(own.keys, (0, longest - len(own.keys)), mode="edge") for own in fragments])
        places = np.stack([np.pad(own.positions, (0, longest - len(own.keys)), mode="edge") for own in fragments])
        real = np.arange(longest) < np.array([len(own.keys) for own in fragments])[:, None]
        queries = np.stack([own.positions[len(own.keys) - len(own.rows) :] for own in fragments])
        seen = (places[:, None] <= queries[..., None]) & real[:, None]
        seen &= places[:, None] >= self._reach.first_visible(queries)[..., None]
        mask = None if seen.all() else additive(seen, self._device)
        span = self._span(np.stack([own.rows for own in fragments]), as_tensor(keys, self._device), mask)
        return replace(span, native=True)


@dataclass(frozen=True)
class _Fragment:
    """Rows of one block and what they can see of it.

    Attributes:
        rows: int64[n], the block's new tokens, by row of the ragged row.
        keys: int64[held], the block's tokens in native order; the last n are the rows'.
        positions: int64[held], theirs.
    """

    rows: Rows
    keys: Rows
    positions: Rows


def _fragments(source: Source, order: Rows) -> list[_Fragment]:
    """One for each block that the step writes for a source."""
    written = written_of(source)
    positions = positions_of(written.runs)
    borders = [0, *(np.flatnonzero(np.diff(written.block_of_token)) + 1).tolist(), len(order)]
    fragments = []
    for start, end in pairwise(borders):
        new = np.arange(max(start, written.earlier), end) - written.earlier
        fragments.append(_Fragment(source.first_row + new, order[start:end], positions[start:end]))
    return fragments


def _rows(source: Source) -> Rows:
    return np.arange(source.first_row, source.first_row + source.count)


def _blocks_of_queries(source: Source) -> Rows:
    """int64[count]: the how-manieth of the blocks that the step writes each new token lies in."""
    written = written_of(source)
    return written.block_of_token[written.earlier :]


def _blocks_of_keys(source: Source, runs: Runs) -> Rows:
    """int64[tokens]: the same of each token of some of its runs; -1 for those in other blocks."""
    written = written_of(source)
    numbers = dict(zip(np.repeat(written.runs[:, BLOCK], written.runs[:, COUNT]), written.block_of_token, strict=True))
    return np.repeat([numbers.get(block, -1) for block in runs[:, BLOCK]], runs[:, COUNT]).astype(np.int64)
