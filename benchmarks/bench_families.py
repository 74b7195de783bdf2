"""KVLoom beside `generate` on other families: real-world shapes of 100 to 400 million random parameters.

Each family runs in a process of its own, in which one model is both called by transformers (dynamic cache, SDPA) or
x-transformers (its cached `generate`) and attached; runs alternate, each with prompts of its own. What counts are
ratios of medians. Be alone on the machine.

    python benchmarks/bench_families.py --family llama --family t5
    python benchmarks/bench_families.py --dtype float32 --json families.json      # all of them, some ten minutes
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from facts import tell_facts
from rich.console import Console
from rich.table import Table
from shapes import FAMILIES, Inputs, inputs_for, make_model

PROMPT_TOKENS = 512
RAGGED = tuple(range(32, 257, 32))


@dataclass(frozen=True)
class Work:
    """One kind of work: prompts of `lengths` tokens, `beams` beams, `new` tokens each.

    Attributes:
        measures: what of a run counts: of "prefill", "step" and "total".
    """

    name: str
    lengths: tuple[int, ...]
    beams: int
    new: int
    measures: tuple[str, ...]


WORKS = (
    Work("greedy", (PROMPT_TOKENS,), 1, 16, ("prefill", "step")),
    Work("4 beams", (PROMPT_TOKENS,), 4, 10, ("step",)),
    Work("ragged 8", RAGGED, 1, 16, ("total",)),
)

Ends = list[float]
Run = Callable[[Inputs, Work], Ends]
"""Runs a work; returns when it began, when each of its steps was done, and when it ended."""


def transformers_run(model: Any) -> Run:
    """`model.generate`, with a clock among its logits processors."""

    def run(inputs: Inputs, work: Work) -> Ends:
        ends: Ends = [time.perf_counter()]

        def clock(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            ends.append(time.perf_counter())
            return scores

        model.generate(**inputs, **_options(work), logits_processor=[clock])
        return [*ends, time.perf_counter()]

    return run


def x_transformers_run(model: Any) -> Run:
    """`AutoregressiveWrapper.generate` with its cache; it has a clock in its forward."""
    from x_transformers.autoregressive_wrapper import AutoregressiveWrapper

    wrapped = AutoregressiveWrapper(model).eval()

    def run(inputs: Inputs, work: Work) -> Ends:
        if work.beams > 1 or len(work.lengths) > 1:
            return []
        ends: Ends = [time.perf_counter()]
        handle = model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
        with torch.no_grad():
            wrapped.generate(inputs["inputs"], work.new, temperature=0.0, cache_kv=True)
        handle.remove()
        return [*ends, time.perf_counter()]

    return run


def kvloom_run(lm: Any) -> Run:
    """The drop-in with the same arguments."""
    import kvloom
    from kvloom.bench.timing import step_ends
    from kvloom.models import HostedModel

    def run(inputs: Inputs, work: Work) -> Ends:
        start = time.perf_counter()
        with step_ends(lm.engine) as ends:
            if isinstance(lm.binding, HostedModel):
                kvloom.generate(lm, **inputs, **_options(work))
            else:
                lm.generate(
                    [own.tolist() for own in inputs["inputs"]],
                    num_beams=work.beams,
                    max_new_tokens=work.new,
                    eos_token_id=None,
                )
        return [start, *ends, time.perf_counter()]

    return run


def _options(work: Work) -> dict[str, Any]:
    return {
        "num_beams": work.beams,
        "max_new_tokens": work.new,
        "min_new_tokens": work.new,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def figures_of(ends: Ends) -> dict[str, float]:
    """Seconds: until the first token, of the median step, of the whole call."""
    steps = [after - before for before, after in itertools.pairwise(ends[1:-1])]
    return {"prefill": ends[1] - ends[0], "step": statistics.median(steps), "total": ends[-1] - ends[0]}


def measure(family: str, dtype: torch.dtype, runs: int, works: list[Work]) -> dict[str, Any]:
    """Medians of all runs: {"<work> <measure>": [KVLoom's seconds, theirs]}, and how the model was attached."""
    import kvloom

    torch.manual_seed(0)
    model = make_model(family, dtype)
    start = time.perf_counter()
    lm = kvloom.attach(model, budget_bytes=1 << 30)
    attached = time.perf_counter() - start
    theirs = x_transformers_run(model) if family == "x-transformers" else transformers_run(model)
    ways = {"kvloom": kvloom_run(lm), "own": theirs}
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(runs + 1):
        for work in works:
            for name, run in ways.items():
                # Other prompts in each turn: none is found in a cache.
                inputs = inputs_for(model, family, work.lengths, seed=turn)
                short = Work(work.name, work.lengths, work.beams, 3, work.measures)
                ends = run(inputs, work if turn else short)  # the first is to warm up
                for measure in work.measures if turn and ends else ():
                    figures = found.setdefault(f"{work.name} {measure}", {})
                    figures.setdefault(name, []).append(figures_of(ends)[measure])
    medians = {what: {name: statistics.median(own) for name, own in by.items()} for what, by in found.items()}
    parameters = sum(own.numel() for own in model.parameters())
    return {
        "family": family,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": parameters,
        "binding": lm.binding.name,
        "native": lm.binding.bit_identical,
        "attach_seconds": attached,
        "seconds": medians,
    }


def in_own_process(family: str, dtype: str, runs: int, works: tuple[str, ...]) -> dict[str, Any]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, "--one", family, "--dtype", dtype, "--runs", str(runs)]
    for work in works:
        command += ["--work", work]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"family": family, "dtype": dtype, "error": done.stderr.strip().splitlines()[-1][:300]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def print_table(found: list[dict[str, Any]]) -> None:
    """Ratios, in brackets KVLoom's milliseconds."""
    columns = [f"{work.name} {measure}" for work in WORKS for measure in work.measures]
    table = Table(title="how many times faster (KVLoom's milliseconds)")
    for heading in ("family", "dtype", "binding", "attach", *columns):
        table.add_column(heading)
    for own in found:
        if "error" in own:
            table.add_row(own["family"], own["dtype"], own["error"])
            continue
        cells = [_cell(own["seconds"].get(column, {})) for column in columns]
        kind = own["binding"] + (", native" if own["native"] else "")
        table.add_row(own["family"], own["dtype"], kind, f"{own['attach_seconds']:.1f} s", *cells)
    Console(width=170).print(table)


def _cell(seconds: dict[str, float]) -> str:
    if not seconds:
        return ""
    ours = f"({1e3 * seconds['kvloom']:.1f})"
    return f"{seconds['own'] / seconds['kvloom']:.2f} {ours}" if "own" in seconds else ours


@click.command()
@click.option("--family", "families", multiple=True, type=click.Choice(list(FAMILIES)), help="All by default.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--runs", default=2, show_default=True)
@click.option("--work", "works", multiple=True, type=click.Choice([own.name for own in WORKS]), help="All by default.")
@click.option("--one", hidden=True, help="Measure this family in this process, and print JSON.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Add the figures to it.")
def main(
    families: tuple[str, ...], dtype: str, runs: int, works: tuple[str, ...], one: str | None, json_path: Path | None
) -> None:
    """Measure families beside their own `generate`."""
    if one is not None:
        chosen = [own for own in WORKS if not works or own.name in works]
        click.echo(json.dumps(measure(one, getattr(torch, dtype), runs, chosen)))
        return
    found = [in_own_process(family, dtype, runs, works) for family in families or FAMILIES]
    print_table(found)
    facts = tell_facts(dtype=dtype, runs=runs)
    if json_path:
        earlier = json.loads(json_path.read_text()) if json_path.exists() else []
        json_path.write_text(json.dumps([*earlier, *({**own, "facts": facts} for own in found)], indent=1) + "\n")


if __name__ == "__main__":
    main()
