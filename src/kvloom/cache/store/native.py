"""The store that keeps every slot in the cache's dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kvloom.blocks import BlockCopy
from kvloom.cache.landing import Landing
from kvloom.cache.layout import CacheLayout, LayerGroup
from kvloom.cache.placement import Stored
from kvloom.cache.store.parts import Part, Parts
from kvloom.native import Library, native
from kvloom.native.rows import RowGatherer, RowWriter, SlotCopier


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
        self.bounds = make_bounds(layout, blocks, device)

        library = library_for(self.keys[0]) if self.keys else None
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
            blocks = by_block(self.keys[layer], self.layout)[:, filled]
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


def by_block(tensor: Tensor, layout: CacheLayout) -> Tensor:
    """[kv_heads, slots, ...] as [kv_heads, blocks, tokens, ...], a view."""
    return tensor.view(tensor.shape[0], -1, layout.block_tokens, *tensor.shape[2:])


def make_bounds(layout: CacheLayout, blocks: int, device: torch.device) -> list[Tensor | None]:
    """For each layer the room for its blocks' bounds, see `Store`; None where the layout has none."""
    return [
        torch.empty((2, layer.kv_heads, blocks, layer.key_dim), dtype=layout.dtype, device=device)
        if layout.bounds(layout.groups[group])
        else None
        for layer, group in zip(layout.layers, layout.group_of_layer, strict=True)
    ]


def library_for(store: Tensor) -> Library | None:
    """The native kernels, if there are any and they can work on such tensors; else PyTorch's operators serve."""
    library = native() if type(store) is Tensor and store.device.type == "cpu" else None
    return library if isinstance(library, Library) and store.dtype in library.dtypes else None
