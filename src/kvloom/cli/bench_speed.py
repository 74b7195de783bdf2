"""`kvloom bench`: how fast a model decodes, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom import __version__
from kvloom.cli import show
from kvloom.cli.terminal import counting_runs, plain_table, stdout_console
from kvloom.units import readable_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from kvloom.bench import SpeedReport
    from kvloom.model import LanguageModel


def run_speed(lm: LanguageModel, model: str, *, plot: Path | None, as_json: bool, quiet: bool, **work: Any) -> None:
    """Measure, draw and print."""
    from kvloom.bench import measure_speed

    with counting_runs("bench", quiet=quiet) as on_progress:
        report = measure_speed(lm, on_progress=on_progress, **work)
    if plot is not None:
        from kvloom.cli.bench_speed_plot import draw

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
