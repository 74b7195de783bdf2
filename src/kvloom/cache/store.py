"""The stores: preallocated tensors for every layer, and nothing that grows.

`Store` keeps every slot in the cache's dtype. `Int8Store` keeps the slots of sealed blocks as codes and scales, and
open blocks natively in an arena, which is a small `Store` of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvloom.blocks import BlockCopy
from kvloom.cache.codec import SCALE_DTYPE, decode, encode_keys, encode_values
from kvloom.cache.landing import Landing
from kvloom.cache.layout import CacheLayout, LayerGroup
from kvloom.cache.placement import Stored
from kvloom.native import Library, native
from kvloom.native.rows import BlockSealer, RowGatherer, RowWriter, SlotCopier


@dataclass(frozen=True)
class Part:
    """Some rows of one of a store's tensors, of the second dimension."""

    tensor: Tensor
    rows: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what `read` returns."""
        return (self.tensor.shape[0], len(self.rows), *self.tensor.shape[2:])

    def read(self) -> Tensor:
        """A copy, on the CPU."""
        return self.tensor.index_select(1, self.rows.to(self.tensor.device)).cpu()

    def write(self, content: Tensor) -> None:
        """Put `content` there."""
        self.tensor.index_copy_(1, self.rows.to(self.tensor.device), content.to(self.tensor.device))


Parts = dict[str, Part]


class Store:
    """Keys and values of every slot.

    `keys[layer]` and `values[layer]` have the shape [kv_heads, slots, head_dim]: heads come first, so that a
    contiguous run of slots is a plain view for each head, which a matrix product reads without a gather.
    `bounds[layer]`, [2, kv_heads, blocks, key_dim], holds the least and the largest value of each channel over the keys
    of a full block; None where the layout has none.
    """

    def __init__(self, layout: CacheLayout, blocks: int, device: torch.device) -> None:
        slots = blocks * layout.block_tokens
        self.layout = layout

        # Uninitialised on purpose: the operating system hands out pages as they are first written.
        def allocate(heads: int, dim: int) -> Tensor:
            return torch.empty((heads, slots, dim), dtype=layout.dtype, device=device)

        self.keys = [allocate(layer.kv_heads, layer.key_dim) for layer in layout.layers]
        self.values = [allocate(layer.kv_heads, layer.value_dim) for layer in layout.layers]
        self.bounds = _bounds(layout, blocks, device)

        library = _library_for(self.keys[0]) if self.keys else None
        self._writer = None if library is None else RowWriter(library)
        self._gatherer = None if library is None else RowGatherer(library)
        self._copiers: dict[LayerGroup, SlotCopier] = {}

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors."""
        bounds = (tensor for tensor in self.bounds if tensor is not None)
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, *bounds))

    def write(self, layer: int, slots: Tensor | Landing, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put new tokens into their slots.

        Args:
            slots: int64[tokens].
            keys: [kv_heads, tokens, key_dim]. values: [kv_heads, tokens, value_dim].

        Returns:
            what attention reads: all keys and all values of the layer.
        """
        assert isinstance(slots, Tensor), "a landing is for a store that seals"
        for store, rows in ((self.keys[layer], keys), (self.values[layer], values)):
            if self._writer is None:
                store.index_copy_(1, slots, rows)
            else:
                self._writer.write(store, slots, rows)
        self._bound(layer, slots)
        return self.keys[layer], self.values[layer]

    def write_source(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put a source's keys and values, [kv_heads, tokens, dim], into int64[tokens] slots."""
        self.write(layer, slots, keys, values)

    def source(self, layer: int) -> tuple[Tensor, Tensor]:
        """What cross-attention reads: all keys and all values of the layer."""
        return self.keys[layer], self.values[layer]

    def _bound(self, layer: int, slots: Tensor) -> None:
        """Note the bounds of the blocks whose last slot is among `slots`."""
        if (bounds := self.bounds[layer]) is not None:
            size = self.layout.block_tokens
            filled = slots[slots % size == size - 1] // size
            blocks = _by_block(self.keys[layer], self.layout)[:, filled]
            bounds[0, :, filled], bounds[1, :, filled] = blocks.amin(dim=2), blocks.amax(dim=2)

    def gather(self, layer: int, slots: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some slots, [batch, kv_heads, tokens, dim], contiguous where they are copied.

        Args:
            slots: int64[batch, tokens]; or a slice, whose slots are seen as a view of batch 1, without a copy.
        """
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(slots, slice):
            return keys[None, :, slots], values[None, :, slots]

        def rows(tensor: Tensor) -> Tensor:
            if self._gatherer is not None:
                return self._gatherer.gather(tensor, slots)
            # As a cache of transformers lies, which some models take a view of.
            gathered = tensor.new_empty((len(slots), tensor.shape[0], slots.shape[1], tensor.shape[2]))
            for own, row in zip(slots, gathered, strict=True):
                torch.index_select(tensor, 1, own, out=row)
            return gathered

        return rows(keys), rows(values)

    def restored(self, layer: int, held: Stored) -> None:
        """Note what follows from parts that were written."""
        self._bound(layer, torch.from_numpy(held.native_slots).to(self.keys[layer].device))

    def parts(self, layer: int, held: Stored) -> Parts:
        """What is kept of a table's tokens in one layer, by name, as a snapshot saves it; gathered when read."""
        slots = torch.from_numpy(held.native_slots)
        return {
            "keys": Part(self.keys[layer], slots),
            "values": Part(self.values[layer], slots),
        }

    def copy(self, group: LayerGroup, copies: Iterable[BlockCopy]) -> None:
        """Carry out the copies-on-write of one group's tables."""
        size = self.layout.block_tokens
        slots = [(c.source * size + c.offset, c.target * size + c.offset, c.count) for c in copies]
        if slots and (copier := self._copier(group)) is not None:
            copier.copy(slots)
            return
        for source, target, count in slots:
            for tensor in self._tensors(group):
                tensor[:, target : target + count] = tensor[:, source : source + count]

    def _tensors(self, group: LayerGroup) -> list[Tensor]:
        return [tensor for layer in group.layers for tensor in (self.keys[layer], self.values[layer])]

    def _copier(self, group: LayerGroup) -> SlotCopier | None:
        """The native kernel for a group's tensors, bound when first wanted; None if PyTorch's operators serve."""
        if self._writer is not None and group not in self._copiers:
            library = native()
            assert isinstance(library, Library), "the writer is of a library"
            self._copiers[group] = SlotCopier(library, self._tensors(group))
        return self._copiers.get(group)


@dataclass(frozen=True)
class Sealed:
    """The sealed keys, or values, of one layer.

    Attributes:
        codes: int8[kv_heads, slots, dim].
        scales: of keys [kv_heads, blocks, dim], of values [kv_heads, slots].
        block_tokens: slots that share a row of the keys' scales; 1 if each slot has a scale of its own.
    """

    codes: Tensor
    scales: Tensor
    block_tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def read(self, slots: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """[kv_heads, n, dim]: the numbers behind n slots, a slice or int64[n]."""
        if isinstance(slots, slice):
            return self._read_run(slots.start, slots.stop, dtype)
        scales = self.scales.index_select(1, slots // self.block_tokens)
        return decode(self.codes.index_select(1, slots), scales.view(*scales.shape[:2], -1), dtype)

    def read_by_head(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """[kv_heads, n, dim]: the same of each head's own slots, int64[kv_heads, n, 1]."""
        codes = self.codes.gather(1, slots.expand(-1, -1, self.codes.shape[-1]))
        scales = self.scales.unsqueeze(-1) if self.scales.dim() == 2 else self.scales
        scales = scales.gather(1, (slots // self.block_tokens).expand(-1, -1, scales.shape[-1]))
        return decode(codes, scales, dtype)

    def _read_run(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Consecutive slots, without gathering them: whole blocks are decoded, and cut."""
        heads, _, dim = self.codes.shape
        first, end = start // self.block_tokens, -(-stop // self.block_tokens)
        codes = self.codes.view(heads, -1, self.block_tokens, dim)[:, first:end]
        scales = self.scales[:, first:end].reshape(heads, end - first, 1, -1)
        before = first * self.block_tokens
        return decode(codes, scales, dtype).flatten(1, 2)[:, start - before : stop - before]


@dataclass(frozen=True)
class MixedKept:
    """What attention reads of one layer in one step: keys, or values.

    Attributes:
        sealed: of all sealed blocks, those that this step fills included.
        native: [kv_heads, n, dim], in the order of `Landing`: what the blocks that the step writes held before it, then
            its new tokens.
    """

    sealed: Sealed
    native: Tensor

    @property
    def shape(self) -> torch.Size:
        """[kv_heads, slots, dim], as of a native store's tensor."""
        return self.sealed.codes.shape


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
        self.bounds = _bounds(layout, blocks, device)
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

        def by_block(rows: Tensor) -> Tensor:
            # Zeros change no scale of a key's channel, which is that of its largest number.
            return pad(rows, (0, 0, 0, -rows.shape[1] % size)).view(rows.shape[0], -1, size, rows.shape[2])

        self._put(layer, blocks, by_block(keys), by_block(values))

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
        library = _library_for(self.open.keys[0]) if self.open.keys else None
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
        _by_block(sealed_keys.codes, self.layout).index_copy_(1, blocks, codes)
        sealed_keys.scales.index_copy_(1, blocks, scales)
        codes, scales = encode_values(values)
        _by_block(sealed_values.codes, self.layout).index_copy_(1, blocks, codes)
        _by_block(sealed_values.scales, self.layout).index_copy_(1, blocks, scales)

    def _bound(self, layer: int, blocks: Tensor) -> None:
        """Note the bounds of sealed blocks: of the numbers that are read."""
        if (bounds := self.bounds[layer]) is not None:
            sealed = self.sealed_keys[layer]
            codes, scales = _by_block(sealed.codes, self.layout)[:, blocks], sealed.scales[:, blocks, None]
            numbers = decode(codes, scales, self.layout.dtype)
            bounds[0, :, blocks], bounds[1, :, blocks] = numbers.amin(dim=2), numbers.amax(dim=2)

    def restored(self, layer: int, held: Stored) -> None:
        """Note what follows from parts that were written."""
        self._bound(layer, torch.from_numpy(held.sealed_blocks).to(self.sealed_keys[layer].codes.device))


def _by_block(tensor: Tensor, layout: CacheLayout) -> Tensor:
    """[kv_heads, slots, ...] as [kv_heads, blocks, tokens, ...], a view."""
    return tensor.view(tensor.shape[0], -1, layout.block_tokens, *tensor.shape[2:])


def _bounds(layout: CacheLayout, blocks: int, device: torch.device) -> list[Tensor | None]:
    return [
        torch.empty((2, layer.kv_heads, blocks, layer.key_dim), dtype=layout.dtype, device=device)
        if layout.bounds(layout.groups[group])
        else None
        for layer, group in zip(layout.layers, layout.group_of_layer, strict=True)
    ]


AnyStore = Store | Int8Store


def in_own_dtype(store: AnyStore) -> Store:
    """A store that keeps every slot in the cache's dtype."""
    assert isinstance(store, Store), "codes are for attention that is ours"
    return store


def make_store(layout: CacheLayout, blocks: int, device: torch.device) -> AnyStore:
    """The store of a codec."""
    return Int8Store(layout, blocks, device) if layout.seals else Store(layout, blocks, device)


def _library_for(store: Tensor) -> Library | None:
    """The native kernels, if there are any and they can work on such tensors; else PyTorch's operators serve."""
    library = native() if type(store) is Tensor and store.device.type == "cpu" else None
    return library if isinstance(library, Library) and store.dtype in library.dtypes else None
