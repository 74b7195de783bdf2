"""`kvloom plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvloom import __version__
from kvloom.cli.group import Command
from kvloom.cli.options.params import (
    codec_option,
    json_option,
    model_name,
    option,
    plot_option,
    quiet_option,
    silence_libraries,
)
from kvloom.cli.options.retention import read_retention, retention_options
from kvloom.cli.options.values import ByteSize, Count
from kvloom.cli.output.as_json import print_json
from kvloom.cli.output.figure import refuse_unless_plottable
from kvloom.cli.output.terminal import waiting
from kvloom.cli.plan.tables import print_plan

COUNT = Count(min=1)
LENGTH = Count(min=0)


@click.command(cls=Command, short_help="Say how much memory a request takes.")
@click.argument("model", required=False)
@option("--model", "named", metavar="NAME", section="Request", help="The same as MODEL, as other commands have it.")
@option(
    "--prompt-tokens",
    metavar="N",
    type=COUNT,
    section="Request",
    help="Length of each prompt.  [default: 4,096, or what the model's context leaves]",
)
@option(
    "--max-new-tokens",
    metavar="N",
    type=LENGTH,
    section="Request",
    help="New tokens of each sequence.  [default: 256, or what the model's context leaves]",
)
@option(
    "--source-tokens",
    metavar="N",
    type=COUNT,
    section="Request",
    help="Length of each source of an encoder-decoder model.  [default: 512, or what its encoder reads]",
)
@option("--num-beams", metavar="N", type=COUNT, section="Request", help="Search with N beams.  [default: 1]")
@option(
    "--num-return-sequences",
    metavar="N",
    type=COUNT,
    section="Request",
    help="N of the beams are reported; without beams, N samples a prompt.  [default: 1]",
)
@option("--batch", metavar="N", type=COUNT, section="Request", help="So many prompts in one call.  [default: 1]")
@json_option("Output")
@plot_option("Draw bytes of cache against length of prompt.")
@quiet_option("Output", no="progress")
@option(
    "--dtype",
    metavar="DTYPE",
    section="Cache",
    help="Of weights and cache: float32, bfloat16 or float16.  [default: the checkpoint's]",
)
@option(
    "--budget",
    "budget_bytes",
    metavar="SIZE",
    type=ByteSize(),
    section="Cache",
    help="The most that the cache may take, such as 8GiB.  [default: what would be chosen on this machine]",
)
@option(
    "--block-tokens", metavar="N", type=COUNT, default=16, show_default=True, section="Cache", help="Tokens a block."
)
@codec_option("Cache")
@retention_options
def plan(model: str | None, named: str | None, as_json: bool, plot: Path | None, quiet: bool, **options: Any) -> None:
    """Say how much memory a request takes, before loading anything.

    MODEL is a folder with a config.json, or an id on the Hugging Face hub, of which nothing else is fetched;
    without it, the bundled demonstration model. Weights and cache are exact, to the byte. What else a process
    takes is an estimate, marked with a ~.

    \b
    kvloom plan Qwen/Qwen2.5-0.5B-Instruct --prompt-tokens 4096 --num-beams 8
    kvloom plan ./my-model --batch 4 --budget 8GiB --plot plan.png
    """
    if named is not None and model is not None:
        raise click.UsageError(f"`{model}` and `--model {named}` name two models. Leave one out.")
    model = named if model is None else model
    if plot is not None:
        refuse_unless_plottable(plot)
    with waiting(f"[dim]planning {model_name(model)} ...", quiet=quiet):
        silence_libraries(quiet)
        from kvloom.planning import plan as make_plan

        retention = read_retention(options)
        made = make_plan(model, retention=retention, **options)
        if plot is not None:
            from kvloom.cli.plan.plot import draw

            draw(made, plot)
    if as_json:
        print_json({"kvloom": __version__, **made.to_dict()})
    else:
        print_plan(made)
