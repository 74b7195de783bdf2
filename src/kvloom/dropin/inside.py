"""Attentions and hidden states of a call, in the structure of transformers: for each step a tensor a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from kvloom.attention import View
from kvloom.attention.views import Layers
from kvloom.decoding import BeamSearch
from kvloom.dropin.padding import Batch
from kvloom.engine import Request
from kvloom.language_model.model import LanguageModel
from kvloom.language_model.results import Inside

Seen = list[View | None]
"""What one step has shown of each sequence or running beam; None of those that do not run any more."""


@dataclass(frozen=True)
class Shown:
    """What a call shows; None where it was not asked for. Padding, and what does not run any more, is zeros.

    Attributes:
        attentions: float[n, heads, rows, columns] for each step and layer, of all sequences or running beams. The first
            step has the rows of the prompt, every later one a single row; without a cache each has all rows. Where
            transformers' cache has dropped the columns before a window, so have these.
        hidden_states: float[n, rows, hidden] likewise.
    """

    attentions: Inside | None = None
    hidden_states: Inside | None = None


def shown_by(batch: Batch, requests: Sequence[Request], lm: LanguageModel) -> Shown:
    """What the requests of a batch have shown."""
    wanted, held = requests[0].wanted, requests[0].looks_from
    if wanted is None:
        return Shown()
    windows = _windows_of(lm)
    attentions, states = [], []
    for step, seen in enumerate(_together([_seen_of(request) for request in requests])):
        columns = batch.width + step
        whole = wanted.every_row or not step
        rows = columns - held if whole else 1
        if wanted.attentions:
            layers = _stacked(seen, lambda view: view.attentions, rows, columns)
            attentions.append(layers if whole else _behind_windows(layers, windows))
        if wanted.hidden_states:
            states.append(_stacked(seen, lambda view: view.hidden_states, rows))
    return Shown(tuple(attentions) or None, tuple(states) or None)


def _seen_of(request: Request) -> list[Seen]:
    """For each step, what was seen of each of a request's sequences, or of its running beams."""
    if isinstance(request.decoder, BeamSearch):
        # Before the first decision all beams are the one row of the prompt.
        return [[*views] * (request.max_rows // len(views)) for views in request.views]
    paths = [own.rows for own in request.decoder.results()]
    return [
        [views[path[step]] if step < len(path) else None for path in paths] for step, views in enumerate(request.views)
    ]


def _together(requests: Sequence[list[Seen]]) -> list[Seen]:
    """The same of a whole batch, as long as any of its requests has run."""
    steps = zip_longest(*requests)
    return [
        [view for own, first in zip(step, requests, strict=True) for view in own or [None] * len(first[0])]
        for step in steps
    ]


def _stacked(
    seen: Seen, field: Callable[[View], Layers | None], rows: int, columns: int | None = None
) -> tuple[Tensor, ...]:
    """For each layer one tensor of all that was seen, each in the last rows and columns of its place.

    Args:
        columns: by default as many as there are.
    """
    shown = [None if view is None else field(view) for view in seen]
    layers = zip(*(own for own in shown if own is not None), strict=True)
    places = [index for index, own in enumerate(shown) if own is not None]
    stacked = []
    for tensors in layers:
        like = tensors[0]
        width = like.shape[-1] if columns is None else columns
        room = like.new_zeros((len(seen), *like.shape[:-2], rows, width))
        for index, own in zip(places, tensors, strict=True):
            room[index, ..., rows - own.shape[-2] :, width - own.shape[-1] :] = own
        stacked.append(room)
    return tuple(stacked)


def _windows_of(lm: LanguageModel) -> list[int | None]:
    """How many tokens each layer of transformers' own cache hands out behind a prompt; None for all."""
    model: Any = getattr(lm.binding, "model", None)
    if model is None:
        return []
    return [layer.sliding_window if layer.is_sliding else None for layer in DynamicCache(config=model.config).layers]


def _behind_windows(layers: Layers, windows: Sequence[int | None]) -> Layers:
    """The columns that transformers' cache still has. A layer that it does not know keeps all."""
    pairs = zip_longest(layers, windows[: len(layers)])
    return tuple(own if window is None else own[..., -window:] for own, window in pairs)
