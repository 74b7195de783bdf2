"""The picture: the matrix of one head at its last step, and what changes when a token is added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvloom.errors import InvalidRequest
from kvloom.explain.captions import Captions
from kvloom.explain.observe import Observation

INK, FAINT, DIM, OURS, OTHER = "#1f2933", "#e4e7eb", "#52606d", "#0b7285", "#e8590c"
LATIN = "DejaVu Sans"
CHINESE = ("Noto Sans CJK", "Source Han Sans", "WenQuanYi", "SimHei", "PingFang")
"""How fonts with Chinese characters are named, the better ones first."""


def draw(seen: Observation, words: Captions, file: Path) -> None:
    """Write the picture to `file`, a PNG of 2,000 by 1,200 pixels.

    Raises:
        InvalidRequest: no font of this machine has the characters of the language or of the text.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.family": _fonts(seen, words)}):
        figure = Figure(figsize=(10, 6), dpi=200, facecolor="white")
        FigureCanvasAgg(figure)
        figure.text(0.03, 0.945, words.title, fontsize=17, fontweight="bold", color=INK, va="center")
        about = words.picture_about.format(model=seen.model, layer=seen.layer, head=seen.head)
        figure.text(0.03, 0.895, f"{about} · {seen.dtype}", fontsize=10, color=DIM, va="center")
        _matrix(figure.add_axes((0.15, 0.09, 0.46, 0.62)), seen, words)
        _changes(figure.add_axes((0.74, 0.2, 0.22, 0.46)), seen, words)
        figure.savefig(file, dpi=200, facecolor="white")


def _matrix(axes: Any, seen: Observation, words: Captions) -> None:
    """Finished rows grey, the last row in colour, its own column framed."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    count = len(seen.tokens)
    done = LinearSegmentedColormap.from_list("done", ["#f7f8f9", "#7b8794"])
    now = LinearSegmentedColormap.from_list("now", ["#e6f2f4", OURS])
    for row, weights in enumerate(seen.weights):
        colours = now if row == count - 1 else done
        for column in range(row + 1):
            face = colours(weights[column] / max(weights))
            axes.add_patch(Rectangle((column, row), 0.92, 0.92, facecolor=face, linewidth=0))
    axes.add_patch(Rectangle((count - 1, count - 1), 0.92, 0.92, fill=False, edgecolor=OTHER, linewidth=2.2))
    axes.set_xlim(-0.1, count)
    axes.set_ylim(count, -0.1)
    axes.set_aspect("equal")
    size = min(10.0, 190 / count)
    names = [own.strip() or own for own in seen.tokens]
    axes.set_xticks([index + 0.46 for index in range(count)], names, rotation=60, ha="left", fontsize=size)
    axes.set_yticks([index + 0.46 for index in range(count)], names, fontsize=size)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(words.key_axis, fontsize=9.5, color=DIM, labelpad=8)
    axes.set_ylabel(words.query_axis, fontsize=9.5, color=DIM, labelpad=8)
    axes.tick_params(length=0, colors=INK)
    for label in (axes.get_xticklabels()[-1], axes.get_yticklabels()[-1]):
        label.set_color(OTHER)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.text(count + 0.2, count - 0.54, words.picture_now, color=OTHER, fontsize=10, fontweight="bold", va="center")
    if count > 2:
        axes.annotate(
            words.picture_kept,
            ((count - 1) / 2, count),
            xytext=(0, -4),
            textcoords="offset points",
            color=OURS,
            fontsize=10,
            fontweight="bold",
            ha="center",
            va="top",
            annotation_clip=False,
        )


def _changes(axes: Any, seen: Observation, words: Captions) -> None:
    """Two bars: with the mask nothing changes, without it everything does."""
    changes = [seen.with_mask.values, seen.without_mask.values]
    _, with_mask, without = words.proof_columns
    axes.bar([0, 1], changes, color=[OURS, OTHER], width=0.62)
    for index, change in enumerate(changes):
        text = "0" if change == 0 else f"{change:.0%}" if change >= 1e-3 else f"{change:.0e}"
        axes.annotate(
            text, (index, change), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=11, color=INK
        )
    axes.set_xticks([0, 1], [with_mask, without], fontsize=9.5)
    axes.set_yticks([])
    axes.set_ylim(0, 1.2 * max(*changes, 1e-6))
    axes.tick_params(length=0, colors=INK)
    axes.set_title(words.picture_change, fontsize=10.5, color=INK, pad=12, linespacing=1.4)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def _fonts(seen: Observation, words: Captions) -> list[str]:
    """The fonts of the captions, with those that the text may need behind them."""
    needs_chinese = words.lang == "zh" or any(ord(letter) > 0x2E7F for own in seen.tokens for letter in own)
    chinese = _chinese_fonts() if needs_chinese else []
    if needs_chinese and not chinese:
        raise InvalidRequest(
            "the picture needs a font with Chinese characters, and none is installed. Install one, such as Noto Sans "
            "CJK, or leave the picture out: the page uses the browser's fonts."
        )
    return [*chinese, LATIN] if words.lang == "zh" else [LATIN, *chinese]


def _chinese_fonts() -> list[str]:
    """Names of the installed ones; matplotlib remembers those of its first run, so it is told of newer ones."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    def named() -> list[str]:
        installed = sorted({font.name for font in fontManager.ttflist})
        return [name for start in CHINESE for name in installed if name.startswith(start)]

    if not named():
        stems = tuple(start.replace(" ", "").lower() for start in CHINESE)
        for file in findSystemFonts():
            if Path(file).stem.lower().startswith(stems):
                fontManager.addfont(file)
    return named()
