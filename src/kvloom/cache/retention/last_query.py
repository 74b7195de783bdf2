"""The tokens that the last query attended to."""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.cache.retention.base import (
    Held,
    Keep,
    Scored,
    Scores,
    mean_by_run,
    within_budget,
)


@dataclass(frozen=True, kw_only=True)
class LastQuery(Scored):
    """Keep what the last query attended to most. Nothing but the block being filled is kept for being recent.

    Source: Oren et al. 2024, "Transformers are Multi-State RNNs" (TOVA), section 3.2.

    Departures: TOVA decides for each layer, by attention averaged over heads; here it is summed over heads and layers.
    It drops one token a step; here blocks go, the one with the least mean mass first. It holds a prompt to the budget
    token by token; here a prompt is computed with full attention and cut by its last query.

    What it loses: whatever the last query happened not to look at, for good.

    Args:
        budget_tokens: the most tokens that stay after a step; 1,024 by default.
    """

    def observed(self, queries: range, prompt: range) -> int:
        """The last query of a prompt, and every one after it."""
        return 1 if queries.stop >= prompt.stop else 0

    def reusable(self, prompt_tokens: int) -> int:
        """All but the one that is observed."""
        return prompt_tokens - 1

    def score(self, before: Scores, mass: Scores | None) -> Scores:
        """The last query's word is what counts."""
        return before if mass is None else mass

    def keep(self, held: Held) -> Keep:
        """The runs that the last query weighed most, once the prompt is complete."""
        if held.tokens < held.prompt.stop:
            return held.everything
        return within_budget(held, mean_by_run(held, held.scores), self.budget_tokens)
