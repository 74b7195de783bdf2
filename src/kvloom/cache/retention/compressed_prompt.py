"""A prompt, compressed by what its last queries look for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvloom.blocks.runs import blocks_of
from kvloom.cache.retention.base import (
    Held,
    Keep,
    Scored,
    Scores,
    check_count,
    mean_by_run,
    within_budget,
)
from kvloom.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class CompressedPrompt(Scored):
    """Cut a prompt to a budget once it is computed, by the attention of its last queries; drop nothing afterwards.

    Source: Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation", section 4: the queries of an
    observation window at the prompt's end vote for the keys before it, votes are pooled so that neighbours stay
    together, the window itself stays.

    Departures: SnapKV selects for each head; here votes are summed over heads and layers. It selects tokens; here
    blocks, by the mean of their tokens' pooled votes.

    What it loses: what those last queries do not look for. A question that comes later finds only what they kept. A
    continued context is compressed again only by a prompt of at least `observed_tokens`: a shorter one has too few
    queries to judge by. New tokens are never dropped, so memory grows with them.

    Args:
        budget_tokens: the most tokens that stay of a prompt; 1,024 by default.
        observed_tokens: how many of its last queries vote; 32 by default, and they stay.
        pooled_tokens: a vote counts for this many neighbouring tokens, an odd number; 7 by default, 1 for itself alone.
    """

    observed_tokens: int = 32
    pooled_tokens: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("observed_tokens", self.observed_tokens, least=1)
        check_count("pooled_tokens", self.pooled_tokens, least=1)
        if self.pooled_tokens % 2 == 0:
            raise InvalidRequest(
                f"`pooled_tokens={self.pooled_tokens}` must be odd, so that as many stand before a token as after it. "
                f"Pass {self.pooled_tokens - 1} or {self.pooled_tokens + 1}."
            )
        if self.observed_tokens > self.budget_tokens:
            raise InvalidRequest(
                f"`observed_tokens={self.observed_tokens}` exceeds `budget_tokens={self.budget_tokens}`, "
                "in which they stay. Lower the first, or raise the second."
            )

    def observed(self, queries: range, prompt: range) -> int:
        """Those of the prompt's last tokens."""
        first = max(prompt.stop - self.observed_tokens, queries.start)
        return max(0, min(queries.stop, prompt.stop) - first) if len(prompt) >= self.observed_tokens else 0

    def reusable(self, prompt_tokens: int) -> int:
        """All but those that are observed."""
        return max(0, prompt_tokens - self.observed_tokens)

    def keep(self, held: Held) -> Keep:
        """At the end of a prompt, the runs with most votes."""
        if held.tokens != held.prompt.stop or len(held.prompt) < self.observed_tokens:
            return held.everything
        votes = mean_by_run(held, pooled(held.scores, self.pooled_tokens))
        return within_budget(held, votes, self.budget_tokens, recent_tokens=self.observed_tokens)

    def most_blocks(self, *, prompt_tokens: int, new_tokens: int, step_tokens: int, block_tokens: int) -> int:
        """The whole prompt's, or the budget's and the new tokens'."""
        whole = blocks_of(prompt_tokens, block_tokens)
        after = min(whole, blocks_of(self.budget_tokens, block_tokens) + 1) + blocks_of(new_tokens, block_tokens) + 1
        return min(max(whole, after), blocks_of(prompt_tokens + new_tokens, block_tokens))


def pooled(scores: Scores, width: int) -> Scores:
    """float32[held]: for each token the largest score among the `width` tokens around it."""
    padded = np.pad(scores, width // 2, constant_values=-np.inf)
    best: Scores = np.lib.stride_tricks.sliding_window_view(padded, width).max(axis=1)
    return best
