"""The first tokens and the last ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from kvloom.blocks.runs import blocks_of
from kvloom.blocks.table import Table
from kvloom.cache.retention.base import Held, Keep, Retention, check_count
from kvloom.cache.retention.sight import Sight, Stretch
from kvloom.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class SinkWindow(Retention):
    """Keep the first tokens, the last ones, and pinned spans: constant memory and time for streams of any length.

    A query sees the first `sink_tokens` tokens, the pinned ones, and the `window_tokens` tokens that end with itself:
    exactly attention under that mask, whatever the chunks and blocks. Memory is freed by whole blocks, so a pinned
    token keeps its block.

    Source: Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks" (StreamingLLM), section 3.2.
    Pinned spans as in SepLLM (Chen et al. 2025, section 3), whose separators they can be.

    Departures: positions stay those of the text as long as the sequence fits the model's trained length. Where a
    request may outgrow it, distances are those within the cache, by turning queries (see `sight`); keys that were
    cached before are the same. With sinks and window together longer than the trained length, sinks are seen at its
    last positions. SepLLM pins separators as they are generated; here pins are spans of the prompt.

    What it loses: all that lies between: nothing that the text said there can be recalled.

    Args:
        sink_tokens: how many of the first tokens stay; 4 by default.
        window_tokens: how many of the last ones, the current one included; 1,024 by default.
        pins: (first, end) positions of spans of the prompt that stay: a system prompt, an image's tokens, separators.
        reindex: whether distances are those within the cache: None, only for requests that may outgrow the model's
            trained length; True, always; False, never, and such requests are refused.

    Raises:
        InvalidRequest: counts or spans that make no sense.
    """

    sink_tokens: int = 4
    window_tokens: int = 1024
    pins: tuple[Stretch, ...] = ()
    reindex: bool | None = None

    def __post_init__(self) -> None:
        check_count("sink_tokens", self.sink_tokens, least=0)
        check_count("window_tokens", self.window_tokens, least=1)
        if self.reindex not in (None, True, False):
            raise InvalidRequest(f"`reindex` must be True, False or None; got {self.reindex!r}.")
        object.__setattr__(self, "pins", _checked(self.pins))

    def keep(self, held: Held) -> Keep:
        """Runs that the last query saw. The next one sees no more of the past; this one may be run again."""
        firsts = held.firsts.astype(np.int64)
        return self._true_distances.needed(firsts, firsts + held.counts, held.tokens - 1)

    def sight(self, trained_tokens: int | None) -> Sight:
        """Sinks, pins and window."""
        return self._sight(bool(self.reindex), trained_tokens)

    def reusable(self, prompt_tokens: int) -> int:
        """Tokens that see all before them."""
        return min(prompt_tokens, self._true_distances.exact_tokens)

    def exact_tokens(self, prompt_tokens: int, trained_tokens: int | None) -> int:
        """The same; fewer where distances are cut to the trained length."""
        return self.sight(trained_tokens).exact_tokens

    def most_blocks(self, *, prompt_tokens: int, new_tokens: int, step_tokens: int, block_tokens: int) -> int:
        """Those of sinks and pins, of the window and of one chunk of a prompt."""
        pinned = sum((end - 1) // block_tokens - first // block_tokens + 1 for first, end in self._always())
        near = self.window_tokens + min(step_tokens, prompt_tokens)
        return min(blocks_of(prompt_tokens + new_tokens, block_tokens), pinned + blocks_of(near, block_tokens) + 2)

    def can_cut(self, table: Table, tokens: int) -> bool:
        """Whether the window of the query at `tokens` is still held."""
        return table.holds(max(0, tokens - self.window_tokens + 1), tokens)

    def check(self, *, prompt_tokens: int, block_tokens: int) -> None:
        """Refuse pins outside the prompt."""
        first, end = max(self.pins, key=lambda pin: pin[1], default=(0, 0))
        if end > prompt_tokens:
            raise InvalidRequest(
                f"`pins` has the span ({first}, {end}), but the prompt has {prompt_tokens} tokens. "
                f"A span ends at {prompt_tokens} or before."
            )

    def check_trained(self, trained_tokens: int) -> None:
        """Refuse what does not fit the trained length at once."""
        pinned = sum(end - first for first, end in self._always()) - self.sink_tokens
        if pinned + self.window_tokens > trained_tokens:
            pins = f" and {pinned:,} pinned tokens" if pinned else ""
            raise InvalidRequest(
                f"`window_tokens={self.window_tokens}`{pins} exceed the model's trained length of {trained_tokens:,} "
                f"tokens. Lower window_tokens to {max(trained_tokens - pinned, 1)} or less."
            )

    @property
    def least_prompt(self) -> int:
        """One that its pins lie in."""
        return max((end for _, end in self.pins), default=1)

    @property
    def reindexes(self) -> bool:
        """Unless it was told not to."""
        return self.reindex is not False

    def settled(self, *, outgrows: bool) -> SinkWindow:
        """With `reindex` decided."""
        return replace(self, reindex=bool(self.reindex) or (self.reindex is None and outgrows))

    def same_as(self, other: Retention | None) -> bool:
        """Distances may change on the way: keys do not depend on them."""
        return isinstance(other, SinkWindow) and replace(self, reindex=None) == replace(other, reindex=None)

    @cached_property
    def _true_distances(self) -> Sight:
        return self._sight(False, None)

    def _sight(self, reindexed: bool, trained_tokens: int | None) -> Sight:
        return Sight(self._always(), self.window_tokens, reindexed, trained_tokens if reindexed else None)

    def _always(self) -> tuple[Stretch, ...]:
        """Sinks and pins, ascending and merged."""
        merged: list[Stretch] = []
        for first, end in sorted([(0, self.sink_tokens), *self.pins]):
            if merged and first <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            elif first < end:
                merged.append((first, end))
        return tuple(merged)


def _checked(pins: object) -> tuple[Stretch, ...]:
    """Spans as sorted tuples."""
    try:
        spans = [(first, end) for first, end in pins]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise InvalidRequest(
            f"`pins` must be a list of (first, end) positions; got {pins!r}. Pass [(first, end), ...]."
        ) from None
    for first, end in spans:
        check_count("pins", first, least=0)
        check_count("pins", end, least=0)
        if end <= first:
            raise InvalidRequest(f"`pins` has the span ({first}, {end}), which holds no token. Let it end later.")
    return tuple(sorted(spans))
