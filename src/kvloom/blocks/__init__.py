"""Floor 1: blocks, tables and the prefix index. Integers only: no tensor, no model.

`pool` counts who holds which block, `table` says which blocks hold a sequence, `prefix` finds blocks that
already hold the beginning of another one.
"""

from kvloom.blocks.open import OpenBlocks
from kvloom.blocks.pool import BlockPool, PoolExhausted
from kvloom.blocks.prefix import Mark, PrefixIndex, PrefixMatch, chain_digests
from kvloom.blocks.table import Append, BlockCopy, Table

__all__ = [
    "Append",
    "BlockCopy",
    "BlockPool",
    "Mark",
    "OpenBlocks",
    "PoolExhausted",
    "PrefixIndex",
    "PrefixMatch",
    "Table",
    "chain_digests",
]
