"""Floor 4: bindings. They attach to models that others define; no architecture is defined here."""

from kvloom.models.binding import Binding, Regime, check_codec_of, check_countable
from kvloom.models.callables.cached import CachedCallableBinding
from kvloom.models.callables.uncached import CallableBinding
from kvloom.models.dense.paged_cache import PagedCache
from kvloom.models.hosted.attention_interface import AttentionInterfaceBinding
from kvloom.models.hosted.base import HostedModel
from kvloom.models.hosted.cache_interface import CacheInterfaceBinding
from kvloom.models.hosted.choosing import bind
from kvloom.models.images.media import Media
from kvloom.models.operations import Operation
from kvloom.models.sources.source import Source

__all__ = [
    "AttentionInterfaceBinding",
    "Binding",
    "CacheInterfaceBinding",
    "CachedCallableBinding",
    "CallableBinding",
    "HostedModel",
    "Media",
    "Operation",
    "PagedCache",
    "Regime",
    "Source",
    "bind",
    "check_codec_of",
    "check_countable",
]
