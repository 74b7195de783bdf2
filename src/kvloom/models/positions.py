"""Models that count positions in a way of their own: RoBERTa and its kin begin behind their PAD id, and skip it.

To their embeddings the n-th token that is not PAD stands at position `pad + n`, and every PAD at `pad`, the position of
padding. So a token's position follows from the tokens up to it, as does everything else that a cache keeps of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from kvloom.attention import Plan


@dataclass(frozen=True)
class Counting:
    """How such a model counts.

    Attributes:
        pad: the id that takes no position of its own, and the position that it is given.
    """

    pad: int

    @property
    def unused(self) -> int:
        """Of the positions that the model has embeddings for, how many no token but PAD is given."""
        return self.pad + 1

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
        positions = np.concatenate([self.positions(*own) for own in sequences])
        return replace(plan, positions=torch.from_numpy(positions).to(plan.positions.device))


def counting_of(model: nn.Module) -> Counting | None:
    """How a model's embeddings count, if not by the index of a token.

    Models that take no `position_ids` (M2M100) count by themselves, from the length of their cache on.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    for module in model.modules():
        pad = getattr(module, "padding_idx", None)
        if isinstance(pad, int) and hasattr(type(module), "create_position_ids_from_input_ids"):
            return Counting(pad)
    return None
