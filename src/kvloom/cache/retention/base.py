"""What a retention policy is, and what it knows of a sequence.

A policy decides by blocks: a table lets go of whole runs, so what is dropped frees real blocks, forks go on sharing
what both keep, and nothing is copied. Scores are kept by token, summed over heads and layers of a group, because a
table serves all layers of its group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kvloom.blocks.runs import COUNT, FIRST, blocks_of
from kvloom.blocks.table import Table
from kvloom.cache.retention.sight import Sight
from kvloom.errors import InvalidRequest

Scores = npt.NDArray[np.float32]
Keep = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Held:
    """What a sequence holds in one layer group.

    Attributes:
        firsts, counts: int32[runs], first position and length of each run, in token order.
        scores: float32[held], one for each token; empty for policies that do not score.
        tokens: length of the sequence.
        prompt: the positions of the prompt that was run last; a continued context's own tokens come before it.
    """

    firsts: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    scores: Scores
    tokens: int
    prompt: range

    @classmethod
    def of(cls, table: Table, scores: Scores, prompt: range) -> Held:
        """What `table` holds."""
        return cls(table.runs[:, FIRST], table.runs[:, COUNT], scores, table.position, prompt)

    @property
    def everything(self) -> Keep:
        """bool[runs], to drop nothing."""
        return np.ones(len(self.firsts), dtype=bool)


@dataclass(frozen=True, kw_only=True)
class Retention(ABC):
    """Which tokens of a sequence stay. Policies are frozen, and equal if their settings are.

    They apply to layers with full attention; layers with a window or chunks of their own keep what these need.
    """

    scored: ClassVar[bool] = False
    """Whether tokens have scores."""

    # ---- what it needs to know

    def observed(self, queries: range, prompt: range) -> int:
        """Of the `queries` that a step runs, how many of the last ones it wants the attention mass of."""
        return 0

    def reusable(self, prompt_tokens: int) -> int:
        """How many leading tokens of a prompt may come from a cache that full attention has computed."""
        return prompt_tokens

    # ---- score

    def score(self, before: Scores, mass: Scores | None) -> Scores:
        """The tokens' scores after a step.

        Args:
            before: float32[held], 0 for tokens that are new.
            mass: float32[held], the attention that the observed queries gave to each token, summed over queries, heads
                and layers; None if none were observed.
        """
        return before if mass is None else before + mass

    # ---- keep

    @abstractmethod
    def keep(self, held: Held) -> Keep:
        """bool[runs], after a step: which runs stay."""

    def sight(self, trained_tokens: int | None) -> Sight | None:
        """What queries see of what is held; None if they see all of it."""
        return None

    def read_tokens(self, query: int, prompt: range) -> int | None:
        """The most tokens, in whole blocks, that the query at a position reads; None if it reads all that it sees."""
        return None

    # ---- what it means for others

    def exact_tokens(self, prompt_tokens: int, trained_tokens: int | None) -> int | None:
        """How many leading tokens are computed as by full attention whatever is dropped; None: all until a drop."""
        return None

    @abstractmethod
    def most_blocks(self, *, prompt_tokens: int, new_tokens: int, step_tokens: int, block_tokens: int) -> int:
        """The most blocks that one sequence holds at once in a group of full attention."""

    def can_cut(self, table: Table, tokens: int) -> bool:
        """Whether a sequence cut to `tokens` would be as if it had never been longer; `table` is what it holds."""
        return False

    def check(self, *, prompt_tokens: int, block_tokens: int) -> None:
        """Raise `InvalidRequest` if the policy makes no sense for such a prompt, or for blocks of this size."""
        check_count("prompt_tokens", prompt_tokens, least=1)

    @property
    def least_prompt(self) -> int:
        """The shortest prompt that it makes sense for, in tokens."""
        return 1

    @property
    def reindexes(self) -> bool:
        """Whether it can take a sequence past the model's trained length."""
        return False

    def settled(self, *, outgrows: bool) -> Retention:
        """The policy as one request applies it, which may outgrow the trained length."""
        return self

    def same_as(self, other: Retention | None) -> bool:
        """Whether a sequence of `other` can go on under this policy."""
        return self == other


@dataclass(frozen=True, kw_only=True)
class Scored(Retention):
    """Policies that keep the best blocks within a budget. A prompt is computed whole before any go.

    Args:
        budget_tokens: the most tokens that stay; 1,024 by default.
    """

    scored: ClassVar[bool] = True

    budget_tokens: int = 1024

    def __post_init__(self) -> None:
        check_count("budget_tokens", self.budget_tokens, least=1)

    def most_blocks(self, *, prompt_tokens: int, new_tokens: int, step_tokens: int, block_tokens: int) -> int:
        """The whole prompt's, or the budget's with one block that is being filled and one that is over."""
        within = min(
            blocks_of(prompt_tokens + new_tokens, block_tokens), blocks_of(self.budget_tokens, block_tokens) + 2
        )
        return max(blocks_of(prompt_tokens, block_tokens), within)

    def check(self, *, prompt_tokens: int, block_tokens: int) -> None:
        """Refuse a budget below one block."""
        check_budget(self.budget_tokens, block_tokens)


@dataclass(frozen=True)
class Retained:
    """What retention knows of one sequence. It never changes: a step replaces it, so forks can share it.

    Attributes:
        policy: as the request applies it.
        prompt: see `Held`.
        sight: what queries see of what is held; None if all of it.
        exact_tokens: leading tokens whose keys and values are those of full attention, and which alone may enter the
            prefix index; None if all are.
        scores: for each layer group float32[held], or empty.
    """

    policy: Retention
    prompt: range
    sight: Sight | None
    exact_tokens: int | None
    scores: tuple[Scores, ...]

    @classmethod
    def begin(
        cls, policy: Retention, tables: Sequence[Table], *, prompt_tokens: int, trained_tokens: int | None
    ) -> Retained:
        """The state of a sequence of which `tables` hold the first tokens, computed by full attention."""
        return cls(
            policy,
            range(prompt_tokens),
            policy.sight(trained_tokens),
            policy.exact_tokens(prompt_tokens, trained_tokens),
            tuple(np.zeros(table.held if policy.scored else 0, dtype=np.float32) for table in tables),
        )

    def observed(self, first: int, count: int) -> int:
        """Of `count` queries from position `first` on, how many of the last ones the policy wants to observe."""
        return self.policy.observed(range(first, first + count), self.prompt)

    def cut(self, tokens: int) -> Retained:
        """The state of the sequence when it is cut to `tokens`, where its policy allows that."""
        return replace(self, prompt=range(min(self.prompt.start, tokens), min(self.prompt.stop, tokens)))

    def going_on(self, policy: Retention, *, computed: int, prompt_tokens: int, trained_tokens: int | None) -> Retained:
        """The state of a sequence of `computed` tokens that is continued to `prompt_tokens`."""
        exact = policy.exact_tokens(prompt_tokens, trained_tokens)
        limits = [limit for limit in (self.exact_tokens, exact) if limit is not None]
        return replace(
            self,
            policy=policy,
            prompt=range(computed, prompt_tokens),
            sight=policy.sight(trained_tokens),
            exact_tokens=min(limits, default=None),
        )


def check_count(name: str, value: object, *, least: int) -> None:
    """Refuse what is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidRequest(f"`{name}` must be a whole number of at least {least}; got {value!r}.")


def check_budget(budget_tokens: int, block_tokens: int) -> None:
    """Refuse a budget that holds no block."""
    if budget_tokens < block_tokens:
        raise InvalidRequest(
            f"`budget_tokens={budget_tokens}` is below one block of {block_tokens} tokens, and whole blocks are kept. "
            f"Raise it to at least {block_tokens}, or lower block_tokens."
        )


def within_budget(held: Held, by_run: Scores, budget_tokens: int, *, recent_tokens: int = 0) -> Keep:
    """bool[runs]: the runs that stay when the worst go until at most `budget_tokens` are held.

    Runs of the last `recent_tokens` go only after all others, oldest first, and the last run never.
    """
    keep = held.everything
    excess = int(held.counts.sum()) - budget_tokens
    if excess <= 0:
        return keep
    recent = held.firsts + held.counts > held.tokens - recent_tokens
    order = np.lexsort((held.firsts, np.where(recent, 0, by_run), recent))
    order = order[order != len(order) - 1]
    gone = int(np.searchsorted(np.cumsum(held.counts[order]), excess)) + 1
    keep[order[:gone]] = False
    return keep


def mean_by_run(held: Held, scores: Scores) -> Scores:
    """float32[runs]: the mean score of each run's tokens."""
    starts = np.cumsum(held.counts) - held.counts
    means: Scores = (np.add.reduceat(scores, starts) / held.counts).astype(np.float32)
    return means
