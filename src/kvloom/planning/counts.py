"""How many blocks a batch holds, and what a pool of blocks holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvloom.cache import CacheLayout
from kvloom.cache.retention import Retention
from kvloom.engine.planner import request_blocks, worst_case_blocks
from kvloom.models import Binding


@dataclass(frozen=True, kw_only=True)
class BatchBlocks:
    """The blocks of a batch, whose prompts may have any length.

    Attributes:
        prompts: in the batch.
        rows: sequences that each of them fans out to.
        new_tokens: of each sequence.
        source_tokens: of each prompt's source; 0 without one.
        step_tokens: the longest chunk of a prompt.
    """

    binding: Binding
    layout: CacheLayout
    prompts: int
    rows: int
    new_tokens: int
    source_tokens: int
    step_tokens: int
    retention: Retention | None

    def at(self, prompt_tokens: int, *, apart: bool = False) -> tuple[int, ...]:
        """For each layer group, the most that the batch holds at once; `apart` if every sequence shares nothing."""
        own = request_blocks(
            self.binding,
            self.layout,
            prompt_tokens=prompt_tokens,
            new_tokens=self.new_tokens,
            rows=1 if apart else self.rows,
            step_tokens=self.step_tokens,
            source_tokens=self.source_tokens,
            retention=self.retention,
        )
        return tuple(self.prompts * (self.rows if apart else 1) * blocks for blocks in own)

    def prompts_at_once(self, pool: int, prompt_tokens: int) -> int:
        """How many of the prompts a pool of so many blocks a group serves together."""
        at_once = [pool * self.prompts // blocks for blocks in self.at(prompt_tokens)]
        if self.layout.seals:
            at_once.append(self.layout.open_blocks(pool) // self.rows)
        return min(self.prompts, *at_once)

    def longest_prompt(self, pool: int, limit: int | None) -> int | None:
        """The longest prompt with which a pool serves all at once, within `limit` tokens; None if none does."""
        most = pool * self.layout.block_tokens if limit is None else limit - self.new_tokens
        return _largest(lambda tokens: max(self.at(tokens)) <= pool, most, least=1)

    def longest_sequence(self, pool: int) -> int | None:
        """The longest single sequence that a pool holds; None if every layer forgets, and what it keeps fits."""

        def fits(tokens: int) -> bool:
            need = worst_case_blocks(
                self.layout,
                prompt_tokens=tokens,
                new_tokens=0,
                rows=1,
                step_tokens=self.step_tokens,
                retention=self.retention,
            )
            return max(need) <= pool

        # A group that forgets nothing fills the pool at this length.
        most = pool * self.layout.block_tokens
        return None if fits(most + 1) else _largest(fits, most)


def _largest(holds: Callable[[int], bool], most: int, *, least: int = 0) -> int | None:
    """The largest number from `least` to `most` for which `holds`, which it does up to some number; None if none."""
    if most < least or not holds(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if holds(middle) else (least, middle - 1)
    return least
