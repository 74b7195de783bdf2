"""The picture of `kvloom plan --plot`: bytes of cache against length of prompt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvloom.cli.output.figure import FAINT, OTHER, OURS, headline, label_lines, new_figure, save, style_axes
from kvloom.units import dtype_name, readable_bytes

if TYPE_CHECKING:
    from kvloom.planning import MemoryPlan

SHARED, APART, BUDGET = OURS, OTHER, "#c92a2a"
# A budget is drawn up to this multiple of the curves; farther away it would press them to the floor.
BUDGET_IN_SIGHT = 1.6


def draw(plan: MemoryPlan, file: Path) -> None:
    """Write the picture to `file`, a PNG of 1,600 by 1,000 pixels."""
    figure, axes = new_figure()
    lengths, shared, apart = zip(*plan.curve, strict=True)
    labels = [(shared[-1], "shared by KVLoom" if plan.rows > 1 else "KVLoom", SHARED)]
    axes.fill_between(lengths, shared, color=SHARED, alpha=0.10, linewidth=0)
    axes.plot(lengths, shared, color=SHARED, linewidth=2.4, solid_capstyle="round")
    if plan.rows > 1:
        axes.plot(lengths, apart, color=APART, linewidth=2.4, solid_capstyle="round")
        labels.append((apart[-1], f"each {'beam' if plan.num_beams > 1 else 'sample'} apart", APART))
    _mark_request(axes, plan)
    top = max(*apart, *shared)
    near = plan.budget_bytes <= BUDGET_IN_SIGHT * top
    if near:
        axes.axhline(plan.budget_bytes, color=BUDGET, linewidth=1.3, linestyle=(0, (5, 3)))
        labels.append((plan.budget_bytes, f"budget {readable_bytes(plan.budget_bytes)}", BUDGET))
    limit = 1.06 * max(top, plan.budget_bytes if near else 0)
    axes.set_xlim(0, lengths[-1])
    axes.set_ylim(0, limit)
    _style(axes)
    label_lines(axes, labels, right=lengths[-1], height=limit)
    _head(figure, plan, near=near)
    save(figure, file)


def _mark_request(axes: Any, plan: MemoryPlan) -> None:
    """The request itself: a hair line at its length, and a dot with its bytes on each curve."""
    x = plan.prompt_tokens
    axes.axvline(x, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
    points = [(plan.cache_bytes, SHARED)] + ([(plan.apart_bytes, APART)] if plan.rows > 1 else [])
    for size, colour in points:
        axes.plot(
            [x], [size], "o", color=colour, markersize=6.5, markeredgecolor="white", markeredgewidth=1.4, zorder=5
        )
        axes.annotate(
            readable_bytes(size),
            (x, size),
            xytext=(-7, 8),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=10,
            fontweight="bold",
            color=colour,
            # On white, where the budget's line may pass.
            bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.5},
        )


def _style(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    # Powers of two on both axes: 256 MiB and 2,048 tokens rather than 286.1 MiB and 2,000.
    axes.set_yticks(_ticks(axes.get_ylim()[1]))
    axes.set_xticks(_ticks(axes.get_xlim()[1]))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda size, _: readable_bytes(int(size)).replace(".0 ", " ") if size else "0")
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    style_axes(axes, xlabel="tokens of the prompt")


def _ticks(top: float) -> list[int]:
    """Round marks from 0 up to `top`, four to eight of them."""
    step = 2 ** max(0, math.ceil(math.log2(top / 8)))
    return list(range(0, int(top) + 1, step))


def _head(figure: Any, plan: MemoryPlan, *, near: bool) -> None:
    """The statement of the picture, and under it what it is about."""
    saved = plan.apart_bytes / plan.cache_bytes
    if plan.rows > 1:
        kind = "beams" if plan.num_beams > 1 else "samples"
        title = f"{plan.rows} {kind} share {'each' if plan.batch > 1 else 'one'} prompt: {saved:.1f} times less cache"
    else:
        title = f"Cache of a prompt of {plan.prompt_tokens:,} tokens: {readable_bytes(plan.cache_bytes)}"
    prompts = "" if plan.batch == 1 else f"{plan.batch} prompts · "
    facts = f"{plan.model} · {prompts}{plan.max_new_tokens:,} new tokens · {dtype_name(plan.dtype)}"
    if plan.codec != "native":
        facts += f" · {plan.codec}"
    if not near:
        facts += f" · budget {readable_bytes(plan.budget_bytes)}, far above"
    headline(figure, title, facts)
