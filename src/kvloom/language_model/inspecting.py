"""What the cache holds of a context: blocks, holders, bytes, keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kvloom.cache import CachedSequence, KVCache
from kvloom.cache.layout import LayerGroup
from kvloom.engine import Engine
from kvloom.engine.foreign import gathered
from kvloom.errors import InvalidRequest
from kvloom.language_model.context import Context, check_context


@dataclass(frozen=True)
class HeldBlock:
    """One block of a context.

    Attributes:
        id: its number in the pool of its layer group.
        first: position of the first token that the context has there.
        tokens: how many it has there.
        references: who holds the block: contexts, running requests, and the prefix index.
    """

    id: int
    first: int
    tokens: int
    references: int


@dataclass(frozen=True)
class HeldGroup:
    """What one layer group holds.

    Attributes:
        reach: what its layers see, in words.
        layers: indices of its layers.
        blocks: in the order of the tokens. Where a window, or a retention policy, has let go of tokens, there are gaps.
    """

    reach: str
    layers: tuple[int, ...]
    blocks: tuple[HeldBlock, ...]

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return sum(block.tokens for block in self.blocks)


@dataclass(frozen=True)
class Inspection:
    """What `LanguageModel.inspect` returns: a picture of the moment, and a way to read keys and values.

    Attributes:
        token_ids: all tokens of the context.
        cached_tokens: how many of them have been computed; see `Context.cached_tokens`.
        groups: the layer groups; empty if the cache holds nothing of the context.
        bytes_by_layer: bytes of the blocks that each layer holds, those shared with others included.
    """

    token_ids: tuple[int, ...]
    cached_tokens: int
    groups: tuple[HeldGroup, ...]
    bytes_by_layer: tuple[int, ...]
    _engine: Engine = field(repr=False)
    _context: Context = field(repr=False)

    def keys(self, layer: int, first: int = 0, end: int | None = None) -> Tensor:
        """Keys of the tokens at positions `first` up to but not including `end`, by default all that are cached.

        Returns:
            [kv_heads, tokens, head_dim], a copy in the cache's dtype; rotated, where the model rotates its keys. Of
            cross-attention they are those of the source's positions.

        Raises:
            InvalidRequest: no such layer, or the layer does not hold all of these tokens.
            ContextClosed: the context was closed meanwhile.
        """
        return self._read(layer, first, end)[0]

    def values(self, layer: int, first: int = 0, end: int | None = None) -> Tensor:
        """The values, [kv_heads, tokens, head_dim]; as `keys`."""
        return self._read(layer, first, end)[1]

    def _read(self, layer: int, first: int, end: int | None) -> tuple[Tensor, Tensor]:
        cache, cached = _held(self._engine, self._context)
        if cache is None:
            raise InvalidRequest(
                "the model keeps no cache, so it holds nothing of this context, and nothing can be shown."
            )
        return gathered(cache, cached, layer, first, end)


def inspect(engine: Engine, context: Context | None) -> Inspection:
    """What the cache of `engine` holds of `context`."""
    if context is None:
        raise InvalidRequest("there is nothing to inspect: pass a Context, such as `lm.prefill(prompt)` returns.")
    check_context(context)
    cache, cached = _held(engine, context)
    if cache is None or cached is None:
        return Inspection(context.token_ids, 0, (), (), engine, context)
    groups = tuple(_group(cache, cached, index) for index in range(len(cache.groups)))
    layout = cache.layout
    sizes = [
        len(groups[group].blocks) * layout.bytes_per_block(LayerGroup(layout.groups[group].reach, (layer,)))
        for layer, group in enumerate(layout.group_of_layer)
    ]
    return Inspection(context.token_ids, cached.tokens, groups, tuple(sizes), engine, context)


def _held(engine: Engine, context: Context) -> tuple[KVCache | None, CachedSequence | None]:
    holding = context.tables_for(engine)
    return engine.cache, None if holding is None else holding.cached


def _group(cache: KVCache, cached: CachedSequence, index: int) -> HeldGroup:
    group, references = cache.groups[index], cache.groups[index].pool.references
    blocks = [
        HeldBlock(id=block, first=first, tokens=count, references=int(references[block]))
        for block, _, count, first in cached.tables[index].runs.tolist()
    ]
    return HeldGroup(str(group.group.reach), group.group.layers, tuple(blocks))
