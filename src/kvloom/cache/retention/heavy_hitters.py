"""The tokens that attention has dwelt on, and the last ones."""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.cache.retention.base import (
    Held,
    Keep,
    Scored,
    check_count,
    mean_by_run,
    within_budget,
)
from kvloom.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class HeavyHitters(Scored):
    """Keep what has gathered most attention so far, beside the last tokens.

    Source: Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    section 4: the mass of attention that each key has received, accumulated over all queries; half of the budget is
    for recent tokens.

    Departures: H2O decides for each head of each layer; here mass is summed over heads and layers, as a table serves
    them all. It drops tokens; here blocks go, the one with the least mean mass first. A prompt is computed with full
    attention and cut to the budget at its end, as in H2O's own code, so it must fit once.

    What it loses: old tokens have had more queries to gather from, so late facts that were not asked for yet go first.
    All of a prompt's queries must be seen, so no part of a prompt is taken from the prefix index.

    Args:
        budget_tokens: the most tokens that stay after a step; 1,024 by default.
        recent_tokens: of these, the last ones; half of the budget by default.
    """

    recent_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent_tokens is None:
            return
        check_count("recent_tokens", self.recent_tokens, least=0)
        if self.recent_tokens > self.budget_tokens:
            raise InvalidRequest(
                f"`recent_tokens={self.recent_tokens}` exceeds `budget_tokens={self.budget_tokens}`, "
                "which includes them. Lower the first, or raise the second."
            )

    def observed(self, queries: range, prompt: range) -> int:
        """All of them."""
        return len(queries)

    def reusable(self, prompt_tokens: int) -> int:
        """None: what is not computed is not observed."""
        return 0

    def keep(self, held: Held) -> Keep:
        """The heaviest runs, once the prompt is complete."""
        if held.tokens < held.prompt.stop:
            return held.everything
        recent = self.budget_tokens // 2 if self.recent_tokens is None else self.recent_tokens
        return within_budget(held, mean_by_run(held, held.scores), self.budget_tokens, recent_tokens=recent)
