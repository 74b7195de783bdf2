"""One turn of a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turn:
    """What was said, and what answered.

    Attributes:
        tokens_before: length of the context when the turn began.
        images: shown before what was said: paths, or images of PIL.
    """

    said: str
    answer: str
    tokens_before: int
    images: tuple[Any, ...] = ()

    @property
    def content(self) -> Any:
        """What was said, in the format of messages."""
        if not self.images:
            return self.said
        return [*({"type": "image", "image": own} for own in self.images), {"type": "text", "text": self.said}]
