"""The store: one preallocated pair of tensors a layer, and nothing that grows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kvloom.blocks import BlockCopy
from kvloom.cache.layout import CacheLayout, LayerGroup
from kvloom.native import Library, native
from kvloom.native.rows import RowWriter, SlotCopier


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
        self.bounds = [
            torch.empty((2, layer.kv_heads, blocks, layer.key_dim), dtype=layout.dtype, device=device)
            if layout.bounds(layout.groups[group])
            else None
            for layer, group in zip(layout.layers, layout.group_of_layer, strict=True)
        ]

        self._writer = _writer(self.keys[0]) if self.keys else None
        self._copiers: dict[LayerGroup, SlotCopier] = {}

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors."""
        bounds = (tensor for tensor in self.bounds if tensor is not None)
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, *bounds))

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put new tokens into their slots.

        Args:
            slots: int64[tokens].
            keys: [kv_heads, tokens, key_dim]. values: [kv_heads, tokens, value_dim].
        """
        for store, rows in ((self.keys[layer], keys), (self.values[layer], values)):
            if self._writer is None:
                store.index_copy_(1, slots, rows)
            else:
                self._writer.write(store, slots, rows)
        if (bounds := self.bounds[layer]) is not None:
            size = self.layout.block_tokens
            filled = slots[slots % size == size - 1] // size
            blocks = self.keys[layer].view(len(keys), -1, size, keys.shape[-1])[:, filled]
            bounds[0, :, filled], bounds[1, :, filled] = blocks.amin(dim=2), blocks.amax(dim=2)

    def gather(self, layer: int, slots: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some slots, [batch, kv_heads, tokens, dim].

        Args:
            slots: int64[batch, tokens]; or a slice, whose slots are seen as a view of batch 1, without a copy.
        """
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(slots, slice):
            return keys[None, :, slots], values[None, :, slots]
        batch, tokens = slots.shape
        flat = slots.flatten()

        def rows(tensor: Tensor) -> Tensor:
            return tensor.index_select(1, flat).view(tensor.shape[0], batch, tokens, -1).transpose(0, 1)

        return rows(keys), rows(values)

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


def _writer(store: Tensor) -> RowWriter | None:
    """The native kernel, if there is one and it can work on tensors such as this; None if PyTorch's operator serves."""
    library = native() if type(store) is Tensor and store.device.type == "cpu" else None
    return RowWriter(library) if isinstance(library, Library) and store.dtype in library.dtypes else None
