"""Work outside of any request: contexts are computed, forked, saved, restored, adopted, and continuations scored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from kvloom.cache.placement import Placement
from kvloom.cache.retention import Retention
from kvloom.cache.snapshot import Origin, open_snapshot
from kvloom.engine.admission import Blocks
from kvloom.engine.foreign import Pair
from kvloom.engine.guard import Guard
from kvloom.engine.holding import Holding, Restored, is_current
from kvloom.engine.keeping import Keeping
from kvloom.engine.looking import Look
from kvloom.engine.queue import Requests
from kvloom.engine.retaining import settle
from kvloom.engine.scoring import CachedScorer, Scored, score_uncached
from kvloom.errors import InvalidRequest
from kvloom.models import Binding, Media, Source, check_countable
from kvloom.models.beside import beside_of


class Contexts:
    """What stands behind users' contexts, on one engine.

    Args:
        keeping: None if the model keeps no keys and values; then there is nothing to hold, and scores are computed
            by its own forward.
        guard: of the engine.
        requests: those that run have reserved blocks, which are not to be had.
    """

    def __init__(self, binding: Binding, keeping: Keeping | None, guard: Guard, requests: Requests) -> None:
        self._binding = binding
        self._keeping = keeping
        self._guard = guard
        self._requests = requests

    def compute(
        self,
        token_ids: list[int],
        *,
        context: Holding | None = None,
        logits_of: int = 1,
        source: Source | None = None,
        media: Media | None = None,
        retention: Retention | None = None,
        look: Look | None = None,
    ) -> tuple[Tensor, Holding]:
        """Compute tokens in chunks.

        Args:
            token_ids: the whole sequence, which begins with the context's tokens.
            context: what is computed already; unchanged.
            logits_of: of how many last tokens logits are wanted.
            source: what the sequence, the context's included, is decoded from.
            media: the images and videos of the sequence.
            retention: the settled policy of the sequence.
            look: gets what is to be seen of the tokens whose logits are wanted.

        Returns:
            logits, float[logits_of, vocab], and a claimed holding of the sequence's tables.
        """
        with self._guard.working(new=True):
            check_countable(self._binding, token_ids)
            rows, admission = self._kept.rows, self._kept.admission
            tokens = len(token_ids)
            need = admission.worst_case(
                prompt_tokens=tokens, rows=1, context=context, source=source, retention=retention
            )
            self._refuse_unless_possible(need, f"a context of {tokens:,} tokens")
            row = rows.open(token_ids, context, logits_of=logits_of, source=source, media=media, retention=retention)
            row.look = look
            try:
                logits = rows.complete(row, step_tokens=admission.step_tokens, logits_of=logits_of)
                return logits, rows.hold(row, claimed=True)
            except BaseException:
                rows.close(row)
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
        with self._guard.working(new=True):
            if self._keeping is None or not use_cache:
                return score_uncached(self._binding, prompt_ids, continuations, source=source, media=media)
            for own in (prompt_ids, *continuations):
                check_countable(self._binding, own)
            admission, reserved = self._keeping.admission, self._requests.reserved
            scorer = CachedScorer(
                self._keeping.rows,
                self._keeping.cache,
                self._binding,
                prompt_ids=prompt_ids,
                continuations=continuations,
                context=context,
                source=source,
                media=media,
                step_tokens=admission.step_tokens,
                most_open_blocks=admission.free_open_blocks(reserved),
                retention=retention,
            )
            self._refuse_unless_possible(
                scorer.worst_case(admission),
                f"scoring {len(continuations):,} continuations of a {len(prompt_ids):,}-token prompt",
                remedy="or score fewer of them in a call",
            )
            return scorer.run()

    # ---- tables --------------------------------------------------------------------------------------------

    def fork(self, holding: Holding | None, tokens: int) -> Holding | None:
        """A claimed holding of the first `tokens` tokens of another; None if its tables cannot serve."""
        with self._guard.working():
            return None if holding is None else self._kept.rows.fork_holding(holding, tokens)

    def release(self, holding: Holding) -> None:
        """Let go of held tables. May be called more than once, and by the garbage collector at any moment."""
        self._guard.put_off(partial(self._kept.holdings.release, holding))

    def release_unclaimed(self, holding: Holding) -> None:
        """The same, unless a user has claimed the tables meanwhile."""
        if not holding.claimed:
            self.release(holding)

    # ---- from and to elsewhere -----------------------------------------------------------------------------

    def save(
        self,
        token_ids: Sequence[int],
        holding: Holding | None,
        path: str | os.PathLike[str],
        *,
        source: Source | None = None,
        media: Media | None = None,
        retention: Retention | None = None,
    ) -> None:
        """Write a context into a file; tokens of which no keys and values are held any more are computed first."""
        with self._guard.working(new=True):
            origin, beside = self._origin(), beside_of(source, media)
            if holding is not None and is_current(holding, self._binding):
                self._kept.transfers.save(holding, token_ids, path, origin, beside, retention)
                return
            settled = self._settled(retention, len(token_ids))
            _, computed = self.compute(list(token_ids), source=source, media=media, retention=settled)
            try:
                self._kept.transfers.save(computed, token_ids, path, origin, beside, retention)
            finally:
                self._kept.holdings.release(computed)

    def restore(self, path: str | os.PathLike[str]) -> Restored:
        """What a snapshot holds, in blocks of its own.

        Raises:
            SnapshotError: the file is missing, damaged, or of another model. CacheFull: before anything is loaded.
            InvalidRequest: the model cannot honour the policy as it is attached.
        """
        with self._guard.working(new=True):
            origin = self._origin()
            with open_snapshot(path) as snapshot:
                snapshot.check_origin(origin)
                self._settled(snapshot.retention, len(snapshot.token_ids))
                placements = snapshot.placements(self._kept.cache.layout)
                self._refuse_unless_held(placements, f"a snapshot of {len(snapshot.token_ids):,} tokens")
                return self._kept.transfers.restore(snapshot, placements)

    def _settled(self, retention: Retention | None, tokens: int) -> Retention | None:
        """The policy as a context of so many tokens applies it."""
        layout = self._kept.cache.layout
        return retention and settle(retention, self._binding, layout, prompt_tokens=tokens, new_tokens=0)

    def adopt(self, token_ids: list[int], pairs: Sequence[Pair]) -> Holding:
        """A claimed holding of keys and values that were computed elsewhere; see `foreign.read_pairs`."""
        with self._guard.working(new=True):
            placements = self._kept.transfers.placements_needed(pairs[0][0].shape[1])
            self._refuse_unless_held(placements, f"a cache for {len(token_ids):,} tokens")
            return self._kept.transfers.adopt(token_ids, pairs, placements)

    def _refuse_unless_held(self, placements: Sequence[Placement], what: str) -> None:
        """Raise `CacheFull` if a context from elsewhere does not fit."""
        need = self._kept.cache.blocks_and_open(tuple(len(own.runs) for own in placements), 1)
        self._refuse_unless_possible(need, what)

    def _refuse_unless_possible(
        self, need: Blocks, what: str, *, remedy: str = "or close contexts that are no longer needed"
    ) -> None:
        """Raise `CacheFull` if `need` does not fit beside what runs and what users hold."""
        self._kept.admission.refuse_unless_possible(
            need, what, reserved=self._requests.reserved, remedy=remedy, collect=self._guard.catch_up_now
        )

    def _origin(self) -> Origin:
        """What the keys and values of this engine depend on."""
        identity = self._binding.identity()
        if self._keeping is None or identity is None:
            raise InvalidRequest(
                "a callable keeps no keys and values that another process would know. Keep the token ids."
            )
        return Origin.of(identity.name, identity.fingerprint, self._keeping.cache.layout)

    @property
    def _kept(self) -> Keeping:
        assert self._keeping is not None, "tables are held by a model that keeps keys and values"
        return self._keeping
