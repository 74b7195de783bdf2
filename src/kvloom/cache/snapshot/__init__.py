"""Contexts to and from files.

A snapshot is one safetensors file, readable with the safetensors library:

====================  =======================================================================================
tensor                holds
====================  =======================================================================================
``token_ids``         int64[tokens], of the whole context
``positions.{group}``  int64[held], ascending: the tokens that the layer group still held
``keys.{layer}``      [kv_heads, held, key_dim] in the cache's dtype, in the order of the positions
``values.{layer}``    [kv_heads, held, value_dim], likewise
``digest``            uint8[32], BLAKE2b of the metadata and of all tensors above, in this order
====================  =======================================================================================

The metadata holds ``format``, ``version``, ``model``, ``fingerprint``, ``dtype``, ``codec``, ``block_tokens``,
``regime`` (JSON) and ``tokens`` (how many have been computed).

Blocks are not in the file, which fits any block size and budget, unless it matters how tokens lie in them. Then it
fits caches of the same block size only: under the int8 codec, because each block has scales of its own, and under a
retention policy, because policies keep and let go of blocks.

======================  =====================================================================================
tensor                  holds
======================  =====================================================================================
``runs.{group}``         int64[runs, 3]: offset in its block and tokens of each run, and 1 if int8 keeps it open
======================  =====================================================================================

A context under a policy has ``retention`` in its metadata (JSON: the policy's name and settings, the prompt that was
run last, and how many leading tokens are those of full attention). If the policy scores tokens, there are

======================  =====================================================================================
tensor                  holds
======================  =====================================================================================
``scores.{group}``       float64[held], of each token held; none for groups with a reach of their own
======================  =====================================================================================

Under the int8 codec ``keys`` and ``values`` are those of the open block, and there are

======================  =====================================================================================
tensor                  holds
======================  =====================================================================================
``key_scales.{layer}``   [kv_heads, sealed runs, key_dim]
``value_scales.{layer}``  [kv_heads, sealed tokens]
``key_codes.{layer}``    int8[kv_heads, sealed tokens, key_dim]
``value_codes.{layer}``  int8[kv_heads, sealed tokens, value_dim]
======================  =====================================================================================

A context that decodes from a source or shows images has these, too, so that it can be computed anew: tensors
``beside.{name}``, of any shape, and ``beside`` in the metadata (JSON); see `models.beside`. The group of
cross-attention holds the positions of the source.

A file is written aside and renamed, so there is the old file or the new one, whole, whatever happens.
"""

from kvloom.cache.snapshot.format import Beside, Origin, Regime, as_regime
from kvloom.cache.snapshot.reading import SnapshotReader, open_snapshot
from kvloom.cache.snapshot.writing import write_snapshot

__all__ = ["Beside", "Origin", "Regime", "SnapshotReader", "as_regime", "open_snapshot", "write_snapshot"]
