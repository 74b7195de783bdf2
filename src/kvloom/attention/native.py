"""Attention over the paged store by the native kernels: `native/src/attention.cpp`.

A row's additions follow one order, which the positions of the tokens that its sequence holds give: position p is column
p % 64 of block p // 64, four blocks are a partition, blocks follow each other within a partition and partitions are
merged, all in ascending order. What a row does not see weighs an exact zero. So its bits do not depend on the batch,
the chunks in which a prompt ran, the place of blocks in the pool, who shares them, or the number of threads.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.attention.plan import GroupPlan
from kvloom.attention.schedule import Schedule, Scheduler
from kvloom.attention.source import behind_its_runs
from kvloom.attention.turn import Turn
from kvloom.cache import AnyStore, Int8Store, MixedKept, Sealed
from kvloom.native import Library, native
from kvloom.native.linear import DTYPES

SET_ROWS = 128
"""Query rows that go through a block of keys together: enough to make laying it out cheap, few enough for the cache."""


class NativeAttention:
    """The kernels of one library."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._scheduler = Scheduler(library)
        shape = (ctypes.c_int64,) * 4
        tensor = (ctypes.c_void_p, ctypes.c_int64)
        self._attend = library.function(
            "kvloom_attend",
            *(ctypes.c_int, ctypes.c_void_p, *shape),
            *(*tensor, ctypes.c_int64, *tensor, *tensor),
            *(*(ctypes.c_void_p,) * 5, ctypes.c_float, ctypes.c_float),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
        )
        self._bytes = library.function(
            "kvloom_attention_bytes",
            *(ctypes.c_int, ctypes.c_void_p, *shape, ctypes.c_int),
            restype=ctypes.c_int64,
        )

    def attend(
        self,
        queries: Tensor,
        keys: Tensor | MixedKept,
        values: Tensor | MixedKept,
        plan: GroupPlan,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        turn: Turn | None = None,
        bounds: Tensor | None = None,
    ) -> Tensor:
        """The same as `reference.attend`, see there for shapes; and adds what the plan wants observed.

        Args:
            bounds: as of `torch_ops.attend`.
        """
        sealed: npt.NDArray[np.int64] | None = None
        if isinstance(keys, MixedKept):
            assert isinstance(values, MixedKept), "keys and values are kept alike"
            sealed = np.array(sealed_facts(keys.sealed, values.sealed), dtype=np.int64)
            keys, values = keys.native, values.native
        assert isinstance(values, Tensor), "keys and values are kept alike"
        assert queries.dtype == keys.dtype == values.dtype, "the kernels read all three as one dtype"
        tokens, heads, key_dim = queries.shape
        kv_heads, value_dim = keys.shape[0], values.shape[2]
        group = heads // kv_heads
        if queries.stride(2) != 1:
            queries = queries.contiguous()
        if sinks is not None:
            sinks = sinks.float().contiguous()
        schedule = self.schedule(plan, max(1, SET_ROWS // group))
        bounded = np.array(bounds_facts(bounds, plan.block_tokens)) if bounds is not None and plan.chooses else None
        output = queries.new_empty(tokens, heads, value_dim)
        threads = torch.get_num_threads()
        what = (DTYPES[queries.dtype], schedule.numbers.ctypes.data, kv_heads, group, key_dim, value_dim)
        self._attend(
            *what,
            *(queries.data_ptr(), queries.stride(0), queries.stride(1)),
            *(keys.data_ptr(), keys.stride(0)),
            *(values.data_ptr(), values.stride(0)),
            None if sealed is None else sealed.ctypes.data,
            *(None if sinks is None else sinks.data_ptr(), self.turn(schedule, turn)),
            *(None if bounded is None else bounded.ctypes.data, plan.observed),
            *(scale, softcap or 0.0),
            *(output.data_ptr(), schedule.reserve(self._bytes(*what, threads)), threads),
        )
        return output

    def schedule(self, plan: GroupPlan, set_tokens: int) -> Schedule:
        """The schedule of a plan, made when it is first wanted."""
        key = set_tokens, self.library.target
        if key not in plan.schedules:
            sources = [behind_its_runs(own) for own in plan.sources] if plan.reach.cross else plan.sources
            plan.schedules[key] = self._scheduler.schedule(
                sources, plan.reach, block_tokens=plan.block_tokens, set_tokens=set_tokens
            )
        return plan.schedules[key]

    def turn(self, schedule: Schedule, turn: Turn | None) -> int | None:
        """The address of what a layer's queries are turned back by; None if none is."""
        return self._scheduler.turn(schedule, turn)

    def schedule_for(self, plan: GroupPlan, *, heads: int, kv_heads: int) -> Schedule:
        """The schedule of a plan for layers with so many heads."""
        return self.schedule(plan, max(1, SET_ROWS // (heads // kv_heads)))

    def bytes_for(self, schedule: Schedule, dtype: torch.dtype, *, heads: int, kv_heads: int, dim: int) -> int:
        """How many bytes of memory such a layer's attention works in."""
        what = (DTYPES[dtype], schedule.numbers.ctypes.data, kv_heads, heads // kv_heads, dim, dim)
        wanted: int = self._bytes(*what, torch.get_num_threads())
        return wanted


def sealed_facts(*kept: Sealed) -> list[int]:
    """Of each the fields of `struct Sealed` in `native/src/attention.h`."""
    facts: list[int] = []
    for own in kept:
        codes, scales = own.codes, own.scales
        by_block = own.block_tokens if scales.dim() == 3 else 0
        facts += [codes.data_ptr(), codes.stride(0), scales.data_ptr(), scales.stride(0), by_block]
    return facts


def bounds_facts(bounds: Tensor, block_tokens: int) -> list[int]:
    """The fields of `struct Bounds`, there too, of a layer's [2, kv_heads, blocks, key_dim]."""
    return [bounds.data_ptr(), bounds.shape[2], block_tokens]


@cache
def kernels(library: Library) -> NativeAttention:
    """The kernels of a library, bound once."""
    return NativeAttention(library)


def kernels_for(store: AnyStore) -> NativeAttention | None:
    """The kernels of this process, if there are any and they can work on a store's tensors."""
    tensor = (store.open if isinstance(store, Int8Store) else store).keys[0]
    library = native() if type(tensor) is Tensor and tensor.device.type == "cpu" else None
    return kernels(library) if isinstance(library, Library) and tensor.dtype in library.dtypes else None


def attend(
    queries: Tensor,
    keys: Tensor | MixedKept,
    values: Tensor | MixedKept,
    plan: GroupPlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    turn: Turn | None = None,
    bounds: Tensor | None = None,
) -> Tensor:
    """The same as `torch_ops.attend`, by this process's native library, which must be there."""
    library = native()
    assert isinstance(library, Library), "whoever calls has seen that the kernels are there"
    own = kernels(library)
    return own.attend(queries, keys, values, plan, scale=scale, softcap=softcap, sinks=sinks, turn=turn, bounds=bounds)
