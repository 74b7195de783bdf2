"""A request: one prompt, its decoder, and the rows that are being decoded for it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from kvloom.attention import View, Wanted
from kvloom.cache import CachedSequence
from kvloom.cache.retention import Retention
from kvloom.decoding import Decoder
from kvloom.engine.holding import Holding
from kvloom.engine.looking import Look
from kvloom.models.binding import Regime
from kvloom.models.images.media import Media
from kvloom.models.sources.source import Source


@dataclass(eq=False)
class Row:
    """One live sequence of a request.

    Attributes:
        token_ids: prompt and new tokens so far.
        cached: the tables that hold their keys and values; None without a cache.
        regime: the rotary regime under which these were computed.
        logits: of the last token, float[vocab], once everything is computed; None before.
        source: what the sequence is decoded from, where there is an encoder.
        encoded: tokens of the source that the encoder has read for this row; 0 where the cache knew the source.
        media: the images and videos of the sequence; what the row writes behind them is text.
        look: what its steps have shown since its last token was chosen; None if nobody looks.
    """

    token_ids: list[int]
    cached: CachedSequence | None
    regime: Regime
    logits: Tensor | None = None
    source: Source | None = None
    encoded: int = 0
    media: Media | None = None
    look: Look | None = None

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return self.cached.tokens if self.cached else 0

    @property
    def pending(self) -> int:
        """Tokens that must still be run before logits are known."""
        return 0 if self.logits is not None else len(self.token_ids) - self.computed


@dataclass(frozen=True)
class Usage:
    """What a request cost.

    Attributes:
        prompt_tokens: tokens of the prompt, those of the context included.
        cached_prompt_tokens: of these, found in the cache.
        computed_prompt_tokens: of these, computed; with eight beams the prompt is still computed once.
        new_tokens: generated tokens, over all returned sequences.
        peak_blocks: most blocks held at once, shared ones counted once; in the layer group that held most.
        peak_bytes: most bytes of keys and values held at once, over all layer groups.
        seconds: from submission to the last token.
        dropped_tokens: tokens of the longest sequence that its retention policy had let go of; 0 without one.
        source_tokens: positions of the source, of an encoder-decoder model: its tokens, or what features come to.
        computed_source_tokens: of these, those that the encoder has read; 0 where the cache knew the source.
    """

    prompt_tokens: int
    cached_prompt_tokens: int
    computed_prompt_tokens: int
    new_tokens: int
    peak_blocks: int
    peak_bytes: int
    seconds: float
    dropped_tokens: int = 0
    source_tokens: int = 0
    computed_source_tokens: int = 0


@dataclass(eq=False)
class Request:
    """One prompt on its way through the engine. Made by the caller, changed by the engine alone.

    Attributes:
        prompt_ids: the whole prompt, the context's tokens included.
        decoder: chooses the tokens.
        max_new_tokens: the most tokens that a row can get; bounds the memory that is reserved.
        max_rows: the most rows that can live at once (beams, or samples).
        use_cache: without it every step computes whole sequences by the model's own forward.
        context: tables to fork instead of opening new ones; they stay the caller's.
        context_owner: kept alive with the request, because the tables are freed with it.
        retention: the policy of its sequences, as settled for this request.
        policy: the same as it was asked for, which contexts of the results go on under.
        source: what an encoder-decoder model decodes the request from; the prompt is its decoder's.
        media: the images and videos of the prompt, the context's included.
        keep_tables: whether finished rows keep their tables, for contexts (beams do not: their hypotheses
            outlive their rows).
        wanted: what is to be seen of its inside; None for nothing.
        looks_from: then, position of the first prompt token whose rows are kept.
        views: then, for each token that was chosen, what its rows have shown, in their order.
        untaken: of a stream, tokens and log-probabilities that it has not handed out yet; None if nobody streams.
        kept: by token ids, the tables that finished rows have left behind, once the request is done.
    """

    prompt_ids: list[int]
    decoder: Decoder
    max_new_tokens: int
    max_rows: int
    use_cache: bool = True
    context: Holding | None = None
    context_owner: object = None
    retention: Retention | None = None
    policy: Retention | None = None
    keep_tables: bool = True
    source: Source | None = None
    media: Media | None = None
    wanted: Wanted | None = None
    looks_from: int = 0

    id: int = -1
    rows: list[Row] = field(default_factory=list)
    started: bool = False
    done: bool = False
    error: BaseException | None = None
    untaken: deque[tuple[int, float]] | None = None
    finished_rows: list[Row] = field(default_factory=list)
    kept: dict[tuple[int, ...], Holding] = field(default_factory=dict)
    views: list[list[View]] = field(default_factory=list)
    cached_prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    computed_source_tokens: int = 0
    peak_by_group: tuple[int, ...] = ()
    peak_bytes: int = 0
    dropped_tokens: int = 0
    handed_out: int = -1
    reserved: tuple[int, ...] = ()
    submitted_at: float = field(default_factory=time.perf_counter)
    finished_at: float = 0.0

    @property
    def source_tokens(self) -> int:
        """Length of the source; 0 if there is none."""
        return 0 if self.source is None else self.source.tokens

    @property
    def pending_prompt_tokens(self) -> int:
        """Prompt tokens that are still to be computed."""
        return sum(row.pending for row in self.rows if row.pending > 1)

    @property
    def look(self) -> Look | None:
        """What its first row is looked at by."""
        return None if self.wanted is None else Look(self.wanted, self.looks_from)

    @property
    def rows_wanted(self) -> int:
        """Of how many of the prompt's last tokens something is wanted, so that they must run."""
        return 1 if self.wanted is None else len(self.prompt_ids) - self.looks_from

    def note_views(self) -> None:
        """Keep what the rows have shown, whose next tokens are chosen."""
        if self.wanted is not None:
            looks = [(row.look, len(row.token_ids)) for row in self.rows]
            self.views.append([look.view(tokens) for look, tokens in looks if look is not None])

    def describe(self) -> str:
        """The request in the words of an error message."""
        rows = "" if self.max_rows == 1 else f" and {self.max_rows:,} sequences"
        source = f"a source of {self.source_tokens:,} tokens and " if self.source else ""
        return f"{source}a {len(self.prompt_ids):,}-token prompt with up to {self.max_new_tokens:,} new tokens{rows}"

    def usage(self, new_tokens: int) -> Usage:
        """What the request has cost so far."""
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            cached_prompt_tokens=self.cached_prompt_tokens,
            computed_prompt_tokens=self.computed_prompt_tokens,
            new_tokens=new_tokens,
            peak_blocks=max(self.peak_by_group, default=0),
            peak_bytes=self.peak_bytes,
            seconds=(self.finished_at or time.perf_counter()) - self.submitted_at,
            dropped_tokens=self.dropped_tokens,
            source_tokens=self.source_tokens,
            computed_source_tokens=self.computed_source_tokens,
        )
