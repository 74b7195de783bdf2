"""The cache of an engine, and what goes with it."""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.cache import CacheLayout, Codec, KVCache
from kvloom.engine.admission import Admission
from kvloom.engine.holding import Holdings
from kvloom.engine.memory import total_memory_bytes
from kvloom.engine.planner import default_budget_bytes, longest_kept
from kvloom.engine.rows import CachedRows
from kvloom.engine.transfers import Transfers
from kvloom.errors import CacheFull
from kvloom.models import Binding


@dataclass(frozen=True)
class Keeping:
    """What a model that keeps keys and values is run with.

    Attributes:
        cache: where it keeps them.
        holdings: tables that outlive their request.
        admission: who may start.
        rows: sequences that are open, or run.
        transfers: of tables from and to elsewhere.
    """

    cache: KVCache
    holdings: Holdings
    admission: Admission
    rows: CachedRows
    transfers: Transfers

    @classmethod
    def on(cls, cache: KVCache, binding: Binding, *, step_tokens: int) -> Keeping:
        """All of it, on one cache."""
        holdings = Holdings(cache)
        rows = CachedRows(binding, cache, holdings)
        return cls(
            cache,
            holdings,
            Admission(cache, holdings, binding, step_tokens=step_tokens),
            rows,
            Transfers(binding, cache, rows),
        )


def make_cache(
    binding: Binding, *, budget_bytes: int | None, block_tokens: int, codec: Codec, block_bounds: bool
) -> KVCache | None:
    """A cache for the layers of a model; None if it shows none. By default the budget of `default_budget_bytes`.

    Raises `CacheFull` if the budget is below one block, or beyond the memory that there is: Linux hands out pages as
    they are written, so that else the process would be killed for it later.
    """
    if not binding.layers:
        return None
    layout = CacheLayout(
        layers=binding.layers,
        dtype=binding.dtype,
        block_tokens=block_tokens,
        block_bounds=block_bounds,
        codec=codec,
    )
    if budget_bytes is None:
        budget_bytes = default_budget_bytes(layout, max_tokens=longest_kept(binding), device=binding.device)
    elif budget_bytes > (total := total_memory_bytes(binding.device)):
        raise CacheFull(
            f"budget_bytes={budget_bytes:,} is more than the {total:,} bytes of memory that {binding.device} has. "
            "Lower budget_bytes."
        )
    return KVCache(layout, budget_bytes=budget_bytes, device=binding.device)
