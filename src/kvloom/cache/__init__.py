"""Floor 2: the tensors behind the blocks, and the facade that keeps blocks and tensors in step."""

from kvloom.cache.cache import KVCache
from kvloom.cache.codec import CODECS, Codec, check_codec
from kvloom.cache.landing import Landing, Written
from kvloom.cache.layout import CacheLayout, LayerGroup, LayerShape, Reach
from kvloom.cache.sequence import CachedSequence, Extension
from kvloom.cache.sources import adopt_source, place_source, remember_source
from kvloom.cache.store import AnyStore, Int8Store, MixedKept, Sealed, Store, in_own_dtype
from kvloom.cache.turns import Turns

__all__ = [
    "CODECS",
    "AnyStore",
    "CacheLayout",
    "CachedSequence",
    "Codec",
    "Extension",
    "Int8Store",
    "KVCache",
    "Landing",
    "LayerGroup",
    "LayerShape",
    "MixedKept",
    "Reach",
    "Sealed",
    "Store",
    "Turns",
    "Written",
    "adopt_source",
    "check_codec",
    "in_own_dtype",
    "place_source",
    "remember_source",
]
