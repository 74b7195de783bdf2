"""What a vision encoder has made of images and videos, kept so that it runs once for each of them.

They are needed while a prompt with placeholders is computed: over its chunks, by other requests that show the same
picture, and when keys and values are computed anew. They are known by content, not by sequence, so that a picture of
an earlier turn costs nothing in a later one, and are bounded in bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvloom.models.images.media import Medium

BUDGET_BYTES = 256 << 20
"""Some 30 images of a thousand tokens for a model 3,584 wide, in 16 bits."""


@dataclass(frozen=True, eq=False)
class Features:
    """One medium as the decoder sees it.

    Attributes:
        rows: float[features, hidden], what stands in the places of its placeholders.
        deep: the same shape, for each of the first decoder layers that add features of their own (DeepStack).
    """

    rows: Tensor
    deep: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (self.rows, *self.deep))


class FeatureCache:
    """Features by content, the least recently used given up beyond a budget.

    Args:
        encode: runs the vision encoder.
        budget_bytes: the most that is kept; what one step needs is kept in any case until the next.
    """

    def __init__(self, encode: Callable[[Medium], Features], *, budget_bytes: int = BUDGET_BYTES) -> None:
        self._encode = encode
        self._budget_bytes = budget_bytes
        self._known: OrderedDict[bytes, Features] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(features.nbytes for features in self._known.values())

    def of(self, media: Sequence[Medium], *, key: bytes) -> list[Features]:
        """The features of each medium.

        Args:
            key: what they depend on besides the medium: the weights.
        """
        wanted = [key + medium.digest for medium in media]
        for own, medium in zip(wanted, media, strict=True):
            if own not in self._known:
                self._known[own] = self._encode(medium)
            self._known.move_to_end(own)
        while self.nbytes > self._budget_bytes and (oldest := next(iter(self._known))) not in wanted:
            del self._known[oldest]
        return [self._known[own] for own in wanted]

    def clear(self) -> None:
        """Let go of all."""
        self._known.clear()
