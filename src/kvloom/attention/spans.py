"""The spans of a step: which slots are read together by which query rows, for kernels that work span by span.

A span is a run of slots together with the query rows that read all of it, so a prefix that eight beams share is one
span read once for eight rows. A row that is in several spans gets their partial results merged by log-sum-exp
(Dao et al. 2022, FlashAttention, section 3.1; shared prefixes as in Juravsky et al. 2024, Hydragen, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.attention.source import Rows, Runs, Source, before_position, from_position
from kvloom.blocks.runs import BLOCK, COUNT, FIRST, OFFSET, expand_runs
from kvloom.cache import Reach
from kvloom.cache.retention import Part

# A span of its own costs some ten operator calls a layer; below these lengths reading twice is cheaper.
MIN_SHARED_TOKENS = 64
MIN_VIEW_TOKENS = 128

MAX_GATHERED_ROWS = 32
"""New tokens of a sequence up to which it is gathered with others; the mask grows with the square."""


@dataclass(frozen=True)
class Choice:
    """Blocks among which each layer, and each of its KV heads, chooses by the query; see `retention.TopBlocks`.

    Attributes:
        blocks: int64[candidates], full ones.
        take: how many of them are read.
        always: int64[slots], read besides.
    """

    blocks: Tensor
    take: int
    always: Tensor


@dataclass(frozen=True)
class Span:
    """Slots and the query rows that read them.

    Attributes:
        rows: which rows of the ragged row, batch by batch: a slice, read as a view, or int64[batch * queries].
        batch: how many sets of rows read each its own slots; 1 if all rows read the same.
        slots: a slice of consecutive slots, read as a view (batch is 1), or int64[batch, keys] to gather, or a choice
            that a single query makes.
        mask: None if every query sees every key; "causal" if query i sees the keys up to i; else an additive
            float32[batch, queries, keys] of zeros and minus infinities. No query is masked entirely.
        shift: int64[batch * queries], by how many tokens each query is turned back before it reads; None for none.
        native: where blocks are sealed, whether `slots` are those of `Landing`'s native order, not of the pool.
    """

    rows: slice | Tensor
    batch: int
    slots: slice | Tensor | Choice
    mask: Tensor | Literal["causal"] | None = None
    shift: Tensor | None = None
    native: bool = False


@dataclass(frozen=True)
class Reader:
    """Rows of one sequence and the runs that all of them read.

    Attributes:
        rows: int64[count], its rows of the ragged row.
        past: the runs from the first position that the first row sees.
        own: of several new tokens the runs of these, each of which sees itself and those before; they are not in
            `past`. None for a single new token, whose run is.
        shift: by how much the rows are turned back; one number, as it is for single tokens only.
        stretch: 0, or the number of a pinned stretch: another reading of the same row.
        gathered: whether nothing is read as a view, so that the place of its slots changes no bit. What a policy lets
            be seen is: it has holes, which lie elsewhere once a context is restored.
    """

    rows: Rows
    past: Runs
    own: Runs | None
    shift: int = 0
    stretch: int = 0
    gathered: bool = False


class SpanBuilder:
    """Turns the sources of one layer group into spans."""

    def __init__(self, reach: Reach, block_tokens: int, device: torch.device) -> None:
        self._reach = reach
        self._block_tokens = block_tokens
        self._device = device

    def build(self, sources: Sequence[Source]) -> tuple[Span, ...]:
        """Spans that cover every pair of a query and a key that it sees exactly once."""
        if self._reach.cross:
            return self._cross_spans(sources)
        spans: list[Span] = []
        readers: list[Reader] = []
        for source in sources:
            if source.hides:
                assert source.sight is not None, "only a sight hides"
                self._see(source, source.sight.parts(source.runs, source.queries), readers, spans)
                continue
            if source.chooses:
                spans += [self._choice_span(source, index) for index in range(source.count)]
                continue
            reader = self._reader(source)
            if reader.own is not None and self._hides(source, reader.past):
                runs = np.concatenate([reader.past, reader.own])
                spans.append(self._span(reader.rows[None], self._read(runs), self._window_mask(source, runs)))
            else:
                readers.append(reader)
        private: list[Reader] = []
        self._share(readers, spans, private)
        chunks = [reader for reader in private if reader.own is not None]
        spans += self._chunk_spans(chunks)
        for stretch in sorted({reader.stretch for reader in private}):
            spans += self._decode_spans([r for r in private if r.own is None and r.stretch == stretch])
        return tuple(spans)

    def _cross_spans(self, sources: Sequence[Source]) -> tuple[Span, ...]:
        """What decodes from one source reads it once; sources with a single row each are gathered together."""
        spans: list[Span] = []
        single: list[Reader] = []
        for members in _alike_first_run([source.runs for source in sources]):
            rows = np.concatenate([np.arange(own.count) + own.first_row for own in (sources[i] for i in members)])
            runs = sources[members[0]].runs
            if len(rows) == 1:
                single.append(Reader(rows, runs, None))
            else:
                spans.append(self._span(rows[None], self._read(runs)))
        return (*spans, *self._decode_spans(single))

    def _see(self, source: Source, parts: Sequence[Part], readers: list[Reader], spans: list[Span]) -> None:
        """Readers of single tokens, whose stretches others may share; a masked span for each stretch of a chunk."""
        rows = np.arange(source.first_row, source.first_row + source.count)
        for part in parts:
            if source.count == 1:
                shift = 0 if part.shift is None else int(part.shift[0])
                readers.append(Reader(rows, part.runs, None, shift, part.stretch, gathered=True))
                continue
            mask = None if part.seen is None else additive(part.seen[None], self._device)
            own = rows[None, part.queries :]
            spans.append(self._span(own, self._read(part.runs, gathered=True), mask, part.shift))

    def _choice_span(self, source: Source, index: int) -> Span:
        """What one query reads of its choice: some of the full blocks before it, and all of the others."""
        assert source.read_tokens is not None, "only a limited source chooses"
        runs = before_position(source.runs, source.first_position + index + 1)
        full = (runs[:, COUNT] == self._block_tokens) & (runs[:, FIRST] + runs[:, COUNT] <= source.first_position)
        take = max(0, source.read_tokens // self._block_tokens - int((~full).sum()))
        row = np.array([[source.first_row + index]])
        if take >= full.sum():
            return self._span(row, self._read(runs, gathered=True))
        always = expand_runs(runs[~full], self._block_tokens)
        blocks = runs[full, BLOCK].astype(np.int64)
        return self._span(row, Choice(as_tensor(blocks, self._device), take, as_tensor(always, self._device)))

    def _reader(self, source: Source) -> Reader:
        rows = np.arange(source.first_row, source.first_row + source.count)
        runs = from_position(source.runs, int(self._reach.first_visible(np.array([source.first_position]))[0]))
        if source.count == 1:
            return Reader(rows, runs, None)  # it sees all of it, itself included
        past = before_position(runs, source.first_position)
        return Reader(rows, past, from_position(runs, source.first_position))

    def _hides(self, source: Source, past: Runs) -> bool:
        """Whether the reach hides anything from any of the new tokens that its first one sees."""
        if self._reach.unlimited:
            return False
        last = np.array([source.first_position + source.count - 1])
        lowest = int(past[0, FIRST]) if len(past) else source.first_position
        return int(self._reach.first_visible(last)[0]) > lowest

    def _window_mask(self, source: Source, runs: Runs) -> Tensor:
        """float32[1, queries, keys]: zero where the query sees the key, minus infinity elsewhere."""
        queries = source.first_position + np.arange(source.count)
        keys = positions_of(runs)
        seen = (keys <= queries[:, None]) & (keys >= self._reach.first_visible(queries)[:, None])
        return additive(seen[None], self._device)

    # What several sequences have in common is read once for all of them.

    def _share(self, readers: list[Reader], spans: list[Span], private: list[Reader]) -> None:
        """Split off what `readers` have in common, then go on with each set of them that continues alike."""
        private += [reader for reader in readers if not len(reader.past)]
        readers = [reader for reader in readers if len(reader.past)]
        for members in _alike_first_run([reader.past[:, :FIRST] for reader in readers]):
            group = [readers[member] for member in members]
            common = _common_runs([reader.past[:, :FIRST] for reader in group])
            if len(group) == 1 or tokens_of(group[0].past[:common]) < MIN_SHARED_TOKENS:
                private += group
                continue
            rows = np.concatenate([reader.rows for reader in group])
            shift = np.concatenate([np.full(len(reader.rows), reader.shift) for reader in group])
            read = self._read(group[0].past[:common], gathered=group[0].gathered)
            spans.append(self._span(rows[None], read, shift=shift))
            rest = [replace(reader, past=reader.past[common:]) for reader in group]
            self._share([reader for reader in rest if reader.own is not None or len(reader.past)], spans, private)

    # Several new tokens of one sequence: what was there before, and the new tokens among themselves.

    def _chunk_spans(self, chunks: list[Reader]) -> list[Span]:
        spans: list[Span] = []
        short: dict[int, list[Reader]] = {}
        for chunk in chunks:
            if len(chunk.rows) <= MAX_GATHERED_ROWS and tokens_of(chunk.past) < MIN_VIEW_TOKENS:
                short.setdefault(len(chunk.rows), []).append(chunk)
            else:
                spans += self._apart(chunk)
        for alike in short.values():
            spans += self._apart(alike[0]) if len(alike) == 1 else [self._gathered_span(alike)]
        return spans

    def _apart(self, chunk: Reader) -> list[Span]:
        """A chunk's past, without a mask, and the chunk itself."""
        assert chunk.own is not None, "a chunk has several new tokens"
        own = self._span(chunk.rows[None], self._read(chunk.own), "causal")
        return [self._span(chunk.rows[None], self._read(chunk.past)), own] if len(chunk.past) else [own]

    def _gathered_span(self, chunks: list[Reader]) -> Span:
        """One span over short chunks of as many tokens each: what is left of their pasts, and themselves."""
        slots = [self._slots(chunk) for chunk in chunks]
        lengths = np.array([len(own) for own in slots])
        count = len(chunks[0].rows)
        # Query i of a chunk sees all but the last count - 1 - i of its keys. A padded slot is one that is seen.
        seen = lengths[:, None] - np.arange(count - 1, -1, -1)
        mask = np.arange(lengths.max()) < seen[:, :, None]
        padded = np.stack([np.pad(own, (0, lengths.max() - len(own)), mode="edge") for own in slots])
        rows = np.stack([chunk.rows for chunk in chunks])
        return self._span(rows, as_tensor(padded, self._device), additive(mask, self._device))

    def _slots(self, chunk: Reader) -> Rows:
        assert chunk.own is not None, "a chunk has several new tokens"
        return expand_runs(np.concatenate([chunk.past, chunk.own]), self._block_tokens)

    # One new token a sequence: long contiguous stretches become views; the remains of all are gathered together.

    def _decode_spans(self, readers: list[Reader]) -> list[Span]:
        spans: list[Span] = []
        remains: list[_Remains] = []
        for reader in readers:
            row = int(reader.rows[0])
            short = []
            extents = _extents(reader.past, self._block_tokens)
            for first, end in extents:
                long = end - first >= MIN_VIEW_TOKENS or len(readers) == len(extents) == 1
                if long and not reader.gathered:
                    spans.append(self._span(np.array([[row]]), slice(first, end), shift=np.array([reader.shift])))
                else:
                    short.append(np.arange(first, end))
            if short:
                remains.append(_Remains(row, np.concatenate(short), reader.shift))
        for bucket in _by_length(remains):
            spans.append(self._padded_span(bucket))
        return spans

    def _padded_span(self, remains: list[_Remains]) -> Span:
        """One span over rows of unequal length; a padded slot repeats one of the row's own, so it holds numbers."""
        lengths = np.array([len(own.slots) for own in remains])
        longest = int(lengths.max())
        slots = np.stack([np.pad(own.slots, (0, longest - len(own.slots)), mode="edge") for own in remains])
        rows = np.array([[own.row] for own in remains])
        shift = np.array([own.shift for own in remains])
        seen = np.arange(longest)[None] < lengths[:, None]
        mask = None if seen.all() else additive(seen[:, None], self._device)
        return self._span(rows, as_tensor(slots, self._device), mask, shift)

    def _read(self, runs: Runs, *, gathered: bool = False) -> slice | Tensor:
        """A view where the runs follow each other in the store, else, or if asked, the slots to gather."""
        extents = _extents(runs, self._block_tokens)
        if len(extents) == 1 and not gathered:
            return slice(*extents[0])
        return as_tensor(expand_runs(runs, self._block_tokens)[None], self._device)

    def _span(
        self,
        rows: Rows,
        slots: slice | Tensor | Choice,
        mask: Tensor | Literal["causal"] | None = None,
        shift: Rows | None = None,
    ) -> Span:
        """A span of `rows`, int64[batch, queries]."""
        flat = rows.flatten()
        consecutive = bool((np.diff(flat) == 1).all())
        chosen = slice(int(flat[0]), int(flat[-1]) + 1) if consecutive else as_tensor(flat, self._device)
        turned = None if shift is None or not shift.any() else as_tensor(shift, self._device)
        return Span(chosen, rows.shape[0], slots, mask, turned)


@dataclass(frozen=True)
class _Remains:
    """Slots of a decoding row that are too scattered, or too few, for a view."""

    row: int
    slots: Rows
    shift: int


def positions_of(runs: Runs) -> Rows:
    """int64[tokens], the logical position of every token of `runs`."""
    return np.concatenate([np.arange(first, first + count) for _, _, count, first in runs.tolist()])


def tokens_of(runs: Runs) -> int:
    """How many tokens `runs` hold."""
    return int(runs[:, COUNT].sum())


def _extents(runs: Runs, block_tokens: int) -> list[tuple[int, int]]:
    """The stretches of consecutive slots that `runs` form, as (first, end)."""
    starts = runs[:, BLOCK].astype(np.int64) * block_tokens + runs[:, OFFSET]
    ends = starts + runs[:, COUNT]
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    firsts = starts[np.concatenate([[0], breaks])]
    lasts = ends[np.concatenate([breaks - 1, [len(runs) - 1]])]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def _alike_first_run(runs: list[Runs]) -> list[list[int]]:
    """Indices of `runs`, grouped by equal first run."""
    groups: dict[bytes, list[int]] = {}
    for index, own in enumerate(runs):
        groups.setdefault(own[0].tobytes(), []).append(index)
    return list(groups.values())


def _common_runs(runs: list[Runs]) -> int:
    """How many leading runs are the same in all of `runs`."""
    shortest = min(len(own) for own in runs)
    differs = np.zeros(shortest, dtype=bool)
    for own in runs[1:]:
        differs |= (own[:shortest] != runs[0][:shortest]).any(axis=1)
    return int(differs.argmax()) if differs.any() else shortest


def _by_length(remains: list[_Remains]) -> list[list[_Remains]]:
    """Rows whose lengths round up to the same power of two, so that padding at most doubles a row."""
    buckets: dict[int, list[_Remains]] = {}
    for own in remains:
        buckets.setdefault(max(32, len(own.slots) - 1).bit_length(), []).append(own)
    return list(buckets.values())


def additive(seen: npt.NDArray[np.bool_], device: torch.device) -> Tensor:
    """float32 of the same shape: 0 where a key is seen, minus infinity elsewhere."""
    return as_tensor(np.where(seen, np.float32(0), np.float32(-np.inf)), device)


def as_tensor(array: npt.NDArray[np.generic], device: torch.device | str) -> Tensor:
    """The same numbers on a device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
