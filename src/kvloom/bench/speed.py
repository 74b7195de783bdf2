"""How fast a model decodes here, with and without the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch

from kvloom.bench.bandwidth import read_bandwidth, weight_bytes_a_step
from kvloom.bench.timing import Timing, median_prefill, median_step, time_run
from kvloom.errors import InvalidRequest, PromptTooLong
from kvloom.language_model.model import LanguageModel
from kvloom.units import dtype_name

SHORTEST = 32
LONGEST = 1_024


@dataclass(frozen=True)
class Growth:
    """What one more token costs behind so many others: medians, in seconds."""

    tokens: int
    cached_seconds: float
    uncached_seconds: float

    @property
    def times_faster(self) -> float:
        """Uncached over cached."""
        return self.uncached_seconds / self.cached_seconds


@dataclass(frozen=True)
class Work:
    """One kind of work.

    Attributes:
        name: in the words of the table.
        seconds: median, of the prefill or of a decode step.
        tokens_per_second: prompt tokens computed, or new tokens of all rows.
        bandwidth_share: bytes of weights and of keys and values that a step must read, over what memory could have
            given meanwhile. Shared keys and values count once. None for prefill, which is bound by arithmetic.
        cache_bytes: keys and values held at the peak.
    """

    name: str
    seconds: float
    tokens_per_second: float
    bandwidth_share: float | None
    cache_bytes: int


@dataclass(frozen=True)
class SpeedReport:
    """What `measure_speed` found; `bandwidth` in bytes a second."""

    dtype: str
    device: str
    binding: str
    threads: int
    weight_bytes: int | None
    bandwidth: float
    growth: tuple[Growth, ...]
    works: tuple[Work, ...]

    def totals(self) -> tuple[list[float], list[float]]:
        """Seconds that a text of 0 tokens and of each length of `growth` takes in all, with the cache and without.

        The sum over its tokens, whose cost is interpolated between the lengths measured (trapezoids).
        """
        lengths = [0, *(own.tokens for own in self.growth)]

        def total(costs: list[float]) -> list[float]:
            # The first token costs what it costs behind the shortest length, or less.
            heights = [costs[0], *costs]
            areas = [
                (right - left) * (low + high) / 2
                for (left, right), (low, high) in zip(pairwise(lengths), pairwise(heights), strict=True)
            ]
            return [0.0, *accumulate(areas)]

        return total([own.cached_seconds for own in self.growth]), total([own.uncached_seconds for own in self.growth])

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        growth = [{**asdict(own), "times_faster": own.times_faster} for own in self.growth]
        return {**asdict(self), "growth": growth, "works": [asdict(own) for own in self.works]}


def measure_speed(
    lm: LanguageModel,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int = 24,
    num_beams: int = 4,
    batch: int = 4,
    longest: int | None = None,
    runs: int = 3,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> SpeedReport:
    """Measure prefill, greedy decoding, beams and a batch, and one token's cost as the sequence grows.

    Every run has a random prompt of its own, so that no prefix is found in the cache.

    Args:
        prompt_tokens: by default 512, or half of a shorter context.
        new_tokens: of each run, at least 2.
        num_beams, batch: of the runs with several rows, at least 2.
        longest: up to which length the growth is measured, at least 32; by default 1,024 or what the context leaves.
        on_progress: called with what runs next, how many parts are done, and how many there are.

    Raises:
        InvalidRequest: lengths that make no sense or exceed the model's context. CacheFull: the budget is too small.
    """
    context = lm.max_tokens or 1 << 30
    prompt_tokens = min(512, context // 2) if prompt_tokens is None else prompt_tokens
    longest = min(LONGEST, context - new_tokens) if longest is None else longest
    _check(lm, prompt_tokens=prompt_tokens, new_tokens=new_tokens, num_beams=num_beams, batch=batch, longest=longest)
    bench = _Bench(lm, new_tokens=new_tokens, runs=runs)
    lengths = _lengths(longest)
    parts: list[tuple[str, Callable[[], Any]]] = [("warm-up", lambda: bench.warm_up(prompt_tokens))]
    parts += [(f"{tokens:,} tokens", partial(bench.growth, tokens)) for tokens in lengths]
    parts += [
        ("greedy", lambda: bench.alone(prompt_tokens)),
        (f"{num_beams} beams", lambda: bench.beams(prompt_tokens, num_beams)),
        (f"batch of {batch}", lambda: bench.batch(prompt_tokens, batch)),
    ]
    found = []
    for done, (name, part) in enumerate(parts):
        if on_progress is not None:
            on_progress(name, done, len(parts))
        found.append(part())
    return SpeedReport(
        dtype=dtype_name(lm.binding.dtype),
        device=str(lm.binding.device),
        binding=lm.binding.name,
        threads=torch.get_num_threads(),
        weight_bytes=bench.weight_bytes,
        bandwidth=bench.bandwidth,
        growth=tuple(own for own in found if isinstance(own, Growth)),
        works=tuple(work for own in found if isinstance(own, list) for work in own),
    )


class _Bench:
    """One model under measurement."""

    def __init__(self, lm: LanguageModel, *, new_tokens: int, runs: int) -> None:
        self._lm = lm
        self._new = new_tokens
        self._runs = runs
        self._random = torch.Generator().manual_seed(0)
        model = getattr(lm.binding, "model", None)
        self.weight_bytes = weight_bytes_a_step(model) if isinstance(model, torch.nn.Module) else None
        self.bandwidth = read_bandwidth(lm.binding.device)

    def warm_up(self, tokens: int) -> None:
        """Run once what is going to be measured, so that what is made on first use is made."""
        time_run(self._lm, [self._prompt(tokens)], new_tokens=2, do_sample=False)

    def growth(self, tokens: int) -> Growth:
        cached = self._time([tokens], do_sample=False)
        # Without a cache every token costs the whole forward, so the first is like any other.
        uncached = self._time([tokens], new_tokens=1, do_sample=False, use_cache=False)
        return Growth(tokens, median_step(cached), median_prefill(uncached))

    def alone(self, tokens: int) -> list[Work]:
        timings = self._time([tokens], do_sample=False)
        seconds = median_prefill(timings)
        prefill = Work(f"prefill of {tokens:,}", seconds, tokens / seconds, None, _cache_bytes(timings))
        return [prefill, self._step(f"greedy after {tokens:,}", timings, rows=1)]

    def beams(self, tokens: int, num_beams: int) -> list[Work]:
        timings = self._time([tokens], do_sample=False, num_beams=num_beams)
        return [self._step(f"{num_beams} beams after {tokens:,}", timings, rows=num_beams)]

    def batch(self, tokens: int, batch: int) -> list[Work]:
        """Prompts of unlike lengths, from a quarter of `tokens` up to all of it."""
        lengths = [max(1, tokens * (1 + 3 * index // (batch - 1)) // 4) for index in range(batch)]
        timings = self._time(lengths, do_sample=False)
        return [self._step(f"{batch} prompts of {lengths[0]:,} to {lengths[-1]:,}", timings, rows=batch)]

    def _time(self, lengths: Sequence[int], *, new_tokens: int | None = None, **options: Any) -> list[Timing]:
        return [
            time_run(self._lm, [self._prompt(own) for own in lengths], new_tokens=new_tokens or self._new, **options)
            for _ in range(self._runs)
        ]

    def _prompt(self, tokens: int) -> list[int]:
        ids: list[int] = torch.randint(self._lm.vocab_size, (tokens,), generator=self._random).tolist()
        return ids

    def _step(self, name: str, timings: Sequence[Timing], *, rows: int) -> Work:
        seconds, held = median_step(timings), _cache_bytes(timings)
        share = None if self.weight_bytes is None else (self.weight_bytes + held) / seconds / self.bandwidth
        return Work(name, seconds, rows / seconds, share, held)


def _cache_bytes(timings: Sequence[Timing]) -> int:
    return max(timing.cache_bytes for timing in timings)


def _lengths(longest: int) -> list[int]:
    """Powers of two from 32 on, and the longest itself."""
    lengths = [SHORTEST]
    while 2 * lengths[-1] <= longest:
        lengths.append(2 * lengths[-1])
    return lengths if lengths[-1] == longest else [*lengths, longest]


def _check(lm: LanguageModel, **counts: int) -> None:
    if lm.binding.encoder is not None:
        raise InvalidRequest(
            "only causal models are measured, and this one decodes from a source. Pass a causal model."
        )
    least = {"prompt_tokens": 1, "new_tokens": 2, "num_beams": 2, "batch": 2, "longest": SHORTEST}
    for name, minimum in least.items():
        if counts[name] < minimum:
            raise InvalidRequest(f"`{name}` must be at least {minimum}; got {counts[name]}.")
    need = max(counts["prompt_tokens"], counts["longest"]) + counts["new_tokens"]
    if lm.max_tokens is not None and need > lm.max_tokens:
        raise PromptTooLong(
            f"measuring needs sequences of {need:,} tokens, and the model's context is {lm.max_tokens:,}. "
            "Ask for a shorter `prompt_tokens`, `longest` or `new_tokens`."
        )
