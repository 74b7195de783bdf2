"""What can be proven, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvloom.attention import Plan
from kvloom.models.binding import Binding
from kvloom.models.hosted.probe import AttentionCall
from kvloom.models.images.media import Media
from kvloom.models.sources.source import Source


class Provable(Binding, Protocol):
    """A binding whose cached output can be compared with its own."""

    calls: tuple[AttentionCall, ...]

    def windows(self) -> set[int]:
        """The limits of all windows and chunks, as far as they are known."""
        ...

    def early_scales(self) -> bool:
        """Whether a layer changes its temperature within the rows of a step."""
        ...

    def run_order(self, plan: Plan) -> list[int]:
        """The order in which `forward` runs the rows of a plan."""
        ...


@dataclass(frozen=True)
class CheckedSequence:
    """Token ids, what they are decoded from where there is an encoder, and what they show."""

    token_ids: list[int]
    source: Source | None = None
    media: Media | None = None
