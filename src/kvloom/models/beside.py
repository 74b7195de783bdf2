"""What a sequence stands on besides its tokens, a source or images, to and from what a snapshot keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvloom.cache.snapshot import Beside
from kvloom.models.images.media import Media, Medium
from kvloom.models.sources.source import Source


def beside_of(source: Source | None, media: Media | None) -> Beside:
    """The content of a source and of images: what their keys are digests of, so that a copy gets the same keys."""
    facts: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    if source is not None:
        facts["source_tokens"], tensors["source"] = source.tokens, source.inputs
    if media is not None:
        facts["media"] = {"kinds": [item.kind for item in media.items], "tokens": media.tokens}
        facts["media"]["following"] = media.following
        if media.positions is not None:
            tensors["positions"] = media.positions
        for index, item in enumerate(media.items):
            own = {"places": torch.from_numpy(item.places), **item.inputs}
            tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
    return Beside(facts, tensors)


def read_beside(beside: Beside, *, tokens: int) -> tuple[Source | None, Media | None]:
    """The way back, for a sequence of `tokens` tokens. Raises `ValueError` if it is not what was kept."""
    source = media = None
    if "source_tokens" in beside.facts:
        source = Source.of(_tensor(beside, "source"), tokens=_count(beside.facts, "source_tokens"))
    if "media" in beside.facts:
        media = _media(beside, tokens)
    return source, media


def _media(beside: Beside, tokens: int) -> Media:
    facts = beside.facts["media"]
    items = tuple(_medium(beside, index, kind, tokens) for index, kind in enumerate(facts["kinds"]))
    own, positions = _count(facts, "tokens"), beside.tensors.get("positions")
    fits = positions is None or (tuple(positions.shape) == (3, own) and positions.dtype == torch.int64)
    if not items or own > tokens or not fits:
        raise ValueError("images that are not those of its tokens")
    return Media(items, own, positions, _count(facts, "following"))


def _medium(beside: Beside, index: int, kind: str, tokens: int) -> Medium:
    prefix = f"{index}."
    inputs = {name.removeprefix(prefix): own for name, own in beside.tensors.items() if name.startswith(prefix)}
    places = inputs.pop("places", torch.empty(0)).numpy()
    fits = places.ndim == 1 and places.dtype.kind == "i" and len(places) and places[0] >= 0 and places[-1] < tokens
    if not fits or (places[1:] <= places[:-1]).any() or kind not in ("image", "video") or not inputs:
        raise ValueError("images that are not those of its tokens")
    return Medium("image" if kind == "image" else "video", inputs, places)


def _tensor(beside: Beside, name: str) -> Tensor:
    if name not in beside.tensors:
        raise ValueError(f"no `{name}`")
    return beside.tensors[name]


def _count(facts: Mapping[str, Any], name: str) -> int:
    value = facts.get(name)
    if type(value) is not int or value < 0:
        raise ValueError(f"a wrong `{name}`")
    return value
