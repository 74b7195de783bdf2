"""What is in a snapshot, as writing and reading agree on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.cache.cache import KVCache
from kvloom.cache.layout import CacheLayout
from kvloom.cache.placement import Placement
from kvloom.cache.sequence import CachedSequence
from kvloom.cache.store import Part
from kvloom.units import dtype_name

FORMAT = "kvloom-snapshot"
VERSION = "2"
DIGEST_BYTES = 32
BESIDE = "beside."

Regime = tuple[int, ...] | None
"""A rotary regime as a file can hold it."""


@dataclass(frozen=True)
class Beside:
    """What a sequence stands on besides its tokens, for a floor that knows what it is.

    Attributes:
        facts: what JSON can hold.
        tensors: by name.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What keys and values depend on besides the tokens; a snapshot is restored where all of it is the same.

    Attributes:
        model: what it is, for messages.
        fingerprint: digest of the model's config and weights.
        dtype: of keys and values.
        codec: how they are kept.
        block_tokens: of the blocks. It need not be the same if the codec seals none and no policy keeps some.
    """

    model: str
    fingerprint: str
    dtype: str
    codec: str = "native"
    block_tokens: int = 16

    @classmethod
    def of(cls, model: str, fingerprint: str, layout: CacheLayout) -> Origin:
        """The origin of what a cache of that layout holds of a model."""
        return cls(
            model=model,
            fingerprint=fingerprint,
            dtype=dtype_name(layout.dtype),
            codec=layout.codec,
            block_tokens=layout.block_tokens,
        )


def as_regime(regime: object) -> Regime:
    """A rotary regime as a file can hold it; regimes of all bindings are None or tuples of integers."""
    found = read_regime(regime)
    assert found == regime, f"a regime is None or a tuple of integers, not {regime!r}"
    return found


def read_regime(value: object) -> Regime:
    """What a file says of a regime; raises `ValueError` where that cannot be one."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(type(own) is int for own in value):
        raise ValueError(f"{value!r} is not a rotary regime")
    return tuple(value)


def contents_of(
    cache: KVCache, sequence: CachedSequence, token_ids: Sequence[int], beside: Beside
) -> list[tuple[str, Tensor | Part]]:
    """What is in the file by name, in its order, without the digest: wide dtypes first, so that all are aligned.

    Parts of the store are gathered when they are read, one at a time.
    """
    contents: list[tuple[str, Tensor | Part]] = [("token_ids", torch.tensor(list(token_ids), dtype=torch.int64))]
    contents += [
        (f"positions.{index}", torch.from_numpy(table.positions())) for index, table in enumerate(sequence.tables)
    ]
    if _names_blocks(cache, sequence):
        contents += [(f"runs.{index}", _runs_of(own)) for index, own in enumerate(cache.placements(sequence))]
    if sequence.retained is not None and sequence.retained.policy.scored:
        # As wide as what comes before, so that what follows is aligned.
        contents += [
            (f"scores.{index}", torch.from_numpy(own.astype(np.float64)))
            for index, own in enumerate(sequence.retained.scores)
            if cache.groups[index].group.reach.unlimited
        ]
    held = cache.held(sequence)
    parts = [
        (f"{name}.{layer}", part)
        for layer, group in enumerate(cache.layout.group_of_layer)
        for name, part in cache.store.parts(layer, held[group]).items()
    ]
    others: list[tuple[str, Tensor | Part]] = [
        (f"{BESIDE}{name}", beside.tensors[name]) for name in sorted(beside.tensors)
    ]
    return contents + sorted([*others, *parts], key=lambda own: -own[1].dtype.itemsize)


def _names_blocks(cache: KVCache, sequence: CachedSequence) -> bool:
    """Whether it matters how the tokens lie in blocks."""
    return cache.layout.seals or sequence.retained is not None


def _runs_of(placement: Placement) -> Tensor:
    """int64[runs, 3]: offset and count of each run, and whether its block is open."""
    runs = placement.runs.copy()
    runs[:, 2] = 0
    runs[-1:, 2] = placement.last_is_open
    return torch.from_numpy(runs)


class Digest:
    """Takes in metadata and tensors, in the order of the file."""

    def __init__(self, metadata: dict[str, str]) -> None:
        self._hash = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=DIGEST_BYTES)

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor."""
        self._hash.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        self._hash.update(bytes_of(tensor))

    def bytes(self) -> bytes:
        """The digest of all that was added."""
        return self._hash.digest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in the file."""
    # An empty tensor has no stride of 1, which the reinterpretation as bytes asks for.
    if not tensor.numel():
        return memoryview(b"")
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
