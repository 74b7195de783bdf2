"""Models that count positions in a way of their own: RoBERTa and its kin begin behind their PAD id, and skip it.

To their embeddings the n-th token that is not PAD stands at position `pad + n`, and every PAD at `pad`, the position of
padding. So a token's position follows from the tokens up to it, as does everything else that a cache keeps of it.

M2M100 counts alike, but takes no positions. It adds the length of its cache to the tokens that it is given, and PAD is
in that length, so behind a PAD its own cache disagrees with its own forward. Nothing can be handed to it that would
mend that, so PAD is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from kvloom.attention import Plan
from kvloom.errors import InvalidTokens


@dataclass(frozen=True)
class Counting:
    """How such a model counts.

    Attributes:
        pad: the id that takes no position of its own, and the position that it is given.
        by_itself: whether the model takes no positions, and adds the length of its cache.
    """

    pad: int
    by_itself: bool = False

    @property
    def unused(self) -> int:
        """Of the positions that the model has embeddings for, how many no token but PAD is given."""
        return 0 if self.by_itself else self.pad + 1

    def check(self, token_ids: Sequence[int]) -> None:
        """Refuse tokens of a sequence that would stand elsewhere with a cache than without."""
        if self.by_itself and self.pad in token_ids:
            raise InvalidTokens(
                f"token {self.pad}, at index {list(token_ids).index(self.pad)}, is this model's PAD, which it counts "
                "in its cache and nowhere else, so what follows would get other positions than without a cache. Leave "
                "it out, or pass `use_cache=False`."
            )

    def without_pad(self, token_ids: Sequence[int]) -> list[int]:
        """Tokens for a trial, none of which is PAD where that is refused."""
        other = 0 if self.pad else 1
        return [other if self.by_itself and token == self.pad else token for token in token_ids]

    def positions(self, token_ids: Sequence[int], first: int, end: int) -> npt.NDArray[np.int64]:
        """int64[end - first], those of the tokens from `first` on, before `end`, of a sequence."""
        counted = np.array(token_ids[:end], dtype=np.int64) != self.pad
        positions: npt.NDArray[np.int64] = self.pad + np.cumsum(counted) * counted
        return positions[first:]

    def of_step(self, plan: Plan, sequences: Sequence[tuple[Sequence[int], int, int]]) -> Plan:
        """The plan of a step, with the positions that the model is to be given.

        Args:
            sequences: for each of the plan's, all its token ids, and from where to where they run.
        """
        if self.by_itself:
            return plan
        positions = np.concatenate([self.positions(*own) for own in sequences])
        return replace(plan, positions=torch.from_numpy(positions).to(plan.positions.device))


def counting_of(model: PreTrainedModel) -> Counting | None:
    """How a model's embeddings count, if not by the index of a token."""
    by_itself = "position_ids" not in inspect.signature(model.forward).parameters
    decoder = model.get_decoder() if getattr(model.config, "is_encoder_decoder", False) else model
    for module in decoder.modules():
        pad = getattr(module, "padding_idx", None)
        if isinstance(pad, int) and hasattr(type(module), "create_position_ids_from_input_ids"):
            return Counting(pad, by_itself)
    return None
