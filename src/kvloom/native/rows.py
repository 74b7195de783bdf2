"""Rows of a store's tensors, put where they belong."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvloom.native.library import Library
from kvloom.native.linear import DTYPES


class RowWriter:
    """Writes tokens into a layer's slots, by a function of the native library."""

    def __init__(self, library: Library) -> None:
        tensor = (ctypes.c_void_p, ctypes.c_int64)
        self._write = library.function(
            "kvloom_write", ctypes.c_int, *tensor, *tensor, ctypes.c_int64, ctypes.c_void_p, *(ctypes.c_int64,) * 3
        )

    def write(self, store: Tensor, slots: Tensor, rows: Tensor) -> None:
        """The same as `store.index_copy_(1, slots, rows)`.

        Args:
            store: [kv_heads, slots, dim], contiguous, of 2 or 4 bytes a number.
            slots: int64[tokens]. rows: [kv_heads, tokens, dim], of the store's dtype, with any strides.
        """
        assert rows.dtype == store.dtype, "tokens are kept in the dtype in which they come"
        if rows.stride(2) != 1:
            rows = rows.contiguous()
        self._write(
            *(store.element_size(), store.data_ptr(), store.stride(0)),
            *(rows.data_ptr(), rows.stride(0), rows.stride(1)),
            *(slots.data_ptr(), len(slots), store.shape[0], store.shape[2]),
        )


class RowGatherer:
    """Reads slots of a layer into a dense tensor, by a function of the native library."""

    def __init__(self, library: Library) -> None:
        self._gather = library.function(
            "kvloom_gather",
            *(ctypes.c_void_p, *(ctypes.c_int64,) * 3),
            *(ctypes.c_void_p, *(ctypes.c_int64,) * 2, ctypes.c_void_p, ctypes.c_int),
        )

    def gather(self, store: Tensor, slots: Tensor) -> Tensor:
        """[batch, kv_heads, tokens, dim], contiguous.

        Args:
            store: [kv_heads, slots, dim], contiguous.
            slots: int64[batch, tokens].
        """
        assert store.is_contiguous(), "read by address"
        slots = slots.contiguous()
        (heads, _, dim), (batch, tokens) = store.shape, slots.shape
        gathered = store.new_empty((batch, heads, tokens, dim))
        self._gather(
            *(store.data_ptr(), store.stride(0) * store.itemsize, heads, dim * store.itemsize),
            *(slots.data_ptr(), batch, tokens, gathered.data_ptr(), torch.get_num_threads()),
        )
        return gathered


class _Slots(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("slot_bytes", ctypes.c_int64),
    )


class SlotCopier:
    """Copies slots within some tensors, by a function of the native library.

    Args:
        tensors: [kv_heads, slots, dim] each, contiguous.
    """

    def __init__(self, library: Library, tensors: Sequence[Tensor]) -> None:
        self._copy = library.function(
            "kvloom_copy_slots", ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        )
        self._tensors = tensors
        self._arguments = (_Slots * len(tensors))(
            *(
                _Slots(own.data_ptr(), own.shape[0], own.stride(0) * own.itemsize, own.shape[2] * own.itemsize)
                for own in tensors
            )
        )

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """`tensor[:, target : target + count] = tensor[:, source : source + count]` for each tensor and copy.

        Args:
            copies: source, target and count, in slots; no target is another one's source.
        """
        numbers = np.array(copies, dtype=np.int64).reshape(-1, 3)
        threads = torch.get_num_threads()
        self._copy(self._arguments, len(self._tensors), numbers.ctypes.data, len(numbers), threads)


class _Sealed(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("codes_head_stride", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("scales_head_stride", ctypes.c_int64),
        ("block_tokens", ctypes.c_int64),
    )


class _Numbers(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("key_head_stride", "value_head_stride", "key_dim", "value_dim")),
    )


class BlockSealer:
    """Makes codes of one layer's full blocks, by a function of the native library.

    Args:
        keys, values: codes int8[kv_heads, slots, dim] of each, and scales, of keys [kv_heads, blocks, dim], of values
            [kv_heads, slots].
    """

    def __init__(
        self, library: Library, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], block_tokens: int
    ) -> None:
        self._seal = library.function(
            "kvloom_seal",
            *(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_Numbers), ctypes.c_int64),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int),
        )
        self._kept = (keys, values)
        self._arguments = (_Sealed * 2)(
            *(
                _Sealed(codes.data_ptr(), codes.stride(0), scales.data_ptr(), scales.stride(0), own)
                for (codes, scales), own in ((keys, block_tokens), (values, 0))
            )
        )

    def seal(self, keys: Tensor, values: Tensor, blocks: Tensor, source: Tensor) -> None:
        """Seal some blocks.

        Args:
            keys, values: [kv_heads, tokens, dim], contiguous, of one dtype.
            blocks: int64[n]. source: int64[n, tokens of a block], which of the tokens each block is made of.
        """
        assert keys.is_contiguous() and values.is_contiguous() and source.is_contiguous(), "read by address"
        sizes = (keys.stride(0), values.stride(0), keys.shape[2], values.shape[2])
        self._seal(
            *(DTYPES[keys.dtype], self._arguments, _Numbers(keys.data_ptr(), values.data_ptr(), *sizes), len(keys)),
            *(blocks.data_ptr(), source.data_ptr(), len(blocks), torch.get_num_threads()),
        )
