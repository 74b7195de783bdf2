"""`kvloom plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from kvloom.cli.output.terminal import plain_table, stdout_console, waiting
from kvloom.units import counted, readable_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from kvloom.planning import MemoryPlan

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
        raise click.UsageError(f"`{model}` and `--model {named}` name two models. Leave one away.")
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
        _print(made)


# ---- the tables --------------------------------------------------------------------------------------------------


def _print(plan: MemoryPlan) -> None:
    from rich.text import Text

    console = stdout_console()
    console.print(Text(plan.model, style="bold"), soft_wrap=True)
    console.print(Text(f"{_heads(plan)}\n{_request(plan)}", style="dim"))
    console.print(_cache_table(plan))
    console.print(_memory_table(plan))
    for line in _budget_lines(plan):
        console.print(line)


def _heads(plan: MemoryPlan) -> str:
    """The model in a line: layers, KV heads, dtype, context."""
    layers = plan.layout.layers
    shapes = {(own.kv_heads, own.key_dim, own.value_dim) for own in layers}
    heads = "KV heads of several sizes"
    if len(shapes) == 1:
        kv_heads, key, value = next(iter(shapes))
        heads = f"{counted(kv_heads, 'KV head')} of {key if key == value else f'{key} + {value}'}"
    context = "" if plan.max_tokens is None else f", context of {plan.max_tokens:,} tokens"
    return f"{counted(len(layers), 'layer')}, {heads}, {str(plan.dtype).removeprefix('torch.')}{context}"


def _request(plan: MemoryPlan) -> str:
    """What is asked of it in a line."""
    prompts = f"{counted(plan.batch, 'prompt')} of {counted(plan.prompt_tokens, 'token')}"
    if plan.source_tokens:
        prompts = f"{counted(plan.batch, 'source')} of {counted(plan.source_tokens, 'token')}, {prompts}"
    rows = ""
    if plan.rows > 1:
        rows = f", {plan.rows} {'beams' if plan.num_beams > 1 else 'samples'}{' each' if plan.batch > 1 else ''}"
    policy = "" if plan.retention is None else f", under {type(plan.retention).__name__}"
    return f"{prompts}{rows}, up to {counted(plan.max_new_tokens, 'new token')} each{policy}"


def _cache_table(plan: MemoryPlan) -> Table:
    """Blocks and bytes of each layer group, and of the same request without sharing."""
    fans_out = plan.rows > 1
    table = plain_table(
        "keys and values", "layers", "a block", "blocks", "bytes", *(["each apart"] if fans_out else [])
    )

    def add(what: str, *cells: str, shared: int, apart: int, style: str | None) -> None:
        sizes = [readable_bytes(shared), *([readable_bytes(apart)] if fans_out else [])]
        table.add_row(what, *cells, *sizes, style=style)

    several = len(plan.groups) > 1 or plan.layout.seals
    for group in plan.groups:
        add(
            group.reach,
            f"{group.layers}",
            readable_bytes(group.bytes_per_block),
            f"{group.blocks:,}",
            shared=group.blocks * group.bytes_per_block,
            apart=group.apart_blocks * group.bytes_per_block,
            style=None if several else "bold",
        )
        if plan.layout.seals:
            opened = group.open_blocks * group.bytes_per_open_block
            sizes = readable_bytes(group.bytes_per_open_block), f"{group.open_blocks:,}"
            add("  while they are open", "", *sizes, shared=opened, apart=opened, style=None)
    if several:
        add("all", "", "", "", shared=plan.cache_bytes, apart=plan.apart_bytes, style="bold")
    return table


def _memory_table(plan: MemoryPlan) -> Table:
    """What a process holds at its peak, after `load` and after `attach`."""
    table = plain_table("a process", "kvloom.load", "kvloom.attach")
    weights, held = plan.weights, min(plan.cache_bytes, plan.allocated_bytes)
    table.add_row("weights", readable_bytes(weights.load_bytes), readable_bytes(weights.attach_bytes))
    table.add_row("keys and values", readable_bytes(held), readable_bytes(held))
    for what, size in (
        ("activations and logits of a step", plan.scratch_bytes),
        ("oneDNN's compiled products", plan.products_bytes[1]),
        ("Python, PyTorch, transformers", plan.baseline_bytes),
    ):
        table.add_row(what, _about(size), _about(size))
    table.add_row(
        "peak" + _other_moment(plan), _about(plan.load_peak_bytes), _about(plan.attach_peak_bytes), style="bold"
    )
    return table


def _other_moment(plan: MemoryPlan) -> str:
    """When the peak is, where it is not the sum of the lines above."""
    moments = plan.moments(attach=False)
    largest = max(moments, key=lambda name: moments[name])
    return {"reading": ", while weights are converted", "proving": ", while the model is proved"}.get(largest, "")


def _budget_lines(plan: MemoryPlan) -> list[Any]:
    from rich.text import Text

    origin = ", the default here" if plan.budget_is_default else ""
    longest = "a sequence of any length"
    if plan.longest_sequence is not None:
        longest = f"{plan.longest_sequence:,} tokens"
    opened = f", {plan.pool_open_blocks:,} of them open" if plan.layout.seals else ""
    budget = f"{readable_bytes(plan.budget_bytes)}{origin}: {counted(plan.pool_blocks, 'block')}{opened}, {longest}"
    lines = [Text.assemble(("budget  ", "dim"), budget), Text.assemble(("fits    ", "dim"), _verdict(plan))]
    return [Text.assemble(("codec   ", "dim"), _codec(plan)), *lines] if plan.layout.seals else lines


def _codec(plan: MemoryPlan) -> str:
    """What the codec saves, and where it costs time."""
    group = plan.groups[0]
    share = group.bytes_per_block / group.bytes_per_open_block
    return (
        f"{plan.codec}: a full block takes {share:.0%} of its bytes in {str(plan.dtype).removeprefix('torch.')}. "
        "PyTorch operators read it more slowly: codes become numbers first"
    )


def _verdict(plan: MemoryPlan) -> tuple[str, str]:
    """Whether it fits, and its colour."""
    needed = readable_bytes(plan.needed_budget_bytes)
    if not plan.fits:
        one = -(-plan.needed_budget_bytes // plan.batch)
        return f"no: raise the budget to {one:,} bytes ({readable_bytes(one)}), or shorten the request", "bold red"
    if plan.requests_at_once < plan.batch:
        return f"{plan.requests_at_once} of {plan.batch} prompts at once, the others wait; {needed} hold all", "yellow"
    longer = f"; up to {plan.longest_prompt:,} tokens of prompt would, too"
    return f"yes{longer if (plan.longest_prompt or 0) > plan.prompt_tokens else ''}", "bold green"


def _about(size: int | None) -> str:
    return "unknown" if size is None else f"~{readable_bytes(size)}"
