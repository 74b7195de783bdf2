"""One layer's attention of one new token, on an int8 cache beside a native one.

Alternated runs on random keys and values; the time is that of reading alone, without writing the new token. Be alone on
the machine.

    python benchmarks/bench_codec.py                      # half a minute
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from facts import tell_facts
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvloom.attention import build_plan, torch_ops
from kvloom.attention.native import kernels_for
from kvloom.cache import CacheLayout, Codec, KVCache, LayerShape

SHAPES = {"32 of 128, each its own": (32, 32, 128), "32 on 8 of 128": (32, 8, 128), "14 on 2 of 64": (14, 2, 64)}
CODECS: tuple[Codec, ...] = ("native", "int8")


def decode_step(
    codec: Codec, heads: int, kv_heads: int, dim: int, tokens: int, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """What attends, by kernel, and the bytes of a full block."""
    shape = LayerShape(kv_heads=kv_heads, key_dim=dim, value_dim=dim)
    layout = CacheLayout(layers=(shape,), dtype=dtype, codec=codec)
    budget = layout.budget_for(layout.blocks_of(tokens) + 1)
    cache = KVCache(layout, budget_bytes=budget, device=torch.device("cpu"))
    sequence = cache.open()
    for count in (tokens, 1):
        extension = cache.extend([(sequence, count)])
        plan = build_plan(cache, extension, logits=[1]).groups[0]
        new = [torch.randn(kv_heads, count, dim).to(dtype) for _ in range(2)]
        kept = cache.store.write(0, plan.writes, *new)
        cache.commit(extension) if count > 1 else None
    query = torch.randn(1, heads, dim).to(dtype)
    functions = {"PyTorch": torch_ops.attend}
    if (native := kernels_for(cache.store)) is not None:
        functions["native kernels"] = native.attend
    options: dict[str, Any] = {"scale": dim**-0.5}
    return (
        {name: lambda own=own: own(query, *kept, plan, **options) for name, own in functions.items()},
        layout.bytes_per_block(layout.groups[0]),
    )


def milliseconds(function: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


@click.command()
@click.option("--tokens", default=8_192, show_default=True)
@click.option("--runs", default=15, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--threads", type=int, help="PyTorch's threads; by default as PyTorch has them.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here."
)
def main(tokens: int, runs: int, dtype: str, threads: int | None, json_path: Path | None) -> None:
    """Compare in one run."""
    if threads:
        torch.set_num_threads(threads)
    figures = []
    for name, shape in SHAPES.items():
        steps = {codec: decode_step(codec, *shape, tokens, getattr(torch, dtype)) for codec in CODECS}
        for kernel in steps["native"][0]:
            taken: dict[str, list[float]] = {codec: [] for codec in CODECS}
            for _ in range(runs if kernel != "PyTorch" else 3):
                for codec in CODECS:
                    taken[codec].append(milliseconds(steps[codec][0][kernel]))
            medians = {codec: statistics.median(own) for codec, own in taken.items()}
            share = steps["int8"][1] / steps["native"][1]
            figures.append({"heads": name, "kernels": kernel, **medians, "bytes": share})
    table = Table("heads", "kernels", dtype, "int8", "times faster", "bytes of a full block")
    for own in figures:
        ratio = own["native"] / own["int8"]
        times = [f"{own[codec]:.2f} ms" for codec in CODECS]
        table.add_row(own["heads"], own["kernels"], *times, f"{ratio:.2f}", f"{own['bytes']:.0%}")
    Console().print(table)
    facts = tell_facts()
    if json_path is not None:
        json_path.write_text(
            json.dumps({"tokens": tokens, "dtype": dtype, "facts": facts, "figures": figures}, indent=2)
        )


if __name__ == "__main__":
    main()
