"""The store that keeps full blocks as codes and scales, and open ones natively in an arena."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvloom.blocks import BlockCopy
from kvloom.cache.codec import SCALE_DTYPE, decode, encode_keys, encode_values
from kvloom.cache.landing import Landing
from kvloom.cache.layout import CacheLayout, LayerGroup
from kvloom.cache.placement import Stored
from kvloom.cache.store.native import Store, by_block, library_for, make_bounds
from kvloom.cache.store.parts import Part, Parts
from kvloom.cache.store.sealed import MixedKept, Sealed
from kvloom.native.rows import BlockSealer


class Int8Store:
    """Sealed blocks as codes, open ones in an arena.

    Attributes:
        open: the arena; its blocks are the places of `OpenBlocks`.
        bounds: as of `Store`.
        sealed_keys, sealed_values: for each layer.
    """

    def __init__(self, layout: CacheLayout, blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.open = Store(layout.of_open_blocks(), layout.open_blocks(blocks), device)
        self.bounds = make_bounds(layout, blocks, device)
        size = layout.block_tokens

        def codes(heads: int, dim: int) -> Tensor:
            return torch.empty((heads, blocks * size, dim), dtype=torch.int8, device=device)

        def scales(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=SCALE_DTYPE, device=device)

        self.sealed_keys = [
            Sealed(codes(own.kv_heads, own.key_dim), scales(own.kv_heads, blocks, own.key_dim), size)
            for own in layout.layers
        ]
        self.sealed_values = [
            Sealed(codes(own.kv_heads, own.value_dim), scales(own.kv_heads, blocks * size), 1) for own in layout.layers
        ]
        self._sealers = self._make_sealers()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors."""
        sealed = sum(own.nbytes for own in (*self.sealed_keys, *self.sealed_values))
        return self.open.allocated_bytes + sealed + sum(own.nbytes for own in self.bounds if own is not None)

    def write(self, layer: int, landing: Tensor | Landing, keys: Tensor, values: Tensor) -> tuple[MixedKept, MixedKept]:
        """Seal the blocks that new tokens fill, and put the rest of these into open blocks.

        Nothing that was there is changed, so a step that fails afterwards can be taken back.

        Args:
            keys: [kv_heads, tokens, key_dim]. values: [kv_heads, tokens, value_dim].

        Returns:
            what attention reads of keys and values.
        """
        assert isinstance(landing, Landing), "a store that seals must know which blocks are full"
        native_keys = torch.cat([self.open.keys[layer].index_select(1, landing.earlier_slots), keys], dim=1)
        native_values = torch.cat([self.open.values[layer].index_select(1, landing.earlier_slots), values], dim=1)
        if len(landing.filled_blocks):
            self._seal(layer, landing, native_keys, native_values)
        if len(landing.open_rows):
            rows = landing.open_rows
            self.open.write(layer, landing.open_slots, keys.index_select(1, rows), values.index_select(1, rows))
        return MixedKept(self.sealed_keys[layer], native_keys), MixedKept(self.sealed_values[layer], native_values)

    def write_source(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Seal the blocks of a source, the last and perhaps partial one included.

        Args:
            slots: int64[tokens], of whole blocks from their beginnings on. keys, values: [kv_heads, tokens, dim].
        """
        size = self.layout.block_tokens
        blocks = slots[::size] // size

        def padded(rows: Tensor) -> Tensor:
            # Zeros change no scale of a key's channel, which is that of its largest number.
            return pad(rows, (0, 0, 0, -rows.shape[1] % size)).view(rows.shape[0], -1, size, rows.shape[2])

        self._put(layer, blocks, padded(keys), padded(values))

    def source(self, layer: int) -> tuple[MixedKept, MixedKept]:
        """What cross-attention reads: codes alone."""
        own, other = self.open.keys[layer], self.open.values[layer]
        return MixedKept(self.sealed_keys[layer], own), MixedKept(self.sealed_values[layer], other)

    def parts(self, layer: int, held: Stored) -> Parts:
        """The same: keys and values of the open block, codes and scales of sealed ones."""
        slots, blocks = torch.from_numpy(held.sealed_slots), torch.from_numpy(held.sealed_blocks)
        keys, values = self.sealed_keys[layer], self.sealed_values[layer]
        return {
            **self.open.parts(layer, held),
            "key_scales": Part(keys.scales, blocks),
            "value_scales": Part(values.scales, slots),
            "key_codes": Part(keys.codes, slots),
            "value_codes": Part(values.codes, slots),
        }

    def copy(self, group: LayerGroup, copies: Iterable[BlockCopy]) -> None:
        """Carry out copies-on-write between places of the arena; sealed blocks are never written."""
        self.open.copy(group, copies)

    def _seal(self, layer: int, landing: Landing, keys: Tensor, values: Tensor) -> None:
        def blocks_of(tensor: Tensor) -> Tensor:
            gathered = tensor.index_select(1, landing.filled_from.flatten())
            return gathered.view(tensor.shape[0], *landing.filled_from.shape, tensor.shape[2])

        if self._sealers:
            self._sealers[layer].seal(keys, values, landing.filled_blocks, landing.filled_from)
        else:
            self._put(layer, landing.filled_blocks, blocks_of(keys), blocks_of(values))
        self._bound(layer, landing.filled_blocks)

    def _make_sealers(self) -> list[BlockSealer]:
        """The native kernels, a layer each, if there are any for tensors such as these."""
        library = library_for(self.open.keys[0]) if self.open.keys else None
        if library is None:
            return []
        both = zip(self.sealed_keys, self.sealed_values, strict=True)
        size = self.layout.block_tokens
        return [
            BlockSealer(library, (keys.codes, keys.scales), (values.codes, values.scales), size)
            for keys, values in both
        ]

    def _put(self, layer: int, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Encode the content of int64[n] blocks, [kv_heads, n, tokens, dim]."""
        sealed_keys, sealed_values = self.sealed_keys[layer], self.sealed_values[layer]
        codes, scales = encode_keys(keys)
        by_block(sealed_keys.codes, self.layout).index_copy_(1, blocks, codes)
        sealed_keys.scales.index_copy_(1, blocks, scales)
        codes, scales = encode_values(values)
        by_block(sealed_values.codes, self.layout).index_copy_(1, blocks, codes)
        by_block(sealed_values.scales, self.layout).index_copy_(1, blocks, scales)

    def _bound(self, layer: int, blocks: Tensor) -> None:
        """Note the bounds of sealed blocks: of the numbers that are read."""
        if (bounds := self.bounds[layer]) is not None:
            sealed = self.sealed_keys[layer]
            codes, scales = by_block(sealed.codes, self.layout)[:, blocks], sealed.scales[:, blocks, None]
            numbers = decode(codes, scales, self.layout.dtype)
            bounds[0, :, blocks], bounds[1, :, blocks] = numbers.amin(dim=2), numbers.amax(dim=2)

    def restored(self, layer: int, held: Stored) -> None:
        """Note what follows from parts that were written."""
        self._bound(layer, torch.from_numpy(held.sealed_blocks).to(self.sealed_keys[layer].codes.device))
