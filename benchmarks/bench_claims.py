"""What is often claimed of the key/value cache, beside what is measured here.

On a model of Qwen2.5-0.5B's shape with random weights; each claim has an experiment of its own. Be alone on the
machine. The last claim, about separators, is also tried on text by the demonstration model (`separators.py`).

    python benchmarks/bench_claims.py --json claims.json
    python benchmarks/bench_claims.py --runs 1 --long-tokens 1000      # whether it works
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from facts import tell_facts
from peers.weights import make_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from separators import (
    CONTEXT_TOKENS,
    EVERYTHING,
    FINE_BLOCK_TOKENS,
    PINNED,
    WINDOW,
    Cost,
    Quality,
    measure_cost,
    measure_quality,
    render_costs,
    render_qualities,
)
from transformers import DynamicCache, PreTrainedModel

import kvloom
from kvloom.bench.timing import median_prefill, median_step, time_run

LENGTHS = (125, 250, 500, 1_000, 2_000)


@dataclass(frozen=True)
class Finding:
    """A claim, what was measured, and what follows."""

    claim: str
    measured: str
    so: str


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log length: 0 constant, 1 linear, 2 quadratic."""
    x, y = [math.log(own) for own in lengths], [math.log(own) for own in seconds]
    return statistics.linear_regression(x, y).slope


def growth(lm: kvloom.LanguageModel, runs: int) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds of one more token behind so many others, with the cache and without."""
    generator = torch.Generator().manual_seed(1)

    def prompts(tokens: int) -> list[list[int]]:
        return [torch.randint(150_000, (tokens,), generator=generator).tolist()]

    cached, uncached = {}, {}
    for tokens in LENGTHS:
        steps = [time_run(lm, prompts(tokens), new_tokens=12, do_sample=False) for _ in range(runs)]
        whole = [time_run(lm, prompts(tokens), new_tokens=1, do_sample=False, use_cache=False) for _ in range(runs)]
        cached[tokens], uncached[tokens] = median_step(steps), median_prefill(whole)
    return cached, uncached


def about_growth(cached: dict[int, float], uncached: dict[int, float]) -> Finding:
    """Of the whole text, the sum over its tokens."""

    def totals(costs: dict[int, float]) -> list[float]:
        sums, before, total = [], 0, 0.0
        for tokens, seconds in costs.items():
            total += (tokens - before) * seconds
            before = tokens
            sums.append(total)
        return sums

    lengths = list(cached)
    with_cache, without = exponent(lengths, totals(cached)), exponent(lengths, totals(uncached))
    return Finding(
        "the cache makes O(N) of O(N²)",
        f"time of a text of N tokens ({lengths[0]} to {lengths[-1]:,}) grows as N^{with_cache:.2f} with the cache and "
        f"as N^{without:.2f} without; a token as N^{exponent(lengths, list(cached.values())):.2f} and "
        f"N^{exponent(lengths, list(uncached.values())):.2f}",
        "true of a text. With a cache a token still reads all past keys and values: its attention is O(N), hidden "
        "behind the reading of the weights until contexts are long",
    )


def about_a_thousand(cached: dict[int, float], uncached: dict[int, float]) -> Finding:
    """One token behind a thousand."""
    ratio = uncached[1_000] / cached[1_000]
    return Finding(
        "1,000 times faster at 1,000 tokens",
        f"the 1,001st token takes {cached[1_000] * 1e3:.0f} ms with the cache, {uncached[1_000] * 1e3:,.0f} ms "
        f"without: {ratio:.0f} times",
        "false. Arithmetic is 1,000 times less, but one token is bound by reading the weights, and a thousand at once "
        "by arithmetic",
    )


@torch.no_grad()
def about_use_cache(model: PreTrainedModel) -> Finding:
    """transformers called by hand: the flag alone, and with the returned cache handed back."""
    ids = torch.randint(150_000, (1, 500))

    def steps(forward: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            forward()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    flag_alone = steps(lambda: model(ids, use_cache=True, logits_to_keep=1))
    cache = model(ids, use_cache=True, past_key_values=DynamicCache(), logits_to_keep=1).past_key_values
    handed_back = steps(lambda: model(ids[:, -1:], use_cache=True, past_key_values=cache, logits_to_keep=1))
    return Finding(
        "use_cache=True alone updates the cache",
        f"a call of 500 tokens with the flag alone takes {flag_alone * 1e3:.0f} ms every time; with the returned cache "
        f"handed back and one new token {handed_back * 1e3:.0f} ms",
        "false. The flag makes the model return a cache; the next call uses it only if it is passed on, with the new "
        "tokens only",
    )


def about_separators(costs: Sequence[Cost], qualities: Sequence[Quality], tokens: int) -> Finding:
    """Time and bytes on the large model, quality on the demonstration model."""
    full, kept = costs[0], next(own for own in costs if (own.kept, own.block_tokens) == (PINNED, FINE_BLOCK_TOKENS))
    by_name = {own.kept: own for own in qualities if own.block_tokens == FINE_BLOCK_TOKENS}
    whole, pinned, window = by_name[EVERYTHING], by_name[PINNED], by_name[WINDOW]
    return Finding(
        "dropping to separators makes long context cheap",
        f"behind {tokens:,} tokens {kept.kept} take {kept.kept_bytes / 2**20:.1f} MiB of "
        f"{full.kept_bytes / 2**20:.1f} and a step {kept.step_seconds * 1e3:.1f} ms of {full.step_seconds * 1e3:.1f}. "
        f"Behind {CONTEXT_TOKENS} tokens of text they cost {_price(pinned, whole)}; without the separators "
        f"{_price(window, whole)}",
        "false of a model that was trained with full attention: its separators sum nothing up. Bytes fall, but only "
        "with blocks as small as a token; a step saves no more than its attention",
    )


def _price(own: Quality, whole: Quality) -> str:
    """What a quality costs beside the full cache's."""
    return (
        f"{own.kl:.3f} nats of divergence and {own.nll - whole.nll:+.3f} nats a token for "
        f"{own.kept_bytes / whole.kept_bytes:.0%} of the bytes"
    )


@click.command()
@click.option("--runs", default=3, show_default=True)
@click.option("--long-tokens", default=8_000, show_default=True, help="Behind which separators are kept.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the findings here.")
def main(runs: int, long_tokens: int, json_path: Path | None) -> None:
    """Put claims to the test."""
    model = make_model()
    lm = kvloom.attach(model)
    time_run(lm, [[1, 2, 3]], new_tokens=3, do_sample=False)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=4)
        cached, uncached = growth(lm, runs)
        progress.advance(task)
        findings = [about_growth(cached, uncached), about_a_thousand(cached, uncached), about_use_cache(model)]
        progress.advance(task)
        qualities, share = measure_quality()
        progress.advance(task)
        costs = measure_cost(lm, long_tokens, share)
        findings.append(about_separators(costs, qualities, long_tokens))
        progress.advance(task)
    table = Table("claim", "measured", "so", show_lines=True)
    for own in findings:
        table.add_row(own.claim, own.measured, own.so)
    Console(width=140).print(table)
    Console(width=140).print(render_costs(costs, long_tokens))
    Console(width=140).print(render_qualities(qualities, share))
    facts = tell_facts(runs=runs)
    if json_path:
        told = {"facts": facts, "findings": [asdict(own) for own in findings], "cached": cached, "uncached": uncached}
        told |= {
            "separators": {"share": share, "costs": list(map(asdict, costs)), "quality": list(map(asdict, qualities))}
        }
        json_path.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
