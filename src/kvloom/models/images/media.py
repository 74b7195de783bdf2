"""Images and videos of a sequence: what they are, where they stand, and the rotary positions around them.

All of it belongs to the sequence. It is frozen, so rows, forks and contexts of a sequence share one object, and what
continues a sequence makes a new one. Nothing of it is ever kept on a module of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.blocks import Mark

Kind = Literal["image", "video"]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Medium:
    """One image or video.

    Attributes:
        inputs: what the model's own forward takes for it, by argument; of this one alone.
        places: int64[features], ascending: the token index of each of its placeholders.
    """

    kind: Kind
    inputs: Mapping[str, Tensor]
    places: Places

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that depend on all that the model is shown of it, and not on where it stands."""
        digest = hashlib.blake2b(self.kind.encode(), digest_size=16)
        for name, tensor in sorted(self.inputs.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    def between(self, first: int, end: int) -> slice:
        """Which of its features stand at the token indices from `first` to `end`."""
        low, high = np.searchsorted(self.places, [first, end])
        return slice(int(low), int(high))

    def __str__(self) -> str:
        return f"the {self.kind} at tokens {self.places[0]} to {self.places[-1]}"


@dataclass(frozen=True, eq=False)
class Media:
    """The images and videos among the first `tokens` tokens of a sequence. Tokens beyond are text.

    Attributes:
        items: in the order in which they stand.
        positions: int64[3, tokens], rotary positions by time, height and width; None where the model counts tokens.
        following: the rotary position, on each axis, of the token after these.
    """

    items: tuple[Medium, ...]
    tokens: int
    positions: Tensor | None
    following: int

    @property
    def marks(self) -> list[Mark]:
        """Where each begins and what it is, for the prefix index."""
        return [(int(item.places[0]), item.digest) for item in self.items]

    def positions_of(self, first: int, count: int) -> Tensor:
        """int64[3, count], the rotary positions of the tokens from index `first` on."""
        text = torch.arange(first, first + count) - self.tokens + self.following
        positions = text.expand(3, -1)
        known = min(max(self.tokens - first, 0), count)
        if self.positions is None or not known:
            return positions
        return torch.cat([self.positions[:, first : first + known], positions[:, known:]], dim=1)

    def split_by(self, tokens: int) -> Medium | None:
        """The medium that a cut behind `tokens` tokens would break; None if there is none."""
        return next((item for item in self.items if item.places[0] < tokens <= item.places[-1]), None)

    def shared_with(self, other: Media | None, tokens: int) -> int:
        """How many of the first `tokens` tokens, which are the same, show the same here and there, and can be cut."""
        theirs = {int(item.places[0]): item.digest for item in (() if other is None else other.items)}
        for item in self.items:
            first = int(item.places[0])
            if first < tokens and (item.places[-1] >= tokens or theirs.get(first) != item.digest):
                return first
        return tokens

    def cut(self, tokens: int) -> Media | None:
        """What the first `tokens` tokens hold, see `split_by`; None if it is text alone."""
        if tokens >= self.tokens:
            return self
        assert self.split_by(tokens) is None, "a medium cannot be cut into two"
        items = tuple(item for item in self.items if item.places[-1] < tokens)
        if not items:
            return None
        # A medium begins at one number on all axes, that at which text in its place would stand.
        following = int(self.positions_of(tokens, 1)[0, 0])
        positions = None if self.positions is None else self.positions_of(0, tokens)
        return Media(items, tokens, positions, following)


def join(before: Media | None, own: Media | None, *, at: int) -> Media | None:
    """The media of a sequence whose first `at` tokens hold `before` and whose next ones hold `own`.

    Args:
        own: read by itself, as if a sequence began with it. Rotary positions are counted on from where they were.
    """
    if own is None:
        return before
    moved = tuple(replace(item, places=item.places + at) for item in own.items)
    items = moved if before is None else (*before.items, *moved)
    if own.positions is None:
        return Media(items, at + own.tokens, None, at + own.tokens)
    earlier = torch.arange(at).expand(3, -1) if before is None else before.positions_of(0, at)
    start = at if before is None else int(before.positions_of(at, 1)[0, 0])
    return Media(items, at + own.tokens, torch.cat([earlier, own.positions + start], dim=1), own.following + start)
