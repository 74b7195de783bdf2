"""The schedule of a check on the cache, and the same sequences without it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.attention import build_plan
from kvloom.cache import CachedSequence, CacheLayout, KVCache, place_source
from kvloom.exclusive import uninterrupted
from kvloom.models.binding import Regime
from kvloom.models.proofs.provable import CheckedSequence, Provable
from kvloom.models.proofs.recording import Trace, recorded

DECODED_TOKENS = 2
BLOCK_TOKENS = 4
CHECKED_LOGITS = 4
"""Of so many last tokens of each chunk logits are compared: a row of them may be larger than all that its token brings
into and out of all layers."""


def run_cached(binding: Provable, sequences: list[CheckedSequence], own: list[Trace], chunk: int) -> list[Trace]:
    """The schedule of the check: chunk and whole, chunk, fork, two decode steps of three rows."""
    long, short, fork = (sequence.token_ids for sequence in sequences)
    longest = max((own.source.tokens for own in sequences if own.source), default=0)
    layout = CacheLayout(layers=binding.layers, dtype=binding.dtype, block_tokens=BLOCK_TOKENS)
    blocks = max(64, 2 * layout.blocks_of(longest), sum(layout.blocks_of(len(own.token_ids)) + 2 for own in sequences))
    cache = KVCache(layout, budget_bytes=layout.bytes_per_row_of_blocks * blocks, device=binding.device)
    runner = _Runner(binding, cache, sequences, own)
    a, b = runner.open(0), runner.open(1)
    runner.step([(0, a, chunk), (1, b, len(short) - DECODED_TOKENS)])
    runner.step([(0, a, len(long) - DECODED_TOKENS - chunk)])
    c = cache.fork(a)
    runner.copy_trace(source=0, target=2)
    for _ in range(DECODED_TOKENS):
        runner.step([(0, a, 1), (1, b, 1), (2, c, 1)])
    assert len(fork) == c.tokens, "the fork is as long as its ending"
    return runner.traces()


class _Runner:
    """Runs steps on the cache and files every row under its sequence."""

    def __init__(self, binding: Provable, cache: KVCache, sequences: list[CheckedSequence], own: list[Trace]) -> None:
        self._binding = binding
        self._cache = cache
        self._sequences = sequences
        self._own = own
        self._regime = binding.regime(len(sequences[0].token_ids))
        self._rows: list[dict[str, list[Tensor]]] = [{} for _ in sequences]
        self._logits: list[list[Tensor]] = [[] for _ in sequences]

    def open(self, index: int) -> CachedSequence:
        """An empty sequence, whose source is encoded."""
        sequence = self._cache.open()
        source = self._sequences[index].source
        if source is not None:
            slots = torch.from_numpy(place_source(self._cache, sequence, source.tokens)).to(self._binding.device)
            self._binding.encode(source, self._cache.store, slots)
        return sequence

    def step(self, requests: list[tuple[int, CachedSequence, int]]) -> None:
        extension = self._cache.extend([(sequence, count) for _, sequence, count in requests])
        logits_of = [min(count, CHECKED_LOGITS) for *_, count in requests]
        plan = build_plan(self._cache, extension, logits=logits_of, device=self._binding.device)
        new = [(index, slice(sequence.tokens - count, sequence.tokens)) for index, sequence, count in requests]
        parts = [(self._sequences[index].token_ids, tokens.start, tokens.stop) for index, tokens in new]
        if self._binding.counting is not None:
            plan = self._binding.counting.of_step(plan, parts)
        token_ids = [token for ids, first, end in parts for token in ids[first:end]]
        own = {
            name: torch.cat([self._own[index].rows[name][tokens] for index, tokens in new])
            for name in self._own[0].rows
        }
        with uninterrupted(), recorded(self._binding, own, self._binding.run_order(plan)) as rows:
            logits = self._binding.forward(
                torch.tensor(token_ids, device=self._binding.device),
                plan,
                self._cache.store,
                regime=self._regime,
                media=[self._sequences[index].media for index, *_ in requests],
            )
        self._cache.commit(extension)
        first = 0
        for (index, _, count), own_logits in zip(requests, torch.split(logits, logits_of), strict=True):
            self._logits[index].append(own_logits)
            for name, own_rows in rows.items():
                self._rows[index].setdefault(name, []).append(own_rows[first : first + count])
            first += count

    def copy_trace(self, *, source: int, target: int) -> None:
        self._rows[target] = {name: list(rows) for name, rows in self._rows[source].items()}
        self._logits[target] = list(self._logits[source])

    def traces(self) -> list[Trace]:
        return [
            Trace({name: torch.cat(parts) for name, parts in rows.items()}, torch.cat(logits))
            for rows, logits in zip(self._rows, self._logits, strict=True)
        ]


def run_uncached(binding: Provable, sequence: CheckedSequence, checked: list[int], regime: Regime) -> Trace:
    token_ids = torch.tensor([sequence.token_ids], device=binding.device)
    with uninterrupted(), recorded(binding) as rows:
        logits = binding.forward_own(token_ids, last=None, regime=regime, source=sequence.source, media=sequence.media)
    return Trace(rows, logits[0, checked])
