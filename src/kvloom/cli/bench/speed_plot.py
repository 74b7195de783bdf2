"""The picture of `kvloom bench --plot`: what a text costs as it grows, with the cache and without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvloom.cli.output.figure import OTHER, OURS, headline, label_lines, new_figure, save, style_axes

if TYPE_CHECKING:
    from kvloom.bench import SpeedReport


def draw(report: SpeedReport, model: str, file: Path) -> None:
    """Write the picture to `file`, a PNG of 1,600 by 1,000 pixels."""
    from matplotlib.ticker import FuncFormatter

    figure, axes = new_figure()
    lengths = [0, *(own.tokens for own in report.growth)]
    cached, uncached = report.totals()
    for totals, colour in ((uncached, OTHER), (cached, OURS)):
        axes.plot(lengths, totals, color=colour, linewidth=2.4, marker="o", markersize=5, markeredgecolor="white")
        axes.fill_between(lengths, totals, color=colour, alpha=0.08, linewidth=0)
    top = 1.06 * max(cached[-1], uncached[-1])
    axes.set_xlim(0, lengths[-1])
    axes.set_ylim(0, top)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:,g} s"))
    style_axes(axes, xlabel="tokens generated")
    label_lines(
        axes,
        [(uncached[-1], "without a cache", OTHER), (cached[-1], "with the cache", OURS)],
        right=lengths[-1],
        height=top,
    )
    headline(
        figure,
        f"{lengths[-1]:,} tokens: {_seconds(cached[-1])} with the cache, {_seconds(uncached[-1])} without",
        f"{model} · {report.dtype} on {report.device}, {report.threads} threads · without a cache, work grows as N²",
    )
    save(figure, file)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 20 else f"{seconds:.2g} s"
