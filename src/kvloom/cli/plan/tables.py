"""A memory plan as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvloom.cli.output.terminal import plain_table, stdout_console
from kvloom.units import counted, dtype_name, readable_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from kvloom.planning import MemoryPlan


def print_plan(plan: MemoryPlan) -> None:
    """What a plan says: the request, its cache, a process, and what the budget holds."""
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
    return f"{counted(len(layers), 'layer')}, {heads}, {dtype_name(plan.dtype)}{context}"


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
        f"{plan.codec}: a full block takes {share:.0%} of its bytes in {dtype_name(plan.dtype)}. "
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
