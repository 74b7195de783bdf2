"""The stores: preallocated tensors for every layer, and nothing that grows.

`Store` keeps every slot in the cache's dtype. `Int8Store` keeps the slots of sealed blocks as codes and scales, and
open blocks natively in an arena, which is a small `Store` of its own.
"""

from __future__ import annotations

import torch

from kvloom.cache.layout import CacheLayout
from kvloom.cache.store.int8 import Int8Store
from kvloom.cache.store.native import Store
from kvloom.cache.store.parts import Part, Parts
from kvloom.cache.store.sealed import MixedKept, Sealed

__all__ = ["AnyStore", "Int8Store", "MixedKept", "Part", "Parts", "Sealed", "Store", "in_own_dtype", "make_store"]

AnyStore = Store | Int8Store


def in_own_dtype(store: AnyStore) -> Store:
    """A store that keeps every slot in the cache's dtype."""
    assert isinstance(store, Store), "codes are for attention that is ours"
    return store


def make_store(layout: CacheLayout, blocks: int, device: torch.device) -> AnyStore:
    """The store of a codec."""
    return Int8Store(layout, blocks, device) if layout.seals else Store(layout, blocks, device)
