"""`kvloom doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from kvloom import __version__
from kvloom.cli.group import Command
from kvloom.cli.options.params import json_option, load_model, option, quiet_option, silence_libraries
from kvloom.cli.options.values import Count
from kvloom.cli.output.as_json import print_json
from kvloom.cli.output.terminal import stdout_console, waiting
from kvloom.units import counted

if TYPE_CHECKING:
    from kvloom.doctor import Examination
    from kvloom.models import Operation


@click.command(cls=Command)
@json_option("Output")
@quiet_option("Output", no="progress")
@option(
    "--model",
    metavar="NAME",
    section="Model",
    help="Also list which operations of this model run in native kernels: a folder, or an id on the hub.",
)
@option("--dtype", metavar="DTYPE", section="Model", help="Of that model.  [default: the checkpoint's]")
@option("--threads", metavar="N", type=Count(min=1), section="Model", help="Threads of PyTorch.")
def doctor(*, as_json: bool, quiet: bool, model: str | None, dtype: str | None, threads: int | None) -> None:
    """Say what is in use on this machine, and why.

    Native kernels are compiled on first use, which takes some seconds. The environment variable KVLOOM_NATIVE
    switches them off (0) or lowers the instructions that they use (avx512, avx2, portable).

    \b
    kvloom doctor
    kvloom doctor --model Qwen/Qwen2.5-0.5B-Instruct
    """
    if dtype is not None and model is None:
        raise click.UsageError("`--dtype` is the dtype of a model: name the model with `--model`.")
    with waiting("[dim]looking ...", quiet=quiet):
        silence_libraries(quiet)
        from kvloom.doctor import examine

        found = examine(version=__version__, threads=threads)
    operations: Sequence[Operation] | None = None
    if model is not None:
        lm = load_model(quiet=quiet, model=model, dtype=dtype, threads=threads)
        operations = lm.binding.operations()
    if as_json:
        listed = None if operations is None else [vars(own) for own in operations]
        print_json(found.to_dict() | ({} if listed is None else {"model": model, "operations": listed}))
        return
    _print(found)
    if operations is not None:
        _print_operations(model or "", operations)


def _print(found: Examination) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in _lines(found):
        table.add_row(Text(name, style="dim"), Text(value))
    stdout_console().print(table)


def _lines(found: Examination) -> list[tuple[str, str]]:
    kernels = found.kernels
    if kernels.in_use:
        lowered = f" ({kernels.reason})" if kernels.reason else ""
        use = f"{kernels.instructions}{lowered}, for {', '.join(kernels.dtypes)}"
    else:
        use = f"none: {kernels.reason}. PyTorch's operators serve instead"
    return [
        ("native kernels", use),
        ("linear layers", kernels.linear_layers),
        ("compiler", found.compiler or f"none: {found.compiler_problem}"),
        ("cache folder", found.cache_folder),
        (
            "CPU",
            f"{found.cpu}, {counted(found.cpus, 'CPU')}: {', '.join(found.cpu_instructions) or 'no vectors known'}",
        ),
        ("threads", str(found.threads)),
        ("memory", f"{found.bytes_per_second / 1e9:.1f} GB/s, read by {counted(found.threads, 'thread')}"),
        ("GPU", found.gpu or "none that PyTorch can use"),
        ("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
    ]


def _print_operations(model: str, operations: Sequence[Operation]) -> None:
    from rich.text import Text

    console = stdout_console()
    missing = [own for own in operations if not own.native]
    console.print()
    if not missing:
        console.print(Text(f"{model}: every operation is native, so logits are bit-identical.", style="green"))
        return
    console.print(Text(f"{model}: {len(missing)} of {len(operations)} operations are not native", style="yellow"))
    for own in missing:
        console.print(Text(f"  {own.name}: {own.reason}"), soft_wrap=True)
