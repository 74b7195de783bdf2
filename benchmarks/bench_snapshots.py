"""Loading a context from a file beside computing it: 4,096 tokens, a model of Qwen2.5-0.5B's shape, random weights.

Computing is `lm.prefill` on a cold cache. Loading is `lm.restore` into an empty cache, once as the first restore of a
process, which also has to read every weight to know which model this is, and again. Be alone on the machine.

    python benchmarks/bench_snapshots.py                      # about a minute
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from facts import tell_facts
from peers.weights import make_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import kvloom

BUDGET_BYTES = 512 << 20


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


@click.command()
@click.option("--tokens", default=4_096, show_default=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--threads", type=int, help="PyTorch's threads; by default as PyTorch has them.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here."
)
def main(tokens: int, runs: int, dtype: str, threads: int | None, json_path: Path | None) -> None:
    """Compare in one run."""
    if threads:
        torch.set_num_threads(threads)
    seconds: dict[str, list[float]] = {name: [] for name in ("compute", "save", "restore", "restore, first")}
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=runs)
        make_model(getattr(torch, dtype)).save_pretrained(folder)
        path = Path(folder) / "document.kv"
        lm = kvloom.load(folder, budget_bytes=BUDGET_BYTES)
        lm.prefill([1] * 64)  # threads and caches are warm before anything counts
        for seed in range(runs):
            generator = torch.Generator().manual_seed(seed)
            token_ids = torch.randint(150_000, (tokens,), generator=generator).tolist()
            taken, context = timed(lambda ids=token_ids: lm.prefill(ids))
            seconds["compute"].append(taken)
            seconds["save"].append(timed(lambda own=context: own.save(path))[0])
            other = kvloom.load(folder, budget_bytes=BUDGET_BYTES)
            taken, restored = timed(lambda own=other: own.restore(path))
            seconds["restore, first"].append(taken)
            bits = [own.extend(its, [1, 2, 3]).logits for own, its in ((lm, context), (other, restored))]
            assert torch.equal(*bits), "a restored context gives the same bits"
            seconds["restore"].append(timed(lambda own=other: own.restore(path))[0])
            progress.advance(task)
        size = path.stat().st_size
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    table = Table(title=f"{tokens:,} tokens, {size / 2**20:.1f} MiB")
    for heading in ("", "ms", "faster than computing"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, median in medians.items():
        table.add_row(name, f"{median * 1e3:,.1f}", "" if name == "compute" else f"{medians['compute'] / median:.0f} x")
    Console().print(table)
    facts = tell_facts(dtype=dtype, runs=runs)
    if json_path:
        json_path.write_text(json.dumps({"facts": facts, "bytes": size, "seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
