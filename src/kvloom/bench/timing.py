"""When the engine finishes its steps."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvloom.engine import Engine, Event, StepDone, Usage
from kvloom.language_model.model import LanguageModel


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
    start = time.perf_counter()
    with step_ends(lm.engine, rows=len(prompts)) as ends:
        results = lm.generate(list(prompts), max_new_tokens=new_tokens, eos_token_id=None, **options)
    steps = tuple(after - before for before, after in itertools.pairwise(ends))
    return Timing(ends[0] - start, steps, sum(_usage(own).peak_bytes for own in results))


@contextmanager
def step_ends(engine: Engine, *, rows: int = 1) -> Iterator[list[float]]:
    """Notes when each step ends (`time.perf_counter`), from the first that decodes so many rows on."""
    ends: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone) and (event.decoded_rows >= rows or (ends and event.decoded_rows)):
            ends.append(time.perf_counter())

    engine.listeners.append(listen)
    try:
        yield ends
    finally:
        engine.listeners.remove(listen)


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
