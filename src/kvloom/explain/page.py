"""The page: one self-contained HTML file, readable without a network and, but for the slider, without scripts."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from pathlib import Path

from kvloom.explain.captions import Captions
from kvloom.explain.observe import Observation
from kvloom.units import readable_bytes

SMALLEST, LARGEST, WIDTH = 18, 42, 560
"""Pixels: of a cell of the matrix, and of the whole matrix where cells may be chosen freely."""
LABEL = 118
"""Pixels that the longest name of a token may take."""
LETTERS = 14


def write_page(seen: Observation, words: Captions, file: Path) -> None:
    """Write the page to `file`."""
    template = files("kvloom.explain").joinpath("page.html").read_text(encoding="utf-8")
    last = len(seen.tokens) - 1
    fields = {
        "lang": words.lang,
        "title": words.title,
        "intro": words.intro,
        "matrix": words.matrix,
        "matrix_text": _fill(words.matrix_text, layer=seen.layer, head=seen.head, model=seen.model),
        "svg": _matrix(seen, words),
        "steps": str(last),
        "step": words.step,
        "legend": _legend(words),
        "queries": words.queries,
        "queries_text": words.queries_text,
        "proof": words.proof,
        "proof_text": _fill(words.proof_text, token=_name(seen.tokens[-1]), n=last),
        "proof_table": _proof(seen, words),
        "proof_says": words.proof_holds if _holds(seen) else words.proof_fails,
        "stepwise": _fill(words.stepwise, difference=_share(seen.stepwise)),
        "cost": words.cost,
        "cost_text": _fill(words.cost_text, n=len(seen.tokens)),
        "cost_table": _costs(seen, words),
        "data": json.dumps(
            {
                "tokens": [_name(own) for own in seen.tokens],
                "computed": words.computed,
                "reused": words.reused,
                "uncached": words.uncached,
            }
        ).replace("<", "\\u003c"),
    }
    for name, value in fields.items():
        template = template.replace(f"[[{name}]]", value)
    file.write_text(template, encoding="utf-8")


def _matrix(seen: Observation, words: Captions) -> str:
    """Cells, shaded by their share of the row's largest weight, and the names of rows and columns."""
    count = len(seen.tokens)
    cell = max(SMALLEST, min(LARGEST, WIDTH // count))
    # Names of columns lean to the right, over the last one's edge.
    width, height = LABEL + count * cell + LABEL // 2, LABEL + count * cell + 4
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(words.matrix)}">'
    ]
    for index, token in enumerate(seen.tokens):
        at = LABEL + index * cell + cell / 2
        name = escape(_name(token))
        parts.append(f'<text class="row r{index}" x="{LABEL - 8}" y="{at + 4}" text-anchor="end">{name}</text>')
        turned = f"rotate(-60 {at} {LABEL - 8})"
        parts.append(f'<text class="column c{index}" x="{at}" y="{LABEL - 8}" transform="{turned}">{name}</text>')
    for row, weights in enumerate(seen.weights):
        top = max(weights[: row + 1])
        for column, weight in enumerate(weights):
            x, y = LABEL + column * cell, LABEL + row * cell
            place = (
                f'x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" rx="3" data-row="{row}" data-column="{column}"'
            )
            if column > row:
                parts.append(f'<rect class="masked" {place}/>')
            else:
                title = escape(f"{_name(seen.tokens[row])} → {_name(seen.tokens[column])}: {weight:.0%}")
                parts.append(f'<rect class="cell" {place} style="--w:{weight / top:.3f}"><title>{title}</title></rect>')
    return "".join([*parts, "</svg>"])


def _legend(words: Captions) -> str:
    kinds = {"now": words.now, "kept": words.kept, "done": words.done, "masked": words.masked}
    return "".join(f'<li><span class="{kind}"></span>{escape(text)}</li>' for kind, text in kinds.items())


def _proof(seen: Observation, words: Captions) -> str:
    kinds = ("weights", "keys", "values")
    rows = [
        (name, _share(getattr(seen.with_mask, kind)), _share(getattr(seen.without_mask, kind)))
        for name, kind in zip(words.proof_rows, kinds, strict=True)
    ]
    return _table(words.proof_columns, rows)


def _costs(seen: Observation, words: Captions) -> str:
    count = len(seen.tokens)
    anew = count * (count + 1) // 2
    pairs, queries, kept, thousand = words.cost_rows
    rows = [
        (pairs, f"{count:,}", f"{anew:,}"),
        (queries, f"{count:,}", f"{anew:,}"),
        (_fill(kept, layers=seen.layers), readable_bytes(count * seen.bytes_per_token), "0"),
        (thousand, readable_bytes(1_000 * seen.bytes_per_token), "0"),
    ]
    return _table(words.cost_columns, rows)


def _table(columns: tuple[str, ...], rows: list[tuple[str, str, str]]) -> str:
    head = "".join(f"<th>{escape(own)}</th>" for own in columns)
    body = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(own)}</td>" for own in cells) + "</tr>"
        for name, *cells in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _holds(seen: Observation) -> bool:
    """Whether earlier tokens stay as they are under the mask, but for rounding."""
    changes = (seen.with_mask.weights, seen.with_mask.keys, seen.with_mask.values, seen.stepwise)
    return max(changes) <= seen.tolerance


def _share(share: float) -> str:
    """A change as a percentage; rounding errors by their power of ten."""
    if share == 0:
        return "0"
    return f"{share:.1%}" if share >= 1e-3 else f"{share:.0e}"


def _name(token: str) -> str:
    """A token's name, cut where it would not fit."""
    text = token.strip() or token
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"


def _fill(text: str, **values: object) -> str:
    """A caption with its fields filled in, made safe for HTML; the caption itself may hold tags."""
    for name, value in values.items():
        text = text.replace("{" + name + "}", escape(str(value)))
    return text
