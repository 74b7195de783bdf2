"""Who may start: the worst case of every running request must fit beside the contexts that users hold.

Because a request reserves all that it can come to need, a running request never meets a full pool: later
requests wait instead, and one that could never fit is refused before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvloom.cache import CachedSequence, KVCache
from kvloom.cache.retention import Retention
from kvloom.engine.holding import Holding, Holdings, is_current
from kvloom.engine.planner import request_blocks, shares_prompt
from kvloom.errors import CacheFull, PromptTooLong
from kvloom.models import Binding, Source
from kvloom.units import readable_bytes

Blocks = tuple[int, ...]
"""A number of blocks for each layer group, and then of open blocks where they have an arena of their own."""


class Admission:
    """Counts what may still be promised of one cache's blocks.

    Attributes:
        step_tokens: the most tokens of a prompt that one pass computes; a window keeps that much more for a moment.
    """

    def __init__(self, cache: KVCache, holdings: Holdings, binding: Binding, *, step_tokens: int) -> None:
        self._cache = cache
        self._holdings = holdings
        self._binding = binding
        self.step_tokens = step_tokens

    def worst_case(
        self,
        *,
        prompt_tokens: int,
        new_tokens: int = 0,
        rows: int,
        context: Holding | None,
        source: Source | None = None,
        retention: Retention | None = None,
    ) -> Blocks:
        """The most blocks that a request can come to hold beyond those of its context."""
        if context is not None and not is_current(context, self._binding):
            context = None  # its tokens will be computed anew
        need = request_blocks(
            self._binding,
            self._cache.layout,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rows=rows,
            step_tokens=self.step_tokens,
            retention=retention,
            source_tokens=0 if source is None else source.tokens,
        )
        if context is not None and context.cached is not None:
            start = self._begins_at(context, context.cached, prompt_tokens, new_tokens, retention)
            if start is not None:
                need = self._beside(need, context.cached, start, prompt_tokens, new_tokens, rows)
        # Every row ends in a block of its own.
        return self._cache.blocks_and_open(need, rows)

    def _begins_at(
        self,
        context: Holding,
        cached: CachedSequence,
        prompt_tokens: int,
        new_tokens: int,
        retention: Retention | None,
    ) -> int | None:
        """Up to which token a request shares a context's tables to its end; None if they cannot serve it."""
        shares = shares_prompt(self._binding, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        if not shares or context.regime != self._binding.regime(prompt_tokens):
            return None
        begins = retention is not None and cached.retained is None
        reusable = min(prompt_tokens - 1, retention.reusable(prompt_tokens) if begins and retention else prompt_tokens)
        start = self._cache.unsealed_length(cached, min(reusable, cached.tokens))
        return start if self._cache.can_truncate(cached, start) else None

    def _beside(
        self, need: Blocks, cached: CachedSequence, start: int, prompt_tokens: int, new_tokens: int, rows: int
    ) -> Blocks:
        """What rows take beside a context whose first `start` tokens they share: its blocks stay held by the context.

        Where nothing is let go of, the full ones among them are part of the rows' own worst case. Where windows or a
        policy let go, the rows may come to hold none of them, but never more than one block for all that is theirs.
        """
        blocks = self._cache.layout.blocks_of
        own = blocks(prompt_tokens - start) + 1 + rows * (blocks(new_tokens) + 1)
        return tuple(
            max(most - table.full_blocks, 1)
            if group.group.reach.cross or (group.group.reach.unlimited and cached.retained is None)
            else min(most, own)
            for most, table, group in zip(need, cached.tables, self._cache.groups, strict=True)
        )

    def fits(self, need: Blocks, reserved: Iterable[Blocks]) -> bool:
        """Whether `need` fits beside what is `reserved` and what users' contexts hold."""
        taken = [sum(group) for group in zip(self._holdings.claimed_blocks(), *reserved, strict=True)]
        return all(own + others <= most for own, others, most in zip(need, taken, self._cache.capacity, strict=True))

    def free_open_blocks(self, reserved: Iterable[Blocks]) -> int | None:
        """How many more blocks can be open beside what is `reserved`; None if their number is not limited."""
        if self._cache.open_blocks is None:
            return None
        return self._cache.open_blocks - sum(own[-1] for own in (self._holdings.claimed_blocks(), *reserved))

    def refuse_unless_possible(
        self,
        need: Blocks,
        what: str,
        *,
        reserved: Iterable[Blocks] = (),
        remedy: str = "or lower max_new_tokens or the number of sequences",
        collect: Callable[[], None] | None = None,
    ) -> None:
        """Raise `CacheFull` with need, have and remedy if `need` does not fit.

        Args:
            need: of `worst_case`.
            what: needs it, the subject of the message.
            reserved: what running requests may come to need.
            remedy: besides a larger budget.
            collect: lets go of contexts that users have dropped; called before a refusal. None inside a step.
        """
        reserved = list(reserved)
        if collect is not None and not self.fits(need, reserved):
            collect()
        if self.fits(need, reserved):
            return
        layout, capacity = self._cache.layout, self._cache.capacity
        held = self._holdings.claimed_blocks()
        taken = [sum(group) for group in zip(held, *reserved, strict=True)]
        together = [own + others for own, others in zip(need, taken, strict=True)]
        worst = max(range(len(need)), key=lambda index: together[index] - capacity[index])
        blocks = "open blocks" if worst == len(self._cache.groups) else f"blocks of {layout.block_tokens} tokens"
        beside = f", {held[worst]} of them held by contexts" if held[worst] else ""
        running = f", {taken[worst] - held[worst]} reserved by running requests" if taken[worst] > held[worst] else ""
        groups = len(self._cache.groups)
        budget = layout.budget_for(max(together[:groups]), open_blocks=max(together[groups:], default=0))
        raise CacheFull(
            f"{what} needs {need[worst]:,} {blocks}; the pool has {capacity[worst]:,}{beside}{running} "
            f"({readable_bytes(self._cache.store.allocated_bytes)}). Raise budget_bytes to at least {budget:,} "
            f"({readable_bytes(budget)}), {remedy}."
        )


def check_length(limit: int | None, prompt_tokens: int, new_tokens: int) -> None:
    """Raise `PromptTooLong` unless both fit the model's context of `limit` tokens."""
    if limit is None or prompt_tokens + new_tokens <= limit:
        return
    if prompt_tokens >= limit:
        raise PromptTooLong(
            f"the prompt has {prompt_tokens:,} tokens; the model's context of {limit:,} leaves no room for a "
            "new one. Shorten the prompt."
        )
    raise PromptTooLong(
        f"{prompt_tokens:,} prompt tokens and {new_tokens:,} new ones exceed the model's context of {limit:,}. "
        f"Lower max_new_tokens to {limit - prompt_tokens:,}, or shorten the prompt."
    )
