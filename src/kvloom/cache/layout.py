"""From a model's shape to bytes: what a token, a block and a request cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from kvloom.blocks.runs import blocks_of
from kvloom.cache.codec import Codec, sealed_bytes
from kvloom.errors import CacheFull

# Where full blocks are sealed, one block in so many can be open at once, and these in any case: every live sequence
# and context ends in one.
BLOCKS_PER_OPEN_BLOCK = 32
LEAST_OPEN_BLOCKS = 32

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far back a layer's queries see. At most one of the three is set.

    Attributes:
        window_tokens: a query at position p sees the positions p - window + 1 to p (sliding window).
        chunk_tokens: a query at position p sees back to the start of its own chunk, p - p % chunk.
        cross: every query sees the whole source, and nothing of its own sequence (cross-attention).
    """

    window_tokens: int | None = None
    chunk_tokens: int | None = None
    cross: bool = False

    def __post_init__(self) -> None:
        limits = [self.window_tokens is not None, self.chunk_tokens is not None, self.cross]
        assert sum(limits) <= 1, "a layer has a window or chunks or attends to a source"

    @property
    def unlimited(self) -> bool:
        """Whether every past token stays visible."""
        return self.window_tokens is None and self.chunk_tokens is None and not self.cross

    def first_visible(self, positions: Positions) -> Positions:
        """int64, the lowest position that a query at each of `positions` sees."""
        if self.window_tokens is not None:
            return np.maximum(0, positions - self.window_tokens + 1)
        if self.chunk_tokens is not None:
            return positions - positions % self.chunk_tokens
        return np.zeros_like(positions)

    def first_needed(self, length: int) -> int:
        """The lowest position that a sequence of `length` tokens must keep to go on."""
        return int(self.first_visible(np.array([length]))[0])

    def __str__(self) -> str:
        if self.window_tokens is not None:
            return f"window of {self.window_tokens} tokens"
        if self.chunk_tokens is not None:
            return f"chunks of {self.chunk_tokens} tokens"
        if self.cross:
            return "cross-attention"
        return "full attention"


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What one attention layer keeps for a token: `kv_heads` keys of `key_dim` and values of `value_dim`."""

    kv_heads: int
    key_dim: int
    value_dim: int
    reach: Reach = Reach()

    @property
    def dims(self) -> tuple[int, int]:
        """Head size of keys and of values."""
        return self.key_dim, self.value_dim

    def elements_per_token(self) -> int:
        """Numbers kept for one token in this layer."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class LayerGroup:
    """Layers with the same reach: they keep the same tokens and so share tables."""

    reach: Reach
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """The shape of a model's whole cache.

    Attributes:
        layers: one shape for each attention layer, in the order of the forward pass.
        dtype: the dtype in which K and V are kept.
        block_tokens: tokens a block, 16 unless told otherwise.
        block_bounds: whether the least and largest key of each block are kept beside it (see `retention.TopBlocks`).
        codec: how full blocks are kept.
    """

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    block_tokens: int = 16
    block_bounds: bool = False
    codec: Codec = "native"

    @cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layer groups, unlimited reach first, cross-attention last."""
        reaches = sorted(
            {layer.reach for layer in self.layers}, key=lambda reach: (reach.cross, not reach.unlimited, str(reach))
        )
        return tuple(
            LayerGroup(reach, tuple(i for i, layer in enumerate(self.layers) if layer.reach == reach))
            for reach in reaches
        )

    @cached_property
    def group_of_layer(self) -> tuple[int, ...]:
        """For each layer, the index of its group."""
        owner = {layer: index for index, group in enumerate(self.groups) for layer in group.layers}
        return tuple(owner[layer] for layer in range(len(self.layers)))

    @property
    def seals(self) -> bool:
        """Whether full blocks are kept in another way than open ones, which then have an arena of their own."""
        return self.codec != "native"

    def bytes_per_block(self, group: LayerGroup) -> int:
        """Bytes of one block of `group` in the pool, over all its layers."""
        if not self.seals:
            return self._bytes_of_bounds(group) + self.native_bytes_per_block(group)
        shapes = [self.layers[layer] for layer in group.layers]
        return self._bytes_of_bounds(group) + sum(
            own.kv_heads * sealed_bytes(key_dim=own.key_dim, value_dim=own.value_dim, block_tokens=self.block_tokens)
            for own in shapes
        )

    def bytes_per_open_block(self, group: LayerGroup) -> int:
        """What a block of `group` takes besides while it is open; 0 where open blocks have no arena of their own.

        Cross-attention has no open blocks: a source comes as a whole, and nothing is ever appended to it.
        """
        return self.native_bytes_per_block(group) if self.seals and not group.reach.cross else 0

    def native_bytes_per_block(self, group: LayerGroup) -> int:
        """Bytes of one block of `group` in the cache's dtype, over all its layers."""
        elements = sum(self.layers[layer].elements_per_token() for layer in group.layers)
        return elements * self.block_tokens * self.dtype.itemsize

    def of_open_blocks(self) -> CacheLayout:
        """The layout of the arena: native, and without room for cross-attention."""
        layers = tuple(replace(own, kv_heads=0) if own.reach.cross else own for own in self.layers)
        return replace(self, layers=layers, block_bounds=False)

    def bounds(self, group: LayerGroup) -> bool:
        """Whether the blocks of `group` keep the bounds of their keys."""
        return self.block_bounds and group.reach.unlimited

    def _bytes_of_bounds(self, group: LayerGroup) -> int:
        if not self.bounds(group):
            return 0
        channels = sum(self.layers[layer].kv_heads * self.layers[layer].key_dim for layer in group.layers)
        return 2 * channels * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes while every layer still sees it; in a full block, rounded up."""
        return -(-self.bytes_per_row_of_blocks // self.block_tokens)

    @property
    def bytes_per_row_of_blocks(self) -> int:
        """Bytes of one block in every group."""
        return sum(self.bytes_per_block(group) for group in self.groups)

    @property
    def bytes_per_row_of_open_blocks(self) -> int:
        """The same of the arena of open blocks."""
        return sum(self.bytes_per_open_block(group) for group in self.groups)

    def open_blocks(self, blocks: int) -> int:
        """How many of a pool's `blocks` can be open at once."""
        return min(blocks, max(LEAST_OPEN_BLOCKS, blocks // BLOCKS_PER_OPEN_BLOCK))

    def total_bytes(self, blocks: int) -> int:
        """Bytes of a cache that has so many blocks in every group, the arena of open blocks included."""
        return blocks * self.bytes_per_row_of_blocks + self.open_blocks(blocks) * self.bytes_per_row_of_open_blocks

    def blocks_in(self, budget_bytes: int) -> int:
        """Blocks that each group's pool gets from a budget: as many as fit if all groups get the same number."""
        if not self.layers:
            return 0
        fewest, too_many = 0, budget_bytes // self.bytes_per_row_of_blocks + 1
        while too_many - fewest > 1:
            middle = (fewest + too_many) // 2
            fewest, too_many = (middle, too_many) if self.total_bytes(middle) <= budget_bytes else (fewest, middle)
        return fewest

    def pool_blocks(self, budget_bytes: int) -> int:
        """The same; raises `CacheFull` if there is not one."""
        blocks = self.blocks_in(budget_bytes)
        if blocks < 1:
            raise CacheFull(
                f"budget_bytes={budget_bytes:,} is below one block: a block of {self.block_tokens} tokens "
                f"takes {self.total_bytes(1):,} bytes. Raise budget_bytes."
            )
        return blocks

    def budget_for(self, blocks: int, *, open_blocks: int = 0) -> int:
        """The smallest budget that gives each group so many blocks, of which so many can be open at once."""
        if self.seals and open_blocks > self.open_blocks(blocks):
            few = open_blocks <= LEAST_OPEN_BLOCKS
            blocks = max(blocks, open_blocks if few else BLOCKS_PER_OPEN_BLOCK * open_blocks)
        return self.total_bytes(blocks)

    def blocks_of(self, tokens: int) -> int:
        """Blocks that `tokens` consecutive tokens need in a group that keeps them all."""
        return blocks_of(tokens, self.block_tokens)
