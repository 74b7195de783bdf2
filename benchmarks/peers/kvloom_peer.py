"""KVLoom, driven as the other peers are."""

from __future__ import annotations

import time
from pathlib import Path

from protocol import Job, Run, Timing, serve


def start(folder: Path, threads: int) -> tuple[str, Run]:
    """Load the model as a user would."""
    import torch

    import kvloom
    from kvloom.engine import Event, StepDone

    lm = kvloom.load(folder, threads=threads, budget_bytes=2 << 30)

    def run(job: Job) -> Timing:
        ends: list[float] = []

        def listen(event: Event) -> None:
            if isinstance(event, StepDone) and event.decoded_rows:
                ends.append(time.perf_counter())

        lm.engine.listeners.append(listen)
        start = time.perf_counter()
        lm.generate(job.prompts, num_beams=job.beams, max_new_tokens=job.new, do_sample=False, eos_token_id=None)
        lm.engine.listeners.remove(listen)
        return Timing.of(start, ends)

    return f"kvloom {kvloom.__version__}, torch {torch.__version__}", run


if __name__ == "__main__":
    serve(start)
