"""The native kernels one by one, beside PyTorch's operators. Be alone on the machine.

Linear layers: a weight that is used once a step comes from memory, so each measurement walks over many weights of one
shape, more than the caches hold. Few rows are bound by reading (GB/s of weights), many by arithmetic (GFLOP/s). All
ways are run in turns, plain reading of the same memory among them; the median of all turns counts.

    python benchmarks/bench_native.py                         # about a minute
    python benchmarks/bench_native.py --dtype float32 --shape 4096x4096
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import click
import torch
from facts import tell_facts
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvloom.models.packing.packings import NativePacking, OneDnnPacking
from kvloom.native import Library, native
from kvloom.native.bandwidth import memory_bandwidth
from kvloom.native.linear import LinearKernels

READING = "reading"
SHAPES = ("896x896", "4864x896", "896x4864", "151936x896", "4096x4096")
FEW_ROWS, MANY_ROWS = (1, 2, 3, 4, 8, 12, 16), (64, 512, 2_048)
WEIGHTS_BYTES = 192 << 20
MOST_LOGITS_BYTES = 256 << 20

Weight = TypeVar("Weight")


def use_each(weights: Iterable[Weight], multiply: Callable[[Weight], object]) -> None:
    """Multiply with one weight after the other. No product is kept: the next takes its memory, and no page is new."""
    for own in weights:
        multiply(own)


def linear_ways(library: Library, weights: list[Tensor]) -> dict[str, Callable[[Tensor], object]]:
    """Functions that multiply rows with each of the weights once, by name; the first only reads their memory."""
    packing = NativePacking(LinearKernels(library))
    packing.reserve(weights)
    packed = [packing.pack(weight) for weight in weights]
    first, last = packed[0].data, packed[-1].data
    floats = (last.data_ptr() + last.nbytes - first.data_ptr()) // 4
    read = library.function("kvloom_read", ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, restype=ctypes.c_float)
    ways: dict[str, Callable[[Tensor], object]] = {
        READING: lambda _: read(first.data_ptr(), floats, torch.get_num_threads()),
        "native": lambda rows: use_each(packed, lambda own: packing.linear(rows, own, None)),
        "F.linear": lambda rows: use_each(weights, lambda own: torch.nn.functional.linear(rows, own)),
    }
    if OneDnnPacking.exists() and weights[0].dtype in OneDnnPacking.dtypes:
        onednn = OneDnnPacking()
        reordered = [onednn.pack(weight) for weight in weights]
        ways["oneDNN packed"] = lambda rows: use_each(reordered, lambda own: onednn.linear(rows, own, None))
    return ways


@torch.inference_mode()
def time_in_turns(ways: dict[str, Callable[[Tensor], object]], rows: Tensor, turns: int) -> dict[str, float]:
    """Median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run(rows)
            if turn:  # the first is to warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in seconds.items()}


def measure_linear(
    library: Library,
    shape: str,
    dtype: torch.dtype,
    *,
    few_rows: tuple[int, ...],
    many_rows: tuple[int, ...],
    turns: int,
) -> list[dict[str, object]]:
    """One entry a number of rows and way: GB/s of weights, GFLOP/s, seconds a product."""
    outputs, inner = map(int, shape.split("x"))
    size = outputs * inner * dtype.itemsize
    weights = [torch.randn(outputs, inner).to(dtype) for _ in range(max(1, WEIGHTS_BYTES // size))]
    ways = linear_ways(library, weights)
    found: list[dict[str, object]] = []
    for count in (*few_rows, *many_rows):
        if count * outputs * dtype.itemsize > MOST_LOGITS_BYTES:
            continue
        rows = torch.randn(count, inner).to(dtype)
        for name, seconds in time_in_turns(ways, rows, turns if count in few_rows else 2).items():
            once = seconds / len(weights)
            found.append(
                {
                    "shape": shape,
                    "rows": count,
                    "way": name,
                    "seconds": once,
                    "bytes_per_second": size / once,
                    "flops": 2 * outputs * inner * count / once,
                }
            )
    return found


def print_linear(found: list[dict[str, object]]) -> None:
    """GB/s for few rows, GFLOP/s for many."""
    names = [name for name in dict.fromkeys(str(own["way"]) for own in found) if name != READING]
    table = Table(title="linear layers")
    for heading in ("outputs x inner", "rows", *names, "unit", "native, of reading"):
        table.add_column(heading, justify="right")
    for shape, rows in dict.fromkeys((str(own["shape"]), int(str(own["rows"]))) for own in found):
        own = {str(one["way"]): one for one in found if (one["shape"], one["rows"]) == (shape, rows)}
        few = rows in FEW_ROWS
        figures = [float(str(own[name]["bytes_per_second" if few else "flops"])) / 1e9 for name in names]
        share = float(str(own[READING]["seconds"])) / float(str(own["native"]["seconds"]))
        table.add_row(
            shape,
            str(rows),
            *(f"{own:.1f}" for own in figures),
            "GB/s" if few else "GFLOP/s",
            f"{share:.0%}" if few else "",
        )
    Console().print(table)


@click.command()
@click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True, help="outputs x inner.")
@click.option("--rows", "wanted_rows", multiple=True, type=int, help="Only these numbers of rows.")
@click.option("--turns", default=5, show_default=True, help="Of few rows; many are run twice.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--threads", type=int, help="PyTorch's threads; by default as PyTorch has them.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here."
)
def main(
    shapes: tuple[str, ...],
    wanted_rows: tuple[int, ...],
    turns: int,
    dtype: str,
    threads: int | None,
    json_path: Path | None,
) -> None:
    """Measure the kernels on this machine."""
    if threads:
        torch.set_num_threads(threads)
    library = native()
    if not isinstance(library, Library):
        raise click.ClickException(f"no native kernels: {library.reason}")
    few, many = (
        tuple(rows for rows in all_rows if not wanted_rows or rows in wanted_rows) for all_rows in (FEW_ROWS, MANY_ROWS)
    )
    bandwidth = memory_bandwidth(library, threads=torch.get_num_threads())
    found = []
    for shape in shapes:
        found += measure_linear(library, shape, getattr(torch, dtype), few_rows=few, many_rows=many, turns=turns)
    print_linear(found)
    facts = tell_facts(dtype=dtype, runs=turns, **{"read bandwidth": f"{bandwidth / 1e9:.0f} GB/s"})
    if json_path:
        figures = {"bytes_per_second": bandwidth, "linear": found}
        json_path.write_text(json.dumps({"facts": facts, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
