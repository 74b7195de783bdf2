"""Everything is kept, and each step reads a little of it."""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.blocks.runs import blocks_of
from kvloom.blocks.table import Table
from kvloom.cache.retention.base import Held, Keep, Retention, check_budget, check_count


@dataclass(frozen=True, kw_only=True)
class TopBlocks(Retention):
    """Drop nothing, but let each new token read only the blocks that can matter most to it.

    Source: Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", section 3: from
    the least and largest value of each channel over a block's keys follows the largest score that any of its keys can
    have; the blocks with the largest are read. A prompt is computed with full attention.

    Departures: each KV head chooses for all query heads that share it, by the largest bound among them. All layers
    choose, also the first two, which Quest leaves dense. The block being filled is always read.

    What it loses: no memory is freed, and the least and largest keys take 2/block_tokens of the keys' bytes besides,
    which only a model that was loaded or attached with this policy plans for. A fact spread over many blocks that each
    matter little is missed for this step, but not for good.

    Args:
        budget_tokens: the most tokens that a query reads, in whole blocks; 1,024 by default.
    """

    budget_tokens: int = 1024

    def __post_init__(self) -> None:
        check_count("budget_tokens", self.budget_tokens, least=1)

    def keep(self, held: Held) -> Keep:
        """Everything."""
        return held.everything

    def read_tokens(self, query: int, prompt: range) -> int | None:
        """The budget, for tokens behind the prompt."""
        return self.budget_tokens if query >= prompt.stop else None

    def exact_tokens(self, prompt_tokens: int, trained_tokens: int | None) -> int:
        """The first prompt."""
        return prompt_tokens

    def most_blocks(self, *, prompt_tokens: int, new_tokens: int, step_tokens: int, block_tokens: int) -> int:
        """Those of all tokens."""
        return blocks_of(prompt_tokens + new_tokens, block_tokens)

    def can_cut(self, table: Table, tokens: int) -> bool:
        """Always: nothing was dropped."""
        return True

    def check(self, *, prompt_tokens: int, block_tokens: int) -> None:
        """Refuse a budget below one block."""
        check_budget(self.budget_tokens, block_tokens)
