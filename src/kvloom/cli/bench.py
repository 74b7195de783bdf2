"""`kvloom bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvloom import __version__
from kvloom.cli import show
from kvloom.cli.figure import refuse_unless_plottable
from kvloom.cli.group import Command
from kvloom.cli.params import load_model, model_name, model_options, option
from kvloom.cli.terminal import counting_runs, plain_table, stdout_console
from kvloom.units import readable_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from kvloom.bench import SpeedReport

SEVERAL = click.IntRange(min=2)


@click.command(cls=Command)
@option(
    "--prompt-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    section="Work",
    help="[default: 512, or half of a shorter context]",
)
@option(
    "--max-new-tokens",
    "new_tokens",
    metavar="N",
    type=SEVERAL,
    default=24,
    show_default=True,
    section="Work",
    help="Tokens of each run.",
)
@option(
    "--num-beams",
    metavar="N",
    type=SEVERAL,
    default=4,
    show_default=True,
    section="Work",
    help="Beams of the beam search.",
)
@option(
    "--batch", metavar="N", type=SEVERAL, default=4, show_default=True, section="Work", help="Prompts of the batch."
)
@option(
    "--longest",
    metavar="N",
    type=click.IntRange(min=32),
    section="Work",
    help="Length up to which one token's cost is followed.  [default: 1,024, or what the context leaves]",
)
@option(
    "--runs",
    metavar="N",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    section="Work",
    help="Medians are over so many runs.",
)
@option("--json", "as_json", is_flag=True, section="Output", help="Print one JSON object.")
@option(
    "--plot",
    metavar="FILE.png",
    type=click.Path(dir_okay=False, path_type=Path),
    section="Output",
    help="Draw one token's cost against the length of the sequence. Needs matplotlib.",
)
@option("-q", "--quiet", is_flag=True, section="Output", help="No progress.")
@model_options
def bench(
    as_json: bool,
    plot: Path | None,
    quiet: bool,
    runs: int,
    prompt_tokens: int | None,
    new_tokens: int,
    num_beams: int,
    batch: int,
    longest: int | None,
    **settings: Any,
) -> None:
    """Measure a model on this machine: prefill, greedy decoding, beams, a batch, with and without the cache.

    Prompts are random tokens. Let the machine be idle: another busy process changes timings tenfold.

    \b
    kvloom bench
    kvloom bench --model Qwen/Qwen2.5-0.5B --prompt-tokens 2048 --num-beams 8 --plot growth.png
    """
    if plot is not None:
        refuse_unless_plottable(plot)
    lm = load_model(quiet=quiet, **settings)
    from kvloom.bench import measure_speed

    with counting_runs("bench", quiet=quiet) as on_progress:
        report = measure_speed(
            lm,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            num_beams=num_beams,
            batch=batch,
            longest=longest,
            runs=runs,
            on_progress=on_progress,
        )
    model = model_name(settings["model"])
    if plot is not None:
        from kvloom.cli.growth_plot import draw

        draw(report, model, plot)
    if as_json:
        show.print_json({"kvloom": __version__, "model": model, **report.to_dict()})
    else:
        _print(report, model)


def _print(report: SpeedReport, model: str) -> None:
    from rich.text import Text

    console = stdout_console()
    console.print(Text(model, style="bold"), soft_wrap=True)
    facts = f"{report.dtype} on {report.device}, {report.threads} threads, attached through the {report.binding}"
    console.print(Text(facts, style="dim"), soft_wrap=True)
    console.print(_works(report))
    console.print(_growth(report))
    console.print(Text.assemble(("memory reads at ", "dim"), f"{report.bandwidth / 1e9:.0f} GB/s", *_weights(report)))


def _weights(report: SpeedReport) -> list[tuple[str, str]]:
    if report.weight_bytes is None:
        return [("; bytes of weights that a step reads are not known for this model", "dim")]
    limit = report.weight_bytes / report.bandwidth
    return [(f"; a step reads {readable_bytes(report.weight_bytes)} of weights: {_time(limit)} at least", "dim")]


def _works(report: SpeedReport) -> Table:
    table = plain_table("work", "time", "tokens/s", "of bandwidth", "keys and values")
    for work in report.works:
        share = "" if work.bandwidth_share is None else f"{work.bandwidth_share:.0%}"
        table.add_row(
            work.name, _time(work.seconds), f"{work.tokens_per_second:,.0f}", share, readable_bytes(work.cache_bytes)
        )
    return table


def _growth(report: SpeedReport) -> Table:
    table = plain_table("one more token after", "cached", "uncached", "faster")
    for own in report.growth:
        table.add_row(
            f"{own.tokens:,}", _time(own.cached_seconds), _time(own.uncached_seconds), f"{own.times_faster:,.1f} x"
        )
    return table


def _time(seconds: float) -> str:
    return (
        f"{seconds:,.2f} s"
        if seconds >= 10
        else f"{1e3 * seconds:,.2f} ms"
        if seconds < 0.1
        else f"{1e3 * seconds:,.0f} ms"
    )
