"""`kvloom bench`: how fast a model decodes, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvloom.cli.output.terminal import plain_table, titled_console
from kvloom.units import readable_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from kvloom.bench import SpeedReport


def print_speed(report: SpeedReport, model: str) -> None:
    """What was timed, as tables."""
    from rich.text import Text

    facts = f"{report.dtype} on {report.device}, {report.threads} threads, attached through the {report.binding}"
    console = titled_console(model, facts)
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
