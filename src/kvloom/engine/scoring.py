"""Continuations of one prompt, scored together: each is a fork of the prompt's tables, run with the others' tokens.

A continuation of n tokens needs n rows of logits: that of the prompt's last token, which all continuations share, and
those of its own tokens but the last. So all continuations cost the prompt once and their own tokens once.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.blocks.runs import blocks_of
from kvloom.cache import KVCache
from kvloom.cache.retention import Retention
from kvloom.engine.admission import Admission, Blocks
from kvloom.engine.holding import Holding
from kvloom.engine.request import Row, Usage
from kvloom.engine.retaining import dropped_tokens
from kvloom.engine.rows import CachedRows
from kvloom.errors import NumericalError
from kvloom.models import Binding, Media, Source

SOFTMAX_BYTES = 16 << 20
"""The most that the float32 log-softmax of some rows of logits takes at once."""

Pass = list[tuple[int, int]]
"""Continuations that run in one forward pass, by index, and how many of their tokens."""


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of each token of each continuation, and what they cost."""

    logprobs: list[list[float]]
    usage: Usage


def score_uncached(
    binding: Binding,
    prompt_ids: list[int],
    continuations: Sequence[list[int]],
    *,
    source: Source | None = None,
    media: Media | None = None,
) -> Scored:
    """Each continuation apart, by the model's own forward over the whole sequence."""
    start = time.perf_counter()
    logprobs = []
    for own in continuations:
        token_ids = torch.tensor([[*prompt_ids, *own[:-1]]], device=binding.device)
        logits = binding.forward_uncached(token_ids, last=len(own), source=source, media=media)[0]
        logprobs.append(_checked(token_logprobs(logits, own)))
    usage = Usage(
        prompt_tokens=len(prompt_ids),
        cached_prompt_tokens=0,
        computed_prompt_tokens=len(prompt_ids) * len(continuations),
        new_tokens=sum(map(len, continuations)),
        peak_blocks=0,
        peak_bytes=0,
        seconds=time.perf_counter() - start,
        source_tokens=0 if source is None else source.tokens,
        computed_source_tokens=0 if source is None else source.tokens * len(continuations),
    )
    return Scored(logprobs, usage)


class CachedScorer:
    """One call's continuations on a cache.

    Args:
        prompt_ids: the whole prompt, the context's tokens included.
        continuations: token ids, each of at least one token.
        context: tables that hold the beginning of the prompt.
        source: what the prompt is decoded from.
        media: the images and videos of the prompt.
        step_tokens: the most tokens of a forward pass.
        most_open_blocks: how many blocks may be open at once, one for the prompt and one for each continuation of a
            pass; None if that is not limited.
        retention: the settled policy of prompt and continuations.
    """

    def __init__(
        self,
        rows: CachedRows,
        cache: KVCache,
        binding: Binding,
        *,
        prompt_ids: list[int],
        continuations: Sequence[list[int]],
        context: Holding | None,
        source: Source | None,
        media: Media | None,
        step_tokens: int,
        most_open_blocks: int | None,
        retention: Retention | None = None,
    ) -> None:
        self._rows, self._cache, self._binding = rows, cache, binding
        self._prompt_ids, self._continuations, self._context = prompt_ids, continuations, context
        self._source, self._media, self._step_tokens, self._retention = source, media, step_tokens, retention
        self._most_rows = step_tokens if most_open_blocks is None else max(most_open_blocks - 1, 1)
        # The last token of a continuation is never run: nothing follows it.
        self._lengths = [len(own) - 1 for own in continuations]
        self._logprobs: list[list[float]] = [[] for _ in continuations]
        self._peak: Blocks = (0,) * len(cache.groups)
        self._peak_bytes = 0
        self._dropped_tokens = 0

    def worst_case(self, admission: Admission) -> Blocks:
        """The most blocks that are held at once beyond those of the context."""
        cases = []
        for regime, members in self._regimes():
            context = self._context if regime == self._binding.regime(len(self._prompt_ids)) else None
            prompt = admission.worst_case(
                prompt_tokens=len(self._prompt_ids),
                rows=1,
                context=context,
                source=self._source,
                retention=self._retention,
            )
            cases.append(tuple(own + more for own, more in zip(prompt, self._most_blocks(members), strict=True)))
        return tuple(max(group) for group in zip(*cases, strict=True))

    def run(self) -> Scored:
        """Score them. Whatever happens, no table is left behind."""
        start = time.perf_counter()
        found = computed = encoded = 0
        for _, members in self._regimes():
            becomes = len(self._prompt_ids) + self._lengths[members[0]]
            prompt = self._rows.open(
                self._prompt_ids,
                self._context,
                becomes=becomes,
                source=self._source,
                media=self._media,
                retention=self._retention,
            )
            encoded += prompt.encoded
            found += prompt.computed
            computed += prompt.pending
            try:
                self._score(prompt, members)
            finally:
                self._rows.close(prompt)
        usage = Usage(
            prompt_tokens=len(self._prompt_ids),
            cached_prompt_tokens=found,
            computed_prompt_tokens=computed,
            new_tokens=sum(map(len, self._continuations)),
            peak_blocks=max(self._peak),
            peak_bytes=self._peak_bytes,
            seconds=time.perf_counter() - start,
            dropped_tokens=self._dropped_tokens,
            source_tokens=0 if self._source is None else self._source.tokens,
            computed_source_tokens=encoded,
        )
        return Scored([_checked(own) for own in self._logprobs], usage)

    def _regimes(self) -> Iterator[tuple[Hashable, list[int]]]:
        """The continuations by the rotary regime of what is run of them; almost always it is one for all."""
        regimes = [self._binding.regime(len(self._prompt_ids) + length) for length in self._lengths]
        for regime in dict.fromkeys(regimes):
            yield regime, [index for index, own in enumerate(regimes) if own == regime]

    def _score(self, prompt: Row, members: list[int]) -> None:
        """Score continuations of one regime behind a prompt that is still to be computed, at least its last token."""
        logits = self._rows.complete(prompt, step_tokens=self._step_tokens, on_held=lambda: self._note_peak([prompt]))
        firsts = [self._continuations[index][0] for index in members]
        for index, logprob in zip(members, token_logprobs(logits[-1:], firsts), strict=True):
            self._logprobs[index].append(logprob)
        live: dict[int, Row] = {}
        try:
            for work in self._passes(members):
                self._run_pass(prompt, work, live)
        finally:
            for row in live.values():
                self._rows.close(row)

    def _run_pass(self, prompt: Row, work: Pass, live: dict[int, Row]) -> None:
        """Fork the prompt for what begins here, run, and let go of what ends here."""
        for index, _ in work:
            if index not in live:
                token_ids = [*self._prompt_ids, *self._continuations[index][:-1]]
                tables = self._rows.fork_tables(prompt)
                live[index] = Row(token_ids, tables, prompt.regime, source=prompt.source, media=prompt.media)
        counts = [count for _, count in work]
        logits = self._rows.forward(
            [(live[index], count) for index, count in work],
            logits=counts,
            remember=False,
            on_held=lambda: self._note_peak([prompt, *live.values()]),
        )
        targets: list[int] = []
        for index, count in work:
            done = len(self._logprobs[index])
            targets += self._continuations[index][done : done + count]
        values = iter(token_logprobs(logits, targets))
        for index, count in work:
            self._logprobs[index] += [next(values) for _ in range(count)]
            if not live[index].pending:
                self._rows.close(live.pop(index))

    def _most_blocks(self, members: list[int]) -> Blocks:
        """The most blocks that the forks of one regime hold at once beyond the prompt's, in each group."""
        size = self._cache.layout.block_tokens
        last = len(self._prompt_ids) % size  # in a partial last block, which each fork copies
        most = (0,) * len(self._cache.groups)
        done = dict.fromkeys(members, 0)
        forks = 0
        for work in self._passes(members):
            forks = max(forks, len(work))
            for index, count in work:
                done[index] += count
            now = []
            for group in self._cache.groups:
                if group.group.reach.cross:
                    now.append(0)  # the prompt's, which all share
                    continue
                limit = group.group.reach.window_tokens or group.group.reach.chunk_tokens
                kept = [done[i] if limit is None else min(done[i], limit + self._step_tokens + size) for i, _ in work]
                now.append(sum(blocks_of(last + own, size) for own in kept))
            most = tuple(max(pair) for pair in zip(most, now, strict=True))
        return self._cache.blocks_and_open(most, forks)

    def _passes(self, members: list[int]) -> Iterator[Pass]:
        return passes(self._lengths, members, self._step_tokens, most_rows=self._most_rows)

    def _note_peak(self, rows: Sequence[Row]) -> None:
        cached = [row.cached for row in rows if row.cached is not None]
        held = self._cache.blocks_held(cached)
        self._dropped_tokens = max([self._dropped_tokens, *(dropped_tokens(self._cache, own) for own in cached)])
        self._peak = tuple(max(pair) for pair in zip(self._peak, held, strict=True))
        self._peak_bytes = max(self._peak_bytes, self._cache.bytes_held(cached))


def passes(lengths: Sequence[int], members: Sequence[int], step_tokens: int, *, most_rows: int) -> Iterator[Pass]:
    """Forward passes of at most `step_tokens` tokens and `most_rows` rows over `lengths[i]` tokens of each member."""
    work: Pass = []
    room = step_tokens
    for index in members:
        left = lengths[index]
        while left:
            count = min(left, room)
            work.append((index, count))
            left, room = left - count, room - count
            if not room or len(work) == most_rows:
                yield work
                work, room = [], step_tokens
    if work:
        yield work


def token_logprobs(logits: Tensor, targets: Sequence[int]) -> list[float]:
    """The log-softmax of each target, in float32, a few rows at a time.

    Args:
        logits: float[rows, vocab], one row for each target, or a single row for all of them.
    """
    chosen = torch.tensor(targets, device=logits.device)
    if logits.shape[0] == 1:
        return torch.log_softmax(logits[0].float(), dim=-1)[chosen].tolist()
    rows = max(1, SOFTMAX_BYTES // (4 * logits.shape[1]))
    parts = [
        torch.log_softmax(some.float(), dim=-1).gather(1, own[:, None])[:, 0]
        for some, own in zip(torch.split(logits, rows), torch.split(chosen, rows), strict=True)
    ]
    return torch.cat(parts).tolist()


def _checked(logprobs: list[float]) -> list[float]:
    if any(own != own for own in logprobs):
        raise NumericalError("the continuations have no log-probabilities: the model returned NaN logits.")
    return logprobs
