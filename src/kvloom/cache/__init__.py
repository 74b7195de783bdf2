"""Floor 2: the tensors behind the blocks, and the facade that keeps blocks and tensors in step."""

from kvloom.cache.cache import CachedSequence, Extension, KVCache
from kvloom.cache.layout import CacheLayout, LayerGroup, LayerShape, Reach
from kvloom.cache.sources import adopt_source, place_source, remember_source
from kvloom.cache.store import Store

__all__ = [
    "CacheLayout",
    "CachedSequence",
    "Extension",
    "KVCache",
    "LayerGroup",
    "LayerShape",
    "Reach",
    "Store",
    "adopt_source",
    "place_source",
    "remember_source",
]
