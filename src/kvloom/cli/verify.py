"""`kvloom verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.group import Command
from kvloom.cli.options.params import json_option, load_model, model_name, model_options, option, quiet_option
from kvloom.cli.options.pictures import shown_blocks, with_text
from kvloom.cli.options.retention import read_retention, retention_options
from kvloom.cli.options.values import Count
from kvloom.cli.output.as_json import print_json
from kvloom.cli.output.terminal import counting_runs, stdout_console

if TYPE_CHECKING:
    from kvloom.verify import Report

ABOUT_IMAGE = "What is this?"
STYLES = {"bit-identical": "green", "equal": "green", "near tie": "yellow", "failed": "bold red"}


@click.command(cls=Command)
@json_option("Input and output")
@quiet_option("Input and output", no="progress")
@option(
    "--prompt",
    "prompts",
    metavar="TEXT",
    multiple=True,
    section="Input and output",
    help="Decode this; may be repeated.  [default: three short prompts that fit the model's context]",
)
@option(
    "--image",
    "images",
    metavar="PATH",
    multiple=True,
    section="Input and output",
    help=f'Show an image-text model this image before each --prompt, by default "{ABOUT_IMAGE}". May be repeated.',
)
@option(
    "--max-new-tokens",
    metavar="N",
    type=Count(min=1),
    section="Length",
    help="Tokens of each run.  [default: 24, or a third of a short context]",
)
@option(
    "--seed",
    metavar="N",
    type=Count(min=0),
    default=0,
    show_default=True,
    section="Sampling",
    help="Of the sampling, and of random prompts where there is no tokenizer.",
)
@retention_options
@model_options
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    as_json: bool,
    quiet: bool,
    prompts: tuple[str, ...],
    images: tuple[str, ...],
    max_new_tokens: int | None,
    seed: int,
    **settings: Any,
) -> None:
    """Prove that cached output equals uncached output.

    Greedy decoding, sampling and beam search are compared with the same without a cache; then
    a cold with a warm prefix, one chunk of prefill with many, a prompt alone with the same in a batch.

    The int8 codec changes numbers, so there the reference is one pass over all tokens on a cache of the same codec, and
    how far that is from the model's own forward is shown as what the codec costs.

    Exit status: 0 if all is equal up to rounding, 1 if a check fails.

    \b
    kvloom verify
    kvloom verify --model Qwen/Qwen2.5-0.5B-Instruct --dtype float32
    kvloom verify --model Qwen/Qwen2.5-VL-3B-Instruct --image photo.png
    """
    retention = read_retention(settings)
    blocks = shown_blocks(images)
    asked = [with_text(blocks, own) for own in prompts or ((ABOUT_IMAGE,) if blocks else ())]
    lm = load_model(quiet=quiet, retention=retention, **settings)
    with counting_runs("verify", quiet=quiet) as on_progress:
        report = lm.verify(asked or None, max_new_tokens=max_new_tokens, seed=seed, on_progress=on_progress)
    model = model_name(settings["model"])
    if as_json:
        print_json({"model": model, **report.to_dict()})
    else:
        _print(report, model)
    if not report.ok:
        ctx.exit(1)


def _print(report: Report, model: str) -> None:
    from rich.text import Text

    console = stdout_console()
    if report.checks:
        console.print(Text(model, style="bold"), Text(report.heading(), style="dim"), sep="\n")
        console.print(_table(report))
        console.print(Text(report.legend(), style="dim"))
    for check in report.checks:
        if (explanation := check.explain()) is not None:
            console.print(Text(explanation, style=STYLES[check.verdict]))
    if report.cost is not None:
        console.print(Text(str(report.cost)))
    if (advice := report.advice()) is not None:
        console.print(Text(advice))
    if report.retention is not None:
        console.print(Text(report.retention))
    style = "bold green" if report.ok else "bold red"
    console.print(Text(report.summary(), style=style if report.checks else "bold"), soft_wrap=True)


def _table(report: Report) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from kvloom.verify.report import COLUMNS

    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, padding=0)
    for column in COLUMNS:
        words = column in ("method", "compared", "verdict")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    for check in report.checks:
        *cells, verdict = check.cells()
        table.add_row(*cells, Text(verdict, style=STYLES[check.verdict]))
    return table
