"""A context: a user's immutable handle on cached tokens."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import NoReturn

from transformers import DynamicCache

from kvloom.cache.retention import Retention
from kvloom.engine import Engine
from kvloom.engine.foreign import exported
from kvloom.engine.holding import Holding
from kvloom.errors import ContextClosed, InvalidRequest
from kvloom.exclusive import uninterrupted
from kvloom.models import Media, Source
from kvloom.units import counted


class Context:
    """Tokens whose keys and values are kept, to be continued any number of times.

    A context never changes: what continues it works on a fork, which shares its blocks and copies at most one,
    when it writes there. Its blocks are freed when the context is dropped, or by `close`.

    Attributes:
        token_ids: all of them, also those that a retention policy has let go of.
        media: its images and videos; None if it is text.
        retention: the policy that it was computed under, and that whatever continues it is under; None without one.
    """

    def __init__(
        self,
        engine: Engine,
        token_ids: Sequence[int],
        holding: Holding | None,
        retention: Retention | None = None,
        *,
        source: Source | None = None,
        media: Media | None = None,
    ) -> None:
        self.source = source
        self.media = media
        self.token_ids = tuple(token_ids)
        self.retention = retention
        self._engine = engine
        self._holding = holding
        self._closed = False
        if holding is not None:
            holding.claimed, holding.owner = True, weakref.ref(self)
            self._finalizer = weakref.finalize(self, engine.contexts.release, holding)

    @property
    def tokens(self) -> int:
        """How many tokens the context stands for."""
        return len(self.token_ids)

    @property
    def cached_tokens(self) -> int:
        """How many of them have keys and values in the cache; the others are computed when they are needed.

        The last token of a generation is such a one: it was chosen, but never run.
        """
        cached = None if self._holding is None else self._holding.cached
        return 0 if cached is None else cached.tokens

    @property
    def blocks(self) -> int:
        """Blocks held, those shared with other contexts included; in the layer group that holds most."""
        cached = None if self._holding is None else self._holding.cached
        return 0 if cached is None else max(len(table.runs) for table in cached.tables)

    def fork(self) -> Context:
        """Another context of the same tokens; it shares the blocks and may outlive this one."""
        return self._cut(self.tokens)

    def truncate(self, tokens: int) -> Context:
        """A context of the first `tokens` tokens. This one is unchanged.

        Layers with a sliding window, or a retention policy, may have let go of what the shorter context needs; then its
        tokens are computed anew when it is used.

        Raises:
            InvalidRequest: there are fewer tokens, or the cut would go through an image.
        """
        whole = isinstance(tokens, int) and not isinstance(tokens, bool)
        if not whole or not 0 < tokens <= self.tokens:
            raise InvalidRequest(
                f"a context cannot be cut to {tokens!r} tokens. Pass 1 to {self.tokens}, which is how many it has."
            )
        broken = None if self.media is None else self.media.split_by(tokens)
        if broken is not None:
            first, last = int(broken.places[0]), int(broken.places[-1])
            raise InvalidRequest(
                f"a cut at {tokens} goes through {broken}. Cut at {first} or before, or at {last + 1} or after."
            )
        return self._cut(tokens)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the context into a file, for `LanguageModel.restore`, in this process or another.

        The file holds what the cache holds: tokens whose keys and values were never computed (`cached_tokens` says
        how many were) are computed when they are needed. If the cache holds nothing of the context any more, it is
        computed before it is written. A file that is there already is replaced once the new one is complete. The source
        of an encoder-decoder model, and the pixels of images, are in the file.

        Raises:
            InvalidRequest: there is no such folder, the model keeps no keys and values (a callable), or the context is
                under a retention policy of your own.
            ContextClosed: the context was closed. An `OSError` (no space, no permission) passes through.
        """
        holding = self.tables_for(self._engine)
        self._engine.contexts.save(
            self.token_ids, holding, path, source=self.source, media=self.media, retention=self.retention
        )

    def export_cache(self) -> DynamicCache:
        """Keys and values as a `DynamicCache` of transformers; copies, of a batch of one.

        It holds `cached_tokens` tokens: of a generation all but the last, as a cache of transformers' own.
        `LanguageModel.import_cache` is the way back.

        Raises:
            InvalidRequest: nothing is cached, or a window or a retention policy has let go of tokens.
            ContextClosed: the context was closed.
        """
        holding = self.tables_for(self._engine)
        if self._engine.cache is None or holding is None:
            raise InvalidRequest("the cache holds nothing of this context. Prefill its token_ids.")
        if self.source is not None:
            raise InvalidRequest("a context of an encoder-decoder model cannot be exported. Keep the context itself.")
        return exported(self._engine.cache, holding.cached)

    def close(self) -> None:
        """Free the blocks now. The context cannot be used afterwards."""
        self._closed = True
        if self._holding is not None:
            self._finalizer()

    def tables_for(self, engine: Engine) -> Holding | None:
        """What stands behind the context, for the engine that made it."""
        if self._closed:
            raise ContextClosed("the context was closed. Prefill it again.")
        if engine is not self._engine:
            raise ContextClosed("the context belongs to another model. Prefill it on this one.")
        return self._holding

    def _cut(self, tokens: int) -> Context:
        holding = self.tables_for(self._engine)
        media = None if self.media is None else self.media.cut(tokens)
        with uninterrupted():  # between what is held and its holder
            forked = self._engine.contexts.fork(holding, tokens)
            return Context(
                self._engine, self.token_ids[:tokens], forked, self.retention, source=self.source, media=media
            )

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.cached_tokens:,} cached, {counted(self.blocks, 'block')}"
        return f"Context({counted(self.tokens, 'token')}, {state})"

    def __copy__(self) -> Context:
        return self.fork()

    def __deepcopy__(self, _: object) -> Context:
        return self.fork()

    def __reduce__(self) -> NoReturn:
        raise InvalidRequest(
            "a context cannot be pickled: its keys and values lie in this process. Keep it with `context.save(path)` "
            "and `lm.restore(path)`, or pass on its `token_ids`."
        )


def check_context(context: object) -> None:
    """Refuse what is no context, with a hint for what holds one."""
    if context is None or isinstance(context, Context):
        return
    hint = " Pass its `.context`." if hasattr(context, "context") else ""
    raise InvalidRequest(f"`context` must be a Context; got {type(context).__name__}.{hint}")
