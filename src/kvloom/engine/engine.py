"""The engine: schedule, forward, decide, apply.

It is synchronous: `step` runs one forward pass over the new tokens of all live requests and applies what their
decoders decide. A step that fails leaves tables and counts as they were; a request whose own parts fail (a
raising logits processor, NaN logits) is closed, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kvloom.cache import Codec
from kvloom.decoding import HostStep, Step, to_host
from kvloom.engine.children import children
from kvloom.engine.contexts import Contexts
from kvloom.engine.events import Event, RequestFinished, StepDone
from kvloom.engine.forward import forward_cached, forward_uncached, prepare
from kvloom.engine.guard import Guard
from kvloom.engine.keeping import Keeping, make_cache
from kvloom.engine.queue import Requests
from kvloom.engine.request import Request, Row
from kvloom.engine.rows import CachedRows, stacked
from kvloom.engine.scheduler import STEP_TOKENS, schedule
from kvloom.errors import CacheFull, NumericalError
from kvloom.exclusive import interruptible, uninterrupted
from kvloom.models import Binding, check_codec_of, check_countable

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
        contexts: what is computed, held and scored outside of requests.
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
        check_codec_of(binding, codec)
        self.binding = binding
        self.listeners: list[Callable[[Event], None]] = []
        self.cache = make_cache(
            binding, budget_bytes=budget_bytes, block_tokens=block_tokens, codec=codec, block_bounds=block_bounds
        )
        self._keeping = None if self.cache is None else Keeping.on(self.cache, binding, step_tokens=step_tokens)
        self._guard = Guard(binding)
        self._requests = Requests()
        self.contexts = Contexts(binding, self._keeping, self._guard, self._requests)

    @property
    def step_tokens(self) -> int:
        """The most prompt tokens that one step computes on the cache; may be changed between two steps."""
        return self._kept.admission.step_tokens

    @step_tokens.setter
    def step_tokens(self, tokens: int) -> None:
        self._kept.admission.step_tokens = tokens

    # ---- requests ------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `CacheFull`, with nothing changed, if it can never fit beside held contexts."""
        with self._guard.working(new=True):
            request.use_cache = request.use_cache and self.cache is not None
            if request.use_cache:
                check_countable(self.binding, request.prompt_ids)
                self._reserve(request)
            self._requests.add(request)

    def run(self, requests: Sequence[Request]) -> None:
        """Step until `requests` are done; raises the error of the first that failed, after closing them all."""
        try:
            while not all(request.done for request in requests):
                self.step()
            for request in requests:
                if request.error is not None:
                    raise request.error
        except BaseException:
            self.abort_all(requests)
            raise

    def step(self) -> None:
        """Run one forward pass over the new tokens of all live requests, and apply the decisions."""
        with self._guard.working():
            self._admit()
            prompt_tokens = self._forward()
            decided = self._decide()
            decoded_rows = self._apply(decided)
            pending = sum(request.pending_prompt_tokens for request in self._requests)
            self._emit(StepDone(prompt_tokens, decoded_rows, pending, self.cache.blocks_in_use if self.cache else 0))

    def abort_all(self, requests: Iterable[Request]) -> None:
        """Close several, without being interrupted between two of them."""
        with uninterrupted():
            for request in requests:
                self.abort(request)

    def abort(self, request: Request) -> None:
        """Close a request, finished or not, and let go of its blocks.

        May be called more than once, and by the garbage collector, which drops streams at any moment, in the middle of
        a step; then it waits for the step's end.
        """
        self._guard.put_off(partial(self._abort, request))

    def shut_down(self) -> None:
        """Close every request and holding, and detach from the model."""
        with self._guard.working():
            for request in self._requests:
                self._abort(request)
            if self._keeping is not None:
                self._keeping.holdings.release_all()
            self._guard.close()

    def _abort(self, request: Request) -> None:
        with self._guard.working():
            if not request.done:
                self._close(request, None)
            self._requests.remove(request)
            for holding in request.kept.values():
                self._kept.holdings.release(holding)
            request.kept.clear()

    # ---- admission -----------------------------------------------------------------------------------------

    def _reserve(self, request: Request) -> None:
        """Note the worst case of a request, or raise `CacheFull`."""
        admission = self._kept.admission
        request.reserved = admission.worst_case(
            prompt_tokens=len(request.prompt_ids),
            new_tokens=request.max_new_tokens,
            rows=request.max_rows,
            context=request.context,
            retention=request.retention,
            source=request.source,
        )
        admission.refuse_unless_possible(request.reserved, request.describe(), collect=self._guard.catch_up_now)

    def _admit(self) -> None:
        """Start waiting requests, in order of arrival, as long as their worst case fits beside the others'."""
        for request in self._requests.waiting:
            if request.use_cache:
                admission, reserved = self._kept.admission, self._requests.reserved
                if reserved and not admission.fits(request.reserved, reserved):
                    return
                try:
                    # Users may have taken contexts since it was submitted. With nothing running, none goes by itself.
                    admission.refuse_unless_possible(request.reserved, request.describe())
                except CacheFull as error:
                    self._close(request, error)
                    self._requests.remove(request)
                    continue
            self._start(request)

    def _start(self, request: Request) -> None:
        token_ids = list(request.prompt_ids)
        if request.use_cache:
            row = self._kept.rows.open(
                token_ids,
                request.context,
                logits_of=request.rows_wanted,
                source=request.source,
                media=request.media,
                retention=request.retention,
            )
            request.cached_prompt_tokens, request.computed_source_tokens = row.computed, row.encoded
        else:
            row = Row(token_ids, None, None, source=request.source)
        row.look = request.look
        request.rows = [row]
        request.started = True

    # ---- schedule and forward ------------------------------------------------------------------------------

    def _forward(self) -> int:
        """Run what is scheduled on the cache, and whole sequences without it; returns the prompt tokens computed."""
        prompt_tokens = 0
        if cached := self._requests.running(cached=True):
            prepare(self._kept.rows, cached)
            scheduled = schedule(cached, step_tokens=self.step_tokens)
            prompt_tokens += forward_cached(self._kept.rows, self._kept.cache, scheduled)
        return prompt_tokens + forward_uncached(self.binding, self._requests.running(cached=False))

    # ---- decide and apply ----------------------------------------------------------------------------------

    def _decide(self) -> list[tuple[Request, Step]]:
        """What the decoders of complete rows decide; one that raises closes its own request only."""
        decided = []
        for request in self._requests:
            logits = [row.logits for row in request.rows if row.logits is not None]
            if not request.started or len(logits) < len(request.rows):
                continue
            try:
                with interruptible():
                    decided.append((request, request.decoder.decide(stacked(logits))))
            except Exception as error:
                self._close(request, error)
        return decided

    def _apply(self, decided: Sequence[tuple[Request, Step]]) -> int:
        """Bring all decisions to the host at once, and apply them; returns how many rows got a token."""
        hosts = to_host([step for _, step in decided])
        for (request, step), host in zip(decided, hosts, strict=True):
            if any(logprob != logprob for logprob in host.logprobs):
                self._close(request, NumericalError(NO_TOKEN))
            else:
                self._hand_on(request, step, host)
        self._requests.remove_done()
        return sum(len(host.tokens) for host in hosts)

    def _hand_on(self, request: Request, step: Step, host: HostStep) -> None:
        """Fork the parents, drop what ended or has no child, hand on the tokens."""
        request.decoder.advance(step, host)
        request.note_views()
        rows = children(request, host, self._kept.rows if request.use_cache else None)
        request.rows = [row for row, end in zip(rows, host.finished, strict=True) if not end]
        request.finished_rows += [row for row, end in zip(rows, host.finished, strict=True) if end]
        if request.untaken is not None:
            request.untaken.extend(zip(host.tokens, host.logprobs, strict=True))
        if request.decoder.done:
            self._close(request, None)

    def _close(self, request: Request, error: BaseException | None) -> None:
        """End a request. What was computed stays in the prefix index; finished rows' tables are kept for contexts.

        They are kept unclaimed: while other requests run, they may be given up for them.
        """
        request.done, request.error = True, error
        request.reserved = ()
        request.finished_at = time.perf_counter()
        if request.use_cache and self._keeping is not None:
            if error is None:
                _keep_tables(request, self._keeping.rows)
            for row in (*request.rows, *request.finished_rows):
                self._keeping.rows.close(row)
        request.rows.clear()
        request.finished_rows.clear()
        self._emit(RequestFinished(request.id, failed=error is not None))

    # ---- what is told --------------------------------------------------------------------------------------

    def _emit(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)

    @property
    def _kept(self) -> Keeping:
        assert self._keeping is not None, "only a model that keeps keys and values runs on a cache"
        return self._keeping


def _keep_tables(request: Request, rows: CachedRows) -> None:
    for row in (*request.rows, *request.finished_rows):
        rows.remember(row)
    for row in request.finished_rows:
        key = tuple(row.token_ids)
        if row.cached is not None and key not in request.kept:
            request.kept[key] = rows.hold(row, claimed=False)
