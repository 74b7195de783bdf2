"""What the benchmark says to a peer, and hears from it: one JSON object a line, over stdin and stdout.

A peer runs in a process and an environment of its own, so this file needs nothing but Python.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO


@dataclass(frozen=True)
class Job:
    """Generate exactly `new` tokens behind every prompt, with `beams` beams, whatever tokens come."""

    prompts: list[list[int]]
    beams: int
    new: int


@dataclass(frozen=True)
class Timing:
    """Seconds: of the whole call and, where the peer can tell, until the first tokens and of each step after them."""

    total: float
    prefill: float | None = None
    steps: list[float] | None = None

    @classmethod
    def of(cls, start: float, ends: Sequence[float]) -> Timing:
        """From the moment of the call and the moments at which steps were done."""
        steps = [after - before for before, after in itertools.pairwise(ends)]
        return cls(time.perf_counter() - start, ends[0] - start, steps)


class Unsupported(Exception):
    """What the peer cannot do, in a few words."""


Run = Callable[[Job], Timing]


def serve(start: Callable[[Path, int], tuple[str, Run]]) -> None:
    """Answer jobs until stdin ends.

    Args:
        start: loads the model of a folder on a number of threads; returns the peer's versions, and what runs a job.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    answers = _own_stdout()
    versions, run = start(arguments.folder, arguments.threads)
    _answer(answers, {"versions": versions})
    for line in sys.stdin:
        try:
            _answer(answers, asdict(run(Job(**json.loads(line)))))
        except Unsupported as reason:
            _answer(answers, {"unsupported": str(reason)})


def _own_stdout() -> TextIO:
    """Stdout for the answers alone: what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, value: object) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()
