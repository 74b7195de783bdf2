"""Retention: policies that keep some tokens of a sequence and let go of others.

`base` is the interface: what a policy needs to observe, how it scores, what it keeps. Each policy has a file of its
own, which names its source, where it departs from it, and what it loses.
"""

from kvloom.cache.retention.base import Held, Keep, Retained, Retention, Scores
from kvloom.cache.retention.compressed_prompt import CompressedPrompt
from kvloom.cache.retention.described import described, policy_of
from kvloom.cache.retention.heavy_hitters import HeavyHitters
from kvloom.cache.retention.last_query import LastQuery
from kvloom.cache.retention.sight import Part, Sight
from kvloom.cache.retention.sink_window import SinkWindow
from kvloom.cache.retention.top_blocks import TopBlocks

__all__ = [
    "CompressedPrompt",
    "HeavyHitters",
    "Held",
    "Keep",
    "LastQuery",
    "Part",
    "Retained",
    "Retention",
    "Scores",
    "Sight",
    "SinkWindow",
    "TopBlocks",
    "described",
    "policy_of",
]
