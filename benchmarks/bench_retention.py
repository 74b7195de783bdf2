"""A stream far longer than the model's trained length: are memory and step time flat, and is the text still text?

One sequence is sampled under sinks and a window. For each thousand steps: the median time of a step, on the clock and
of the processor (which other processes disturb less), the blocks in use, the resident memory of the process. Then
stretches of what was written are given to the model's own forward, without a cache: the mean log-probability of their
second halves says how much the text looks like the model's own, early and late.

    python benchmarks/bench_retention.py --tokens 100000 --json retention.json
    python benchmarks/bench_retention.py --model ../shared/models/stories260K --window-tokens 508
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import kvloom

STRETCH_TOKENS = 256


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    policy = kvloom.SinkWindow(sink_tokens=arguments.sink_tokens, window_tokens=arguments.window_tokens)
    lm = kvloom.load(arguments.model)
    token_ids, thousands = stream(lm, policy, arguments.tokens)
    result = {
        "model": arguments.model or "demonstration model",
        "trained_tokens": lm.max_tokens,
        "sink_tokens": policy.sink_tokens,
        "window_tokens": policy.window_tokens,
        "tokens": len(token_ids),
        "threads": arguments.threads,
        "steps": thousands,
        "logprobs": likeness(lm, token_ids),
    }
    report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result))


def stream(
    lm: kvloom.LanguageModel, policy: kvloom.SinkWindow, tokens: int
) -> tuple[list[int], list[dict[str, float]]]:
    """The tokens of one sampled stream, and what each thousand of its steps took."""
    blocks: list[int] = []
    lm.engine.listeners.append(lambda event: blocks.append(getattr(event, "blocks_in_use", 0)))
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 1}
    token_ids, thousands = [], []
    wall, cpu = [], []
    with lm.stream("Once upon a time", max_new_tokens=tokens, eos_token_id=None, retention=policy, **options) as pieces:
        clock, processor = time.perf_counter(), time.process_time()
        for piece in pieces:
            now, now_processor = time.perf_counter(), time.process_time()
            wall.append(1e3 * (now - clock))
            cpu.append(1e3 * (now_processor - processor))
            clock, processor = now, now_processor
            token_ids.append(piece.token_id)
            if len(token_ids) % 1_000 == 0:
                thousands.append(
                    {
                        "tokens": len(token_ids),
                        "step_ms": statistics.median(wall),
                        "processor_ms": statistics.median(cpu),
                        "blocks": max(blocks),
                        "resident_mib": _resident_mib(),
                    }
                )
                if len(thousands) in (1, 3) or len(thousands) % 10 == 0:
                    print(_line(thousands[-1]), file=sys.stderr, flush=True)
                wall.clear(), cpu.clear(), blocks.clear()
    return token_ids, thousands


def likeness(lm: kvloom.LanguageModel, token_ids: list[int]) -> list[dict[str, float]]:
    """Mean log-probability of the second half of stretches, by the model's own forward over each stretch."""
    found = []
    for first in range(0, len(token_ids) - STRETCH_TOKENS + 1, max(len(token_ids) // 200, STRETCH_TOKENS)):
        stretch = torch.tensor([token_ids[first : first + STRETCH_TOKENS]])
        logits = lm.binding.forward_uncached(stretch, last=STRETCH_TOKENS // 2 + 1)[0, :-1].float()
        targets = stretch[0, STRETCH_TOKENS // 2 :, None]
        found.append({"first": first, "logprob": float(logits.log_softmax(-1).gather(1, targets).mean())})
    return found


def report(result: dict[str, Any]) -> None:
    """The figures that matter, and every tenth thousand."""
    steps, logprobs = result["steps"], result["logprobs"]
    print(f"{result['model']}, trained on {result['trained_tokens']:,} tokens: {result['tokens']:,} tokens streamed")
    for own in steps[2:3] + steps[9::10]:
        print(_line(own))
    for key in ("step_ms", "processor_ms"):
        print(f"{key}: the last thousand over steps 2,000 to 3,000: {steps[-1][key] / steps[2][key]:.3f}")
    tenth = max(len(logprobs) // 10, 1)
    for name, part in (("first", logprobs[:tenth]), ("last", logprobs[-tenth:])):
        print(f"mean log-probability, {name} tenth: {_mean([own['logprob'] for own in part])}")


def _line(own: dict[str, float]) -> str:
    return (
        f"{own['tokens']:>8,} tokens: {own['step_ms']:.2f} ms a step, {own['processor_ms']:.2f} of the processor; "
        f"{own['blocks']} blocks, {own['resident_mib']:.1f} MiB resident"
    )


def _mean(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} +- {error:.3f}"


def _resident_mib() -> float:
    """Resident memory now; its peak where the system does not say."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub id; by default the demonstration model")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--sink-tokens", type=int, default=4)
    parser.add_argument("--window-tokens", type=int, default=1_024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write everything into this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
