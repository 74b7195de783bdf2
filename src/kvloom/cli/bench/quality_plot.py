"""The picture of `kvloom bench --quality --plot`: what is lost and what is recalled, against what is kept."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom.cli.output.figure import FAINT, INK, headline, new_figure, save, style_axes

if TYPE_CHECKING:
    from kvloom.bench.quality import Outcome, QualityReport

COLOURS = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#1864ab")
CONTROL_LINES = ((0, (1, 1.4)), (0, (4, 2)), (0, (6, 2, 1, 2)))
Style = dict[str, Any]
"""How a line is drawn, in the words of matplotlib."""

CODEC_LOOKS: dict[str, Style] = {
    "native": {"marker": "o", "markersize": 6},
    "int8": {"marker": "D", "markersize": 4.5, "linewidth": 0.8},
}
LOWEST_SHARE = 1 / 64


def draw(report: QualityReport, model: str, file: Path) -> None:
    """Write the picture to `file`, a PNG of 1,600 by 1,000 pixels: divergence at the left, recall at the right."""
    figure, left = new_figure()
    left.set_position((0.075, 0.12, 0.32, 0.64))
    right = figure.add_axes((0.465, 0.12, 0.32, 0.64))
    looks = _looks(report)
    _panel(left, report, looks, lambda own: own.kl)
    _panel(right, report, looks, lambda own: own.recall)
    left.set_title("divergence from the full cache, nats", loc="left", fontsize=10, color=INK, pad=9)
    right.set_title("facts recalled", loc="left", fontsize=10, color=INK, pad=9)
    left.set_ylim(bottom=0)
    right.set_ylim(-0.03, 1.06)
    right.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.legend(
        handles=_handles(report, looks),
        loc="upper left",
        bbox_to_anchor=(0.795, 0.78),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handletextpad=0.6,
        labelspacing=0.75,
        handlelength=1.5,
    )
    full = report.reference
    headline(
        figure,
        _statement(report),
        f"{model} · contexts of {report.context_tokens:,} tokens · {report.positions} positions · "
        f"{full.recallable} of {len(full.answers)} facts recalled by the full cache",
    )
    save(figure, file)


def _looks(report: QualityReport) -> dict[str, Style]:
    """How each policy looks: controls grey and broken."""
    from kvloom.bench.quality import CONTROLS

    policies = dict.fromkeys(own.setting.policy for own in report.outcomes)
    colours = cycle(COLOURS)
    controls = dict(zip(CONTROLS, CONTROL_LINES, strict=True))
    return {
        name: {"color": FAINT, "linewidth": 1.6, "linestyle": controls[name]}
        if name in controls
        else {"color": next(colours), "linewidth": 2.0}
        for name in policies
    }


def _panel(
    axes: Any, report: QualityReport, looks: dict[str, Style], height: Callable[[Outcome], float | None]
) -> None:
    """A line for each policy and codec: its figure against the share of the full cache's bytes that it holds."""
    full = report.reference.cache_bytes
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for own in report.outcomes:
        if (y := height(own)) is not None:
            lines.setdefault((own.setting.policy, own.setting.codec), []).append((own.cache_bytes / full, y))
    for (policy, codec), points in lines.items():
        look = looks[policy] | CODEC_LOOKS[codec] | {"markeredgecolor": "white", "clip_on": False, "zorder": 3}
        axes.plot(*zip(*sorted(points), strict=True), **look)
    least = min(share for points in lines.values() for share, _ in points) if lines else LOWEST_SHARE
    axes.set_xscale("log", base=2)
    axes.set_xlim(max(LOWEST_SHARE, least / 1.2), 1.1)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    style_axes(axes, xlabel="bytes held, of the full cache's")
    axes.tick_params(which="minor", length=0)


def _handles(report: QualityReport, looks: dict[str, Style]) -> list[Any]:
    """The key: a line for each policy, and a mark for each codec if there are several."""
    from matplotlib.lines import Line2D

    codecs = dict.fromkeys(own.setting.codec for own in report.outcomes)
    marks = [Line2D([], [], label=codec, color=INK, **CODEC_LOOKS[codec] | {"linewidth": 0}) for codec in codecs]
    return [Line2D([], [], label=name, **look) for name, look in looks.items()] + (marks if len(marks) > 1 else [])


def _statement(report: QualityReport) -> str:
    """What the picture shows in a sentence: which policy loses least of those that free as much as any."""
    lossy = [own for own in report.outcomes if own.cache_bytes < report.reference.cache_bytes]
    least = min((own.setting.keep for own in lossy), default=1.0)
    if least == 1.0:
        return "What is lost, and what is recalled"
    best = min((own for own in lossy if own.setting.keep == least), key=lambda own: own.kl)
    return f"{100 * least:.3g}% kept: {best.setting.policy} stays nearest to the full cache"
