"""The engine: schedule, forward, decide, apply.

It is synchronous: `step` runs one forward pass over the new tokens of all live requests and applies what their
decoders decide. A step that fails leaves tables and counts as they were; a request whose own parts fail (a
raising logits processor, NaN logits) is closed, and the others go on.
"""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from kvloom.cache import CacheLayout, Codec, KVCache
from kvloom.cache.placement import Placement
from kvloom.cache.retention import Retention
from kvloom.cache.snapshot import Origin, open_snapshot
from kvloom.decoding import HostStep, Step, to_host
from kvloom.engine.admission import Admission
from kvloom.engine.children import children
from kvloom.engine.events import Event, RequestFinished, StepDone
from kvloom.engine.foreign import Pair
from kvloom.engine.holding import Holding, Holdings
from kvloom.engine.peaks import note_peaks
from kvloom.engine.planner import default_budget_bytes, longest_kept
from kvloom.engine.request import Request, Row
from kvloom.engine.rows import CachedRows, stacked
from kvloom.engine.scheduler import Scheduled, schedule
from kvloom.engine.scoring import CachedScorer, Scored, score_uncached
from kvloom.errors import CacheFull, ContextClosed, InvalidRequest, NumericalError
from kvloom.models import Binding, Media, Source, check_codec_of

STEP_TOKENS = 512
NO_TOKEN = "no token can be chosen: the model returned NaN logits, or the logits processors left no token possible."


class Engine:
    """Decodes requests on one model and one cache.

    Args:
        binding: the model.
        budget_bytes: the most that the cache's tensors may take; by default see `default_budget_bytes`.
        block_tokens: tokens a block.
        codec: how full blocks are kept.
        step_tokens: the most prompt tokens that one step computes; longer prompts are prefilled in chunks.
        block_bounds: whether blocks keep the bounds of their keys; see `CacheLayout`.

    Attributes:
        cache: None if the model cannot keep one; then every step computes whole sequences.
        listeners: called with each `Event`.
    """

    def __init__(
        self,
        binding: Binding,
        *,
        budget_bytes: int | None = None,
        block_tokens: int = 16,
        codec: Codec = "native",
        step_tokens: int = STEP_TOKENS,
        block_bounds: bool = False,
    ) -> None:
        self.binding = binding
        self.listeners: list[Callable[[Event], None]] = []
        self.step_tokens = step_tokens
        self._requests: list[Request] = []
        self._ids = itertools.count()
        self._lock = threading.RLock()
        self._depth = 0
        self._dropped: deque[Holding] = deque()
        self._detached = False
        self.cache: KVCache | None = None
        check_codec_of(binding, codec)
        if binding.layers:
            layout = CacheLayout(
                layers=binding.layers,
                dtype=binding.dtype,
                block_tokens=block_tokens,
                block_bounds=block_bounds,
                codec=codec,
            )
            if budget_bytes is None:
                budget_bytes = default_budget_bytes(layout, max_tokens=longest_kept(binding), device=binding.device)
            self.cache = KVCache(layout, budget_bytes=budget_bytes, device=binding.device)
            self._holdings = Holdings(self.cache)
            self._admission = Admission(self.cache, self._holdings, binding, step_tokens=step_tokens)
            self._rows = CachedRows(binding, self.cache, self._holdings)

    # ---- requests ------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `CacheFull`, with nothing changed, if it can never fit beside held contexts."""
        with self._working():
            self._check_open()
            request.use_cache = request.use_cache and self.cache is not None
            if request.use_cache:
                request.reserved = self._admission.worst_case(
                    prompt_tokens=len(request.prompt_ids),
                    new_tokens=request.max_new_tokens,
                    rows=request.max_rows,
                    context=request.context,
                    retention=request.retention,
                    source=request.source,
                )
                if not self._admission.fits(request.reserved, ()):
                    self._collect_dropped()
                self._admission.refuse_unless_possible(request.reserved, request.describe())
            request.id = next(self._ids)
            self._requests.append(request)

    def run(self, requests: Sequence[Request]) -> None:
        """Step until `requests` are done; raises the error of the first that failed, after closing them all."""
        try:
            while not all(request.done for request in requests):
                self.step()
            for request in requests:
                if request.error is not None:
                    raise request.error
        except BaseException:
            for request in requests:
                self.abort(request)
            raise

    def abort(self, request: Request) -> None:
        """Close a request, finished or not, and let go of its blocks."""
        with self._working():
            if not request.done:
                self._close(request, None)
            if request in self._requests:
                self._requests.remove(request)
            for holding in request.kept.values():
                self._holdings.release(holding)
            request.kept.clear()

    def step(self) -> None:
        """Run one forward pass over the new tokens of all live requests, and apply the decisions."""
        with self._working():
            self._admit()
            prompt_tokens = self._forward_cached() + self._forward_uncached()
            decoded_rows = self._decide_and_apply()
            pending = sum(request.pending_prompt_tokens for request in self._requests)
            self._emit(StepDone(prompt_tokens, decoded_rows, pending, self.cache.blocks_in_use if self.cache else 0))

    def shut_down(self) -> None:
        """Close every request and holding, and detach from the model."""
        with self._working():
            for request in list(self._requests):
                self.abort(request)
            if self.cache is not None:
                self._holdings.release_all()
            self._detached = True
            self.binding.detach()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """One thread at a time; what was dropped meanwhile is released at the end."""
        with self._lock:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                self._release_dropped()

    def _check_open(self) -> None:
        if self._detached:
            raise ContextClosed("the model was detached. Attach it again.")
        self.binding.check_ready()

    # ---- contexts ------------------------------------------------------------------------------------------

    def compute(
        self,
        token_ids: list[int],
        *,
        context: Holding | None = None,
        logits_of: int = 1,
        source: Source | None = None,
        media: Media | None = None,
        retention: Retention | None = None,
    ) -> tuple[Tensor, Holding]:
        """Compute tokens outside of any request, in chunks.

        Args:
            token_ids: the whole sequence, which begins with the context's tokens.
            context: what is computed already; unchanged.
            logits_of: of how many last tokens logits are wanted.
            source: what the sequence, the context's included, is decoded from.
            media: the images and videos of the sequence.
            retention: the settled policy of the sequence.

        Returns:
            logits, float[logits_of, vocab], and a claimed holding of the sequence's tables.
        """
        with self._working():
            self._check_open()
            tokens = len(token_ids)
            need = self._admission.worst_case(
                prompt_tokens=tokens, rows=1, context=context, source=source, retention=retention
            )
            self._admission.refuse_unless_possible(need, f"a context of {tokens:,} tokens", reserved=self._reserved())
            row = self._rows.open(
                token_ids, context, logits_of=logits_of, source=source, media=media, retention=retention
            )
            try:
                logits = self._rows.complete(row, step_tokens=self.step_tokens, logits_of=logits_of)
                return logits, self._rows.hold(row, claimed=True)
            except BaseException:
                self._rows.close(row)
                raise

    def score(
        self,
        prompt_ids: list[int],
        continuations: Sequence[list[int]],
        *,
        context: Holding | None = None,
        source: Source | None = None,
        media: Media | None = None,
        use_cache: bool = True,
        retention: Retention | None = None,
    ) -> Scored:
        """Log-probabilities of continuations of one prompt.

        Args:
            prompt_ids: the whole prompt, the context's tokens included.
            continuations: token ids, each of at least one token.
            context: what is computed already; unchanged.
            source: what the prompt is decoded from.
            media: the images and videos of the prompt.
            use_cache: without it each continuation is a forward pass of its own over the whole sequence.
            retention: the settled policy of prompt and continuations.

        Raises:
            CacheFull: before any work. NumericalError: NaN logits. Nothing is held afterwards in any case.
        """
        with self._working():
            self._check_open()
            if self.cache is None or not use_cache:
                return score_uncached(self.binding, prompt_ids, continuations, source=source, media=media)
            scorer = CachedScorer(
                self._rows,
                self.cache,
                self.binding,
                prompt_ids=prompt_ids,
                continuations=continuations,
                context=context,
                source=source,
                media=media,
                step_tokens=self.step_tokens,
                most_open_blocks=self._admission.free_open_blocks(self._reserved()),
                retention=retention,
            )
            self._admission.refuse_unless_possible(
                scorer.worst_case(self._admission),
                f"scoring {len(continuations):,} continuations of a {len(prompt_ids):,}-token prompt",
                reserved=self._reserved(),
                remedy="or score fewer of them in a call",
            )
            return scorer.run()

    def save(self, token_ids: Sequence[int], holding: Holding | None, path: str | os.PathLike[str]) -> None:
        """Write a context into a file; tokens of which no keys and values are held any more are computed first."""
        with self._working():
            self._check_open()
            origin = self._origin()
            if holding is not None and holding.cached is not None:
                self._rows.save(holding, token_ids, path, origin)
                return
            _, computed = self.compute(list(token_ids))
            try:
                self._rows.save(computed, token_ids, path, origin)
            finally:
                self._holdings.release(computed)

    def restore(self, path: str | os.PathLike[str]) -> tuple[list[int], Holding]:
        """The tokens of a snapshot and a claimed holding of its tables.

        Raises:
            SnapshotError: the file is missing, damaged, or of another model. CacheFull: before anything is loaded.
        """
        with self._working():
            self._check_open()
            origin = self._origin()
            with open_snapshot(path) as snapshot:
                snapshot.check_origin(origin)
                assert self.cache is not None, "a model without a cache has no origin"
                placements = snapshot.placements(self.cache.layout)
                self._refuse_unless_held(placements, f"a snapshot of {len(snapshot.token_ids):,} tokens")
                return snapshot.token_ids, self._rows.restore(snapshot, placements)

    def adopt(self, token_ids: list[int], pairs: Sequence[Pair]) -> Holding:
        """A claimed holding of keys and values that were computed elsewhere; see `foreign.read_pairs`."""
        with self._working():
            self._check_open()
            assert self.cache is not None, "pairs are read for a layout"
            placements = self._rows.placements_needed(pairs[0][0].shape[1])
            self._refuse_unless_held(placements, f"a cache for {len(token_ids):,} tokens")
            return self._rows.adopt(token_ids, pairs, placements)

    def _refuse_unless_held(self, placements: Sequence[Placement], what: str) -> None:
        """Raise `CacheFull` if a context from elsewhere does not fit."""
        assert self.cache is not None, "what is placed needs a cache"
        self._admission.refuse_unless_possible(
            self.cache.blocks_and_open(tuple(len(own.runs) for own in placements), 1),
            what,
            reserved=self._reserved(),
            remedy="or close contexts that are no longer needed",
        )

    def _origin(self) -> Origin:
        """What the keys and values of this engine depend on."""
        identity = self.binding.identity()
        if self.cache is None or identity is None:
            raise InvalidRequest(
                "a callable keeps no keys and values that another process would know. Keep the token ids."
            )
        return Origin.of(identity.name, identity.fingerprint, self.cache.layout)

    def fork_holding(self, holding: Holding | None, tokens: int) -> Holding | None:
        """A claimed holding of the first `tokens` tokens of another; None if its tables cannot serve."""
        with self._working():
            return None if holding is None else self._rows.fork_holding(holding, tokens)

    def release(self, holding: Holding) -> None:
        """Let go of held tables. May be called more than once, and by the garbage collector at any moment."""
        self._dropped.append(holding)
        if self._lock.acquire(blocking=False):
            try:
                self._release_dropped()
            finally:
                self._lock.release()

    def release_unclaimed(self, holding: Holding) -> None:
        """The same, unless a user has claimed the tables meanwhile."""
        if not holding.claimed:
            self.release(holding)

    def _collect_dropped(self) -> None:
        """Release contexts that nobody holds any more but that wait, in reference cycles, for the garbage collector."""
        gc.collect()
        while self._dropped:
            self._holdings.release(self._dropped.popleft())

    def _release_dropped(self) -> None:
        # In the middle of our own work the tables are not ours to change: `_working` comes back to it.
        while self._depth == 0 and self._dropped:
            self._holdings.release(self._dropped.popleft())

    # ---- admission -----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Start waiting requests, in order of arrival, as long as their worst case fits beside the others'."""
        for request in [request for request in self._requests if not request.started]:
            if request.use_cache:
                reserved = self._reserved()
                if reserved and not self._admission.fits(request.reserved, reserved):
                    return
                try:
                    # Users may have taken contexts since it was submitted. With nothing running, none goes by itself.
                    self._admission.refuse_unless_possible(request.reserved, request.describe())
                except CacheFull as error:
                    self._close(request, error)
                    self._requests.remove(request)
                    continue
            self._start(request)

    def _reserved(self) -> list[tuple[int, ...]]:
        return [request.reserved for request in self._live(cached=True)]

    def _start(self, request: Request) -> None:
        token_ids = list(request.prompt_ids)
        if request.use_cache:
            given, policy = request.context, request.retention
            row = self._rows.open(token_ids, given, source=request.source, media=request.media, retention=policy)
            request.cached_prompt_tokens, request.computed_source_tokens = row.computed, row.encoded
        else:
            row = Row(token_ids, None, None, source=request.source)
        request.rows = [row]
        request.started = True

    # ---- forward -------------------------------------------------------------------------------------------

    def _live(self, *, cached: bool) -> list[Request]:
        return [request for request in self._requests if request.started and request.use_cache == cached]

    def _forward_cached(self) -> int:
        """One pass a rotary regime over the rows that decode on the cache; returns the prompt tokens computed."""
        requests = self._live(cached=True)
        for request in requests:
            self._prepare(request)
        scheduled = schedule(requests, step_tokens=self.step_tokens)
        for regime in dict.fromkeys(item.row.regime for item in scheduled):
            self._forward_together([item for item in scheduled if item.row.regime == regime])
        for item in scheduled:
            item.request.computed_prompt_tokens += item.prompt_tokens_run
        return sum(item.prompt_tokens_run for item in scheduled)

    def _prepare(self, request: Request) -> None:
        """Renew what depends on length, and give tables to the next row that must compute its prompt.

        Tables are given as late as that, so that a row finds what the rows before it have computed.
        """
        for row in request.rows:
            self._rows.renew_regime(row)
        for row in request.rows:
            if row.pending > 1:
                self._rows.ensure_open(row)
            if row.pending > 1:
                break  # a row that found all but its last token runs as a decode step, beside the next

    def _forward_together(self, items: Sequence[Scheduled]) -> None:
        """One forward pass; rows that are complete get their logits."""
        assert self.cache is not None, "only rows on a cache run together"
        note = partial(note_peaks, self.cache, {id(item.request): item.request for item in items}.values())
        ends = [item.row.computed + item.count == len(item.row.token_ids) for item in items]
        logits = self._rows.forward(
            [(item.row, item.count) for item in items],
            logits=[int(end) for end in ends],
            on_held=note,
        )
        complete = [item.row for item, end in zip(items, ends, strict=True) if end]
        for row, own in zip(complete, logits, strict=True):
            row.logits = own

    def _forward_uncached(self) -> int:
        """Whole sequences through the model's own forward; the rows of a request are equally long."""
        computed = 0
        for request in self._live(cached=False):
            token_ids = torch.tensor([row.token_ids for row in request.rows], device=self.binding.device)
            every = self.binding.forward_uncached(token_ids, source=request.source, media=request.media)
            for row, logits in zip(request.rows, every, strict=True):
                row.logits = logits[-1]
            request.computed_source_tokens += request.source_tokens
            request.computed_prompt_tokens += (prompt_tokens := len(request.rows) * len(request.prompt_ids))
            computed += prompt_tokens
        return computed

    # ---- decide and apply ----------------------------------------------------------------------------------

    def _decide_and_apply(self) -> int:
        """Let the decoders decide, bring all decisions to the host at once, apply them; returns rows decoded."""
        decided: list[tuple[Request, Step]] = []
        for request in self._requests:
            if request.started and all(row.logits is not None for row in request.rows):
                step = self._decide(request)
                if step is not None:
                    decided.append((request, step))
        hosts = to_host([step for _, step in decided])
        for (request, step), host in zip(decided, hosts, strict=True):
            self._apply(request, step, host)
        self._requests = [request for request in self._requests if not request.done]
        return sum(len(host.tokens) for host in hosts)

    def _decide(self, request: Request) -> Step | None:
        """The decoder's decision; a decoder that raises closes its own request only."""
        try:
            return request.decoder.decide(stacked([row.logits for row in request.rows if row.logits is not None]))
        except Exception as error:
            self._close(request, error)
            return None

    def _apply(self, request: Request, step: Step, host: HostStep) -> None:
        """Fork the parents, drop what ended or has no child, hand on the tokens."""
        if any(logprob != logprob for logprob in host.logprobs):
            self._close(request, NumericalError(NO_TOKEN))
            return
        request.decoder.advance(step, host)
        rows = children(request, host, self._rows if request.use_cache else None)
        request.rows = [row for row, end in zip(rows, host.finished, strict=True) if not end]
        request.finished_rows += [row for row, end in zip(rows, host.finished, strict=True) if end]
        request.streamed += zip(host.tokens, host.logprobs, strict=True)
        if request.decoder.done:
            self._close(request, None)

    def _close(self, request: Request, error: BaseException | None) -> None:
        """End a request. What was computed stays in the prefix index; finished rows' tables are kept for contexts.

        They are kept unclaimed: while other requests run, they may be given up for them.
        """
        request.done, request.error = True, error
        request.reserved = ()
        request.finished_at = time.perf_counter()
        if request.use_cache and self.cache is not None:
            if error is None:
                self._keep_tables(request)
            for row in (*request.rows, *request.finished_rows):
                self._rows.close(row)
        request.rows.clear()
        request.finished_rows.clear()
        self._emit(RequestFinished(request.id, failed=error is not None))

    def _keep_tables(self, request: Request) -> None:
        for row in (*request.rows, *request.finished_rows):
            self._rows.remember(row)
        for row in request.finished_rows:
            key = tuple(row.token_ids)
            if row.cached is not None and key not in request.kept:
                request.kept[key] = self._rows.hold(row, claimed=False)

    # ---- what is told --------------------------------------------------------------------------------------

    def _emit(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)
