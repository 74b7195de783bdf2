"""Decode steps and prefill beside transformers, on a model of Qwen2.5-0.5B's shape with random weights.

Runs alternate between the two, so that a slow minute hits both; medians over all steps of all runs, and
ratios of these medians, are what counts. Be alone on the machine: two busy processes on two cores change
timings tenfold.

    python benchmarks/bench_decoding.py                       # the three settings of the README, about six minutes
    python benchmarks/bench_decoding.py --setting 4x512 --runs 5 --json out.json
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
import transformers
from peers.weights import make_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import LogitsProcessor, PreTrainedModel

import kvloom
from kvloom.bench.bandwidth import read_bandwidth
from kvloom.engine import Event, StepDone


@dataclass(frozen=True)
class Setting:
    """Beams, prompt tokens, new tokens."""

    beams: int
    prompt: int
    new: int

    @property
    def name(self) -> str:
        return f"{self.beams}x{self.prompt}"


SETTINGS = (Setting(1, 512, 24), Setting(4, 512, 24), Setting(8, 2_048, 16))


@dataclass(frozen=True)
class Timing:
    """Seconds until the first token is decided, and of each step after it."""

    prefill: float
    steps: list[float]


@dataclass(frozen=True)
class Row:
    """One line of the table: medians in seconds, ratios as transformers / KVLoom.

    `bandwidth_share` is how much of the memory bandwidth our step uses if all it did were to read each weight once.
    """

    setting: str
    ours_prefill: float
    theirs_prefill: float
    ours_step: float
    theirs_step: float
    bandwidth_share: float

    @property
    def prefill_ratio(self) -> float:
        return self.theirs_prefill / self.ours_prefill

    @property
    def step_ratio(self) -> float:
        return self.theirs_step / self.ours_step


def time_ours(lm: kvloom.LanguageModel, prompt: list[int], setting: Setting) -> Timing:
    """The engine tells when a step is done; a step without decoded rows belongs to the prompt."""
    ends: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone) and event.decoded_rows:
            ends.append(time.perf_counter())

    lm.engine.listeners.append(listen)
    start = time.perf_counter()
    lm.generate(prompt, num_beams=setting.beams, max_new_tokens=setting.new, do_sample=False, eos_token_id=None)
    lm.engine.listeners.remove(listen)
    return _timing(start, ends)


class _Clock(LogitsProcessor):
    """Notes when transformers has the logits of a step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ends.append(time.perf_counter())
        return scores


def time_theirs(model: PreTrainedModel, prompt: list[int], setting: Setting) -> Timing:
    clock = _Clock()
    start = time.perf_counter()
    model.generate(
        torch.tensor([prompt]),
        num_beams=setting.beams,
        max_new_tokens=setting.new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=[clock],
    )
    return _timing(start, clock.ends)


def _timing(start: float, ends: list[float]) -> Timing:
    return Timing(ends[0] - start, [after - before for before, after in itertools.pairwise(ends)])


def measure(
    setting: Setting,
    ours: Callable[..., Timing],
    theirs: Callable[..., Timing],
    runs: int,
    *,
    shortest_step: float,
) -> Row:
    """Alternate `runs` times; every run has a prompt of its own, so that no prefix is found in the cache.

    Args:
        shortest_step: seconds in which the weights could be read once.
    """
    timings: dict[str, list[Timing]] = {"ours": [], "theirs": []}
    for run in range(runs):
        generator = torch.Generator().manual_seed(1_000 * setting.beams + run)
        prompt = torch.randint(150_000, (setting.prompt,), generator=generator).tolist()
        timings["ours"].append(ours(prompt, setting))
        timings["theirs"].append(theirs(prompt, setting))
    prefill = {name: statistics.median(t.prefill for t in own) for name, own in timings.items()}
    step = {name: statistics.median(s for t in own for s in t.steps) for name, own in timings.items()}
    return Row(
        setting=setting.name,
        ours_prefill=prefill["ours"],
        theirs_prefill=prefill["theirs"],
        ours_step=step["ours"],
        theirs_step=step["theirs"],
        bandwidth_share=shortest_step / step["ours"],
    )


def render(rows: list[Row]) -> Table:
    table = Table(title="milliseconds; ratio = transformers / KVLoom")
    columns = ("beams x prompt", "step", "of bandwidth", "transformers", "ratio", "prefill", "transformers", "ratio")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.setting,
            f"{row.ours_step * 1e3:.1f}",
            f"{row.bandwidth_share:.0%}",
            f"{row.theirs_step * 1e3:.1f}",
            f"{row.step_ratio:.2f}",
            f"{row.ours_prefill * 1e3:,.0f}",
            f"{row.theirs_prefill * 1e3:,.0f}",
            f"{row.prefill_ratio:.2f}",
        )
    return table


def tell_facts(**of_the_run: object) -> dict[str, object]:
    """Print, and return, what the figures depend on: versions, threads, the machine, and what the run adds."""
    facts = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvloom": kvloom.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        **of_the_run,
    }
    click.echo(", ".join(f"{name} {value}" for name, value in facts.items()))
    return facts


@click.command()
@click.option("--setting", "names", multiple=True, help="Only these, such as 4x512.")
@click.option("--runs", default=3, show_default=True, help="Alternated runs of each setting.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--threads", type=int, help="PyTorch's threads; by default as PyTorch has them.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here."
)
def main(names: tuple[str, ...], runs: int, dtype: str, threads: int | None, json_path: Path | None) -> None:
    """Compare with transformers in one run."""
    if threads:
        torch.set_num_threads(threads)
    known = {setting.name: setting for setting in SETTINGS}
    unknown = set(names) - set(known)
    if unknown:
        raise click.BadParameter(f"no setting {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
    chosen = [known[name] for name in names] or list(SETTINGS)
    model = make_model(getattr(torch, dtype))
    lm = kvloom.attach(model)
    bandwidth = read_bandwidth(torch.device("cpu"))
    shortest_step = sum(parameter.nbytes for parameter in model.parameters()) / bandwidth
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(chosen))
        time_ours(lm, [1, 2, 3], Setting(1, 3, 4))  # threads and caches are warm before anything counts
        time_theirs(model, [1, 2, 3], Setting(1, 3, 4))
        for setting in chosen:
            rows.append(
                measure(
                    setting,
                    lambda prompt, own: time_ours(lm, prompt, own),
                    lambda prompt, own: time_theirs(model, prompt, own),
                    runs,
                    shortest_step=shortest_step,
                )
            )
            progress.advance(task)
    Console(width=110).print(render(rows))
    facts = tell_facts(dtype=dtype, runs=runs, **{"read bandwidth": f"{bandwidth / 1e9:.0f} GB/s"})
    if json_path:
        json_path.write_text(json.dumps({"facts": facts, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
