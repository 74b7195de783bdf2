"""The engine: schedule, forward, decide, apply.

It is synchronous: `step` runs one forward pass over the new tokens of all live requests and applies what their
decoders decide. A step that fails leaves tables and counts as they were; a request whose own parts fail (a
raising logits processor, NaN logits) is closed, and the others go on.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvloom.attention import build_plan
from kvloom.blocks import PoolExhausted
from kvloom.cache import CachedSequence, CacheLayout, Extension, KVCache
from kvloom.decoding import HostStep, Step, to_host
from kvloom.engine.admission import Admission
from kvloom.engine.events import Event, RequestFinished, StepDone
from kvloom.engine.holding import Holding, Holdings
from kvloom.engine.planner import default_budget_bytes
from kvloom.engine.request import Request, Row
from kvloom.engine.scheduler import Scheduled, schedule
from kvloom.errors import CacheFull, ContextClosed, NumericalError
from kvloom.models import Binding

STEP_TOKENS = 512


class Engine:
    """Decodes requests on one model and one cache.

    Args:
        binding: the model.
        budget_bytes: the most that the cache's tensors may take; by default see `default_budget_bytes`.
        block_tokens: tokens a block.
        step_tokens: the most prompt tokens that one step computes; longer prompts are prefilled in chunks.
    """

    def __init__(
        self,
        binding: Binding,
        *,
        budget_bytes: int | None = None,
        block_tokens: int = 16,
        step_tokens: int = STEP_TOKENS,
    ) -> None:
        self.binding = binding
        self.listeners: list[Callable[[Event], None]] = []
        self._step_tokens = step_tokens
        self._requests: list[Request] = []
        self._ids = itertools.count()
        self._lock = threading.RLock()
        self._open_for_work = True
        self.cache: KVCache | None = None
        self._holdings: Holdings | None = None
        self._admission: Admission | None = None
        if binding.layers:
            layout = CacheLayout(layers=binding.layers, dtype=binding.dtype, block_tokens=block_tokens)
            if budget_bytes is None:
                budget_bytes = default_budget_bytes(layout, max_tokens=binding.max_tokens, device=binding.device)
            self.cache = KVCache(layout, budget_bytes=budget_bytes, device=binding.device)
            self._holdings = Holdings(self.cache)
            self._admission = Admission(self.cache, self._holdings, binding, step_tokens=step_tokens)

    # ---- requests ------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `CacheFull`, with nothing changed, if it can never fit beside held contexts."""
        with self._lock:
            self._check_open()
            request.use_cache = request.use_cache and self.cache is not None
            if request.use_cache and self._admission is not None:
                request.reserved = self._admission.worst_case(
                    prompt_tokens=len(request.prompt_ids),
                    new_tokens=request.max_new_tokens,
                    rows=request.max_rows,
                    context=request.context,
                )
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
        with self._lock:
            if not request.done:
                self._close(request, None)
            if request in self._requests:
                self._requests.remove(request)
            for holding in request.kept.values():
                self.release(holding)
            request.kept.clear()

    def step(self) -> None:
        """Run one forward pass over the new tokens of all live requests, and apply the decisions."""
        with self._lock:
            self._admit()
            self._renew_regimes()
            self._open_prompts()
            scheduled = schedule(self._cached_requests(), step_tokens=self._step_tokens)
            prompt_tokens = self._forward(scheduled)
            for request in self._requests:
                if request.started and not request.use_cache:
                    prompt_tokens += self._forward_uncached(request)
            decoded_rows = self._decide_and_apply()
            self._emit(StepDone(prompt_tokens, decoded_rows, self._pending_prompt_tokens(), self._blocks_in_use()))

    def _admit(self) -> None:
        """Start waiting requests, in order of arrival, as long as their worst case fits beside the others'."""
        for request in [request for request in self._requests if not request.started]:
            if request.use_cache and self._admission is not None:
                reserved = self._reserved()
                if reserved and not self._admission.fits(request.reserved, reserved):
                    return
                try:
                    # Contexts may have been taken since it was submitted; with nothing running, none will go by itself.
                    self._admission.refuse_unless_possible(request.reserved, request.describe())
                except CacheFull as error:
                    self._close(request, error)
                    self._requests.remove(request)
                    continue
            self._start(request)

    def _reserved(self) -> list[tuple[int, ...]]:
        return [request.reserved for request in self._cached_requests()]

    def _start(self, request: Request) -> None:
        token_ids = list(request.prompt_ids)
        if request.use_cache:
            row = self.open_row(token_ids, request.context)
            request.cached_prompt_tokens = row.computed
        else:
            row = Row(token_ids, None, None)
        request.rows = [row]
        request.started = True

    def shut_down(self) -> None:
        """Close every request and holding, and detach from the model."""
        with self._lock:
            for request in list(self._requests):
                self.abort(request)
            if self._holdings is not None:
                self._holdings.release_all()
            self._open_for_work = False
            self.binding.detach()

    def _check_open(self) -> None:
        if not self._open_for_work:
            raise ContextClosed("the model was detached. Attach it again.")
        self.binding.check_ready()

    # ---- contexts ------------------------------------------------------------------------------------------

    def hold(self, row: Row, *, claimed: bool) -> Holding:
        """Keep a row's tables beyond their request; they are let go of by `release`."""
        assert self._holdings is not None and row.cached is not None, "only tables can be held"
        with self._lock:
            cached, row.cached = row.cached, None
            return self._holdings.add(cached, row.regime, claimed=claimed)

    def release(self, holding: Holding) -> None:
        """Let go of held tables. May be called more than once."""
        if self._holdings is not None:
            with self._lock:
                self._holdings.release(holding)

    def fork_holding(self, holding: Holding | None, tokens: int) -> Holding | None:
        """A claimed holding of the first `tokens` tokens of another; None if its tables cannot serve."""
        if holding is None or holding.cached is None or self.cache is None or self._holdings is None:
            return None
        with self._lock:
            cut = min(tokens, holding.cached.tokens)
            if holding.regime != self.binding.regime(tokens) or not self.cache.can_truncate(holding.cached, cut):
                return None
            cached = self.cache.fork(holding.cached)
            self.cache.truncate(cached, cut)
            return self._holdings.add(cached, holding.regime, claimed=True)

    def open_row(self, token_ids: list[int], context: Holding | None, *, logits_of: int = 1) -> Row:
        """A row that starts from a context's tables if they can serve, else from the longest cached prefix.

        Args:
            logits_of: of how many last tokens logits are wanted; these are left to be computed.
        """
        assert self.cache is not None, "rows without a cache have no tables"
        regime = self.binding.regime(len(token_ids))
        reusable = len(token_ids) - logits_of
        with self._lock:
            if context is not None and context.cached is not None and context.regime == regime:
                start = min(reusable, context.cached.tokens)
                if self.cache.can_truncate(context.cached, start):
                    cached = self.cache.fork(context.cached)
                    self.cache.truncate(cached, start)
                    return Row(token_ids, cached, regime)
            return Row(token_ids, self._open(token_ids[: reusable + 1], regime), regime)

    def close_row(self, row: Row) -> None:
        """Let go of a row's tables."""
        with self._lock:
            self._drop_tables(row)

    def compute(self, row: Row, *, context: Holding | None = None, all_logits: bool = False) -> Tensor:
        """Run a row's pending tokens, in chunks, outside of any request.

        Args:
            context: what the row was opened from; its blocks are not counted twice.

        Returns:
            logits, float[pending, vocab] if `all_logits`, else float[1, vocab] of the last token.
        """
        assert self._admission is not None, "without a cache there is nothing to compute ahead"
        with self._lock:
            self._check_open()
            tokens = len(row.token_ids)
            need = self._admission.worst_case(prompt_tokens=tokens, new_tokens=0, rows=1, context=context)
            self._admission.refuse_unless_possible(need, f"a context of {tokens:,} tokens", reserved=self._reserved())
            parts = []
            while row.computed < tokens:
                count = min(tokens - row.computed, self._step_tokens)
                last = row.computed + count == tokens
                parts.append(self._forward_group([(row, count)], logits=[count if all_logits else int(last)]))
            return torch.cat(parts)

    def remember(self, row: Row) -> None:
        """Put a row's full blocks into the prefix index."""
        if self.cache is not None and row.cached is not None:
            self.cache.remember(row.cached, row.token_ids, extra_key=self._extra_key(row.regime))

    # ---- forward -------------------------------------------------------------------------------------------

    def _cached_requests(self) -> list[Request]:
        return [request for request in self._requests if request.started and request.use_cache]

    def _renew_regimes(self) -> None:
        """Rows whose rotary factors change with their length are computed anew under the new ones."""
        for request in self._cached_requests():
            for row in request.rows:
                regime = self.binding.regime(len(row.token_ids))
                if regime != row.regime:
                    self._drop_tables(row)
                    row.regime, row.logits = regime, None

    def _open_prompts(self) -> None:
        """Give tables to the next row of each request that has none; late, so that it finds what others computed."""
        for request in self._cached_requests():
            for row in request.rows:
                if row.pending > 1 and row.cached is None:
                    row.cached = self._open(row.token_ids, row.regime)
                if row.pending > 1:
                    break  # one that found all but its last token is run as a decode step, beside the next

    def _open(self, token_ids: list[int], regime: object) -> CachedSequence:
        assert self.cache is not None, "only a cache has tables"
        return self.cache.open(token_ids, extra_key=self._extra_key(regime))

    def _extra_key(self, regime: object) -> bytes:
        return self.binding.fingerprint() + repr(regime).encode()

    def _forward(self, scheduled: list[Scheduled]) -> int:
        """Run what was scheduled, one pass a rotary regime; returns how many prompt tokens were computed."""
        prompt_tokens = 0
        for regime in dict.fromkeys(item.row.regime for item in scheduled):
            together = [item for item in scheduled if item.row.regime == regime]
            ends = [item.row.computed + item.count == len(item.row.token_ids) for item in together]
            logits = self._forward_group(
                [(item.row, item.count) for item in together], logits=[int(end) for end in ends]
            )
            complete = iter(logits)
            for item, end in zip(together, ends, strict=True):
                if end:
                    item.row.logits = next(complete)
                computed = _prompt_part(item)
                item.request.computed_prompt_tokens += computed
                prompt_tokens += computed
        for request in {id(item.request): item.request for item in scheduled}.values():
            self._note_peak(request)
        return prompt_tokens

    def _forward_group(self, work: list[tuple[Row, int]], *, logits: list[int]) -> Tensor:
        """One forward pass over rows of one regime; logits of the last `logits` new tokens of each."""
        assert self.cache is not None, "only a cache has tables"
        extension = self._extend(work)
        try:
            plan = build_plan(self.cache, extension, logits=logits, device=self.binding.device)
            token_ids = [token for row, count in work for token in row.token_ids[row.computed - count : row.computed]]
            result = self.binding.forward(
                torch.tensor(token_ids, device=self.binding.device), plan, self.cache.store, regime=work[0][0].regime
            )
        except BaseException:
            self.cache.rollback(extension)
            raise
        for row, count in work:
            if count > 1:
                self.remember(row)
        self.cache.commit(extension)
        return result

    def _extend(self, work: list[tuple[Row, int]]) -> Extension:
        assert self.cache is not None, "only a cache has tables"
        requests = [(row.cached, count) for row, count in work if row.cached is not None]
        while True:
            try:
                return self.cache.extend(requests)
            except PoolExhausted as exhausted:
                if self._holdings is None or not self._holdings.release_oldest_unclaimed():
                    raise CacheFull(f"{exhausted}. Drop contexts, or raise budget_bytes.") from exhausted

    def _forward_uncached(self, request: Request) -> int:
        """Whole sequences through the model's own forward; the rows of a request are equally long."""
        rows = request.rows
        token_ids = torch.tensor([row.token_ids for row in rows], device=self.binding.device)
        for row, logits in zip(rows, self.binding.forward_uncached(token_ids), strict=True):
            row.logits = logits[-1]
        computed = len(rows) * len(request.prompt_ids)
        request.computed_prompt_tokens += computed
        return computed

    def _note_peak(self, request: Request) -> None:
        assert self.cache is not None, "only a cache has blocks"
        rows = [row.cached for row in (*request.rows, *request.finished_rows) if row.cached is not None]
        held = self.cache.blocks_held(rows)
        before = request.peak_by_group or held
        request.peak_by_group = tuple(max(pair) for pair in zip(before, held, strict=True))
        request.peak_bytes = max(request.peak_bytes, self.cache.bytes_of(held))

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
        for request in [request for request in self._requests if request.done]:
            self._requests.remove(request)
        return sum(len(host.tokens) for host in hosts)

    def _decide(self, request: Request) -> Step | None:
        """The decoder's decision; a decoder that raises closes its own request only."""
        try:
            return request.decoder.decide(torch.stack([row.logits for row in request.rows if row.logits is not None]))
        except Exception as error:
            self._close(request, error)
            return None

    def _apply(self, request: Request, step: Step, host: HostStep) -> None:
        """Fork the parents, drop what ended or has no child, hand on the tokens."""
        if any(logprob != logprob for logprob in host.logprobs):
            self._close(request, NumericalError("the model returned NaN logits, so no token can be chosen."))
            return
        request.decoder.advance(step, host)
        rows = self._children(request, host)
        request.finished_rows += [row for row, end in zip(rows, host.finished, strict=True) if end]
        request.rows = [row for row, end in zip(rows, host.finished, strict=True) if not end]
        request.streamed += zip(host.tokens, host.logprobs, strict=True)
        if request.decoder.done:
            self._close(request, None)

    def _children(self, request: Request, host: HostStep) -> list[Row]:
        """The rows after a decision. The first child of a row takes its tables, others fork them."""
        takers: dict[int, int] = {}
        for child, (parent, end) in enumerate(zip(host.parents, host.finished, strict=True)):
            if not end or request.keep_tables:
                takers.setdefault(parent, child)
        rows = []
        for child, (token, parent) in enumerate(zip(host.tokens, host.parents, strict=True)):
            row = request.rows[parent]
            wanted = row.cached is not None and (not host.finished[child] or request.keep_tables)
            tables = None
            if wanted and self.cache is not None and row.cached is not None:
                tables = row.cached if takers[parent] == child else self.cache.fork(row.cached)
            rows.append(Row([*row.token_ids, token], tables, row.regime))
        for parent, row in enumerate(request.rows):
            if parent not in takers:
                self._drop_tables(row)
        return rows

    def _close(self, request: Request, error: BaseException | None) -> None:
        """End a request. What was computed stays in the prefix index; finished rows' tables are kept for contexts.

        They are kept unclaimed: while other requests run, they may be given up for them.
        """
        request.done, request.error = True, error
        request.reserved = ()
        for row in (*request.rows, *request.finished_rows):
            if error is None:
                self.remember(row)
                key = tuple(row.token_ids)
                if row in request.finished_rows and row.cached is not None and key not in request.kept:
                    request.kept[key] = self.hold(row, claimed=False)
            self._drop_tables(row)
        request.rows.clear()
        request.finished_rows.clear()
        request.finished_at = time.perf_counter()
        self._emit(RequestFinished(request.id, failed=error is not None))

    def _drop_tables(self, row: Row) -> None:
        if row.cached is not None and self.cache is not None:
            self.cache.close(row.cached)
            row.cached = None

    # ---- what is told --------------------------------------------------------------------------------------

    def _pending_prompt_tokens(self) -> int:
        return sum(row.pending for request in self._requests for row in request.rows if row.pending > 1)

    def _blocks_in_use(self) -> int:
        if self.cache is None:
            return 0
        return max(group.pool.total - group.pool.free for group in self.cache.groups)

    def _emit(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)


def _prompt_part(item: Scheduled) -> int:
    """How many of the tokens that were just run belong to the prompt."""
    end = item.row.computed
    return max(0, min(end, len(item.request.prompt_ids)) - (end - item.count))
