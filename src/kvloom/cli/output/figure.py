"""What the pictures of the commands share: a canvas, plain axes, a statement as headline, names at the lines."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvloom.errors import InvalidRequest

INK, FAINT, DIM = "#1f2933", "#9aa5b1", "#616e7c"
OURS, OTHER = "#0b7285", "#e8590c"
DOTS_PER_INCH = 200
# Names at the ends of lines stand at least this share of the height apart.
NAME_GAP = 0.065


def refuse_unless_plottable(file: Path) -> None:
    """Refuse `--plot FILE` before any work if it could not be written after it."""
    if file.suffix.lower() != ".png":
        raise InvalidRequest(
            f"`--plot {file}` must end with .png, the only format that is drawn. Name a file that does."
        )
    if not file.parent.is_dir():
        raise InvalidRequest(f"`--plot {file}`: there is no folder `{file.parent}`. Make it, or name another.")
    if find_spec("matplotlib") is None:
        raise InvalidRequest("`--plot` needs matplotlib, which is not installed: pip install 'kvloom[plot]'.")


def new_figure() -> tuple[Any, Any]:
    """A white figure of 1,600 by 1,000 pixels and its axes, with room for a headline and for names at the right."""
    # Without pyplot no window system is asked for, and no global state is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.add_axes((0.11, 0.12, 0.64, 0.68))


def style_axes(axes: Any, *, xlabel: str) -> None:
    """Faint horizontal lines, and no frame but the floor."""
    axes.set_xlabel(xlabel, color=INK, fontsize=10, labelpad=7)
    axes.tick_params(colors=INK, labelsize=9, length=0, pad=6)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def label_lines(axes: Any, labels: Sequence[tuple[float, str, str]], *, right: float, height: float) -> None:
    """Each line's name at its right end, in its colour; names that would touch are moved apart.

    Args:
        labels: height of the line's end, name, colour.
    """
    lowest = -height
    for end, text, colour in sorted(labels):
        lowest = max(end, lowest + NAME_GAP * height)
        axes.annotate(
            text,
            (right, lowest),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=10.5,
            fontweight="bold",
            color=colour,
            annotation_clip=False,
        )


def headline(figure: Any, statement: str, facts: str) -> None:
    """The statement of the picture, and under it what it is about."""
    figure.text(0.025, 0.935, statement, fontsize=15, fontweight="bold", color=INK, va="center")
    figure.text(0.025, 0.872, facts, fontsize=10, color=DIM, va="center")


def save(figure: Any, file: Path) -> None:
    """Write the picture."""
    figure.savefig(file, dpi=DOTS_PER_INCH, facecolor="white")
