"""Policies that know nothing, to measure the others against.

They keep as many tokens as the policy beside them, and by blocks like all policies, because a table lets go of whole
runs. A policy that is no better than these has learnt nothing from its signals.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from kvloom.cache.retention import Held, Keep, Scores
from kvloom.cache.retention.base import Scored, within_budget


@dataclass(frozen=True, kw_only=True)
class Control(Scored):
    """Keeps the runs that a fixed number a run puts first, whatever attention says."""

    scored = False

    @abstractmethod
    def worth(self, held: Held) -> Scores:
        """float32[runs]: the runs with the largest stay."""

    def keep(self, held: Held) -> Keep:
        """The runs of most worth, once the prompt is complete, and always the last."""
        if held.tokens < held.prompt.stop:
            return held.everything
        return within_budget(held, self.worth(held), self.budget_tokens)


@dataclass(frozen=True, kw_only=True)
class Recent(Control):
    """The last tokens and nothing else, not even sinks. The prompt is computed with full attention."""

    def worth(self, held: Held) -> Scores:
        """Their position."""
        return held.firsts.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Random(Control):
    """Blocks that a seed chooses by their position.

    Args:
        seed: of the choice.
    """

    seed: int = 0

    def worth(self, held: Held) -> Scores:
        """A random number that belongs to a run's position, so that a later step does not choose anew."""
        drawn = np.random.default_rng(self.seed).random(int(held.firsts.max()) + 1, dtype=np.float32)
        return drawn[held.firsts]


@dataclass(frozen=True, kw_only=True)
class EveryKth(Control):
    """Blocks at even distances.

    With half, a quarter, an eighth of a prompt as budget every second, fourth, eighth block stays; other budgets keep
    some of the blocks between, in the order of van der Corput's sequence.
    """

    def worth(self, held: Held) -> Scores:
        """Blocks by how often their number can be halved: the bits of the number, mirrored at the point."""
        numbers = held.firsts // max(1, int(held.counts.max()))
        mirrored = np.zeros(len(numbers))
        weight = 0.5
        while numbers.any():
            mirrored += weight * (numbers % 2)
            numbers, weight = numbers // 2, weight / 2
        return -mirrored.astype(np.float32)
