"""Rows of a tensor, put where they belong."""

from __future__ import annotations

import ctypes

from torch import Tensor

from kvloom.native.library import Library


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
