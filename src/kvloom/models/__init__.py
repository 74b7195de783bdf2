"""Floor 4: bindings. They attach to models that others define; no architecture is defined here."""

from kvloom.models.attention_interface import AttentionInterfaceBinding
from kvloom.models.binding import Binding, Regime, check_codec_of, check_countable
from kvloom.models.cache_interface import CacheInterfaceBinding
from kvloom.models.cached_callable import CachedCallableBinding
from kvloom.models.callable import CallableBinding
from kvloom.models.choosing import bind
from kvloom.models.hosted import HostedModel
from kvloom.models.media import Media
from kvloom.models.operations import Operation
from kvloom.models.paged_cache import PagedCache
from kvloom.models.source import Source

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
