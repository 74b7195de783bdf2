"""When the engine finishes its steps."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvloom.engine import Event, StepDone, Usage
from kvloom.model import LanguageModel


@dataclass(frozen=True)
class Timing:
    """One run.

    Attributes:
        prefill: seconds from the call until the first tokens are decided.
        steps: seconds of each step after that.
        cache_bytes: keys and values held at the peak, the prompts' peaks added up.
    """

    prefill: float
    steps: tuple[float, ...]
    cache_bytes: int


def time_run(lm: LanguageModel, prompts: Sequence[list[int]], *, new_tokens: int, **options: Any) -> Timing:
    """Generate `new_tokens` behind every prompt, whatever tokens come, and note when each step ends.

    The steps are those after the last prompt is computed, so that each decodes rows of all prompts.
    """
    ends: list[float] = []
    rows: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone) and event.decoded_rows:
            ends.append(time.perf_counter())
            rows.append(event.decoded_rows)

    lm.engine.listeners.append(listen)
    start = time.perf_counter()
    try:
        results = lm.generate(list(prompts), max_new_tokens=new_tokens, eos_token_id=None, **options)
    finally:
        lm.engine.listeners.remove(listen)
    first = next(index for index, decoded in enumerate(rows) if decoded >= len(prompts))
    steps = tuple(after - before for before, after in itertools.pairwise(ends[first:]))
    return Timing(ends[first] - start, steps, sum(_usage(own).peak_bytes for own in results))


def _usage(result: Any) -> Usage:
    """Of one prompt's results, which share it."""
    usage: Usage = (result[0] if isinstance(result, list) else result).usage
    return usage


def median_step(timings: Sequence[Timing]) -> float:
    """Seconds, over all steps of all runs."""
    return statistics.median(step for timing in timings for step in timing.steps)


def median_prefill(timings: Sequence[Timing]) -> float:
    """Seconds, over all runs."""
    return statistics.median(timing.prefill for timing in timings)
