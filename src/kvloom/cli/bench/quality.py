"""`kvloom bench --quality`: what smaller caches cost, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from kvloom.cli.output.terminal import plain_table, titled_console
from kvloom.units import counted, readable_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from kvloom.bench.quality import Outcome, QualityReport


def print_quality(report: QualityReport, model: str) -> None:
    """What was lost, as a table for each codec."""
    from rich.text import Text

    console = titled_console(model, *_facts(report))
    for codec, outcomes in groupby(report.outcomes, key=lambda own: own.setting.codec):
        console.print(_table(list(outcomes), codec))
    for setting, reason in report.refused:
        console.print(Text(f"{setting}: {reason}", style="yellow"))
    console.print(Text("\n".join(_legend(report)), style="dim"))


def _facts(report: QualityReport) -> list[str]:
    """What was measured on, in two lines."""
    full = report.reference
    return [
        f"{report.dtype} on {report.device}, {report.threads} threads; contexts of {report.context_tokens:,} tokens",
        f"{report.positions} positions of {counted(report.passages, 'passage')}, {report.nll:.2f} nats a token; "
        f"{full.recallable} of {len(full.answers)} questions answered",
    ]


def _table(outcomes: Sequence[Outcome], codec: str) -> Table:
    """All policies under one codec."""
    table = plain_table(codec, "keep", "KL", "top-1", "NLL", "recall", "bytes", "step")
    table.padding = (0, 1, 0, 0)
    for policy, own in groupby(outcomes, key=lambda outcome: outcome.setting.policy):
        for index, outcome in enumerate(own):
            table.add_row("" if index else policy, *_cells(outcome), style="bold" if policy == "full" else None)
    return table


def _cells(own: Outcome) -> tuple[str, ...]:
    return (
        f"{100 * own.setting.keep:.3g}%",
        f"{own.kl:.3f}",
        f"{own.agreement:.0%}",
        f"{own.nll_change:+.3f}",
        "" if own.recall is None else f"{own.recall:.0%}",
        readable_bytes(own.cache_bytes),
        f"{1e3 * own.step_seconds:,.1f} ms",
    )


def _legend(report: QualityReport) -> list[str]:
    from kvloom.bench.quality import CONTROLS

    lines = [
        "KL: divergence of the next token's distribution from the full cache's, nats.",
        "top-1: how often both find the same token likeliest. NLL: change of the true",
        "token's negative log-likelihood, nats. recall: of the questions that the full",
        "cache answers. bytes: keys and values held. step: one token, alone.",
    ]
    shown = [name for name in CONTROLS if any(own.setting.policy == name for own in report.outcomes)]
    return [*lines, f"Controls, which know nothing: {', '.join(shown)}."] if shown else lines
