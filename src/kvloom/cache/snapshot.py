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

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvloom.blocks.table import Slots
from kvloom.cache.aside import target_of, written_aside
from kvloom.cache.cache import CachedSequence, KVCache
from kvloom.cache.layout import CacheLayout
from kvloom.cache.placement import Placement
from kvloom.cache.retention import Retained, Retention, described, policy_of
from kvloom.cache.store import Part
from kvloom.errors import CorruptSnapshot, SnapshotMismatch, SnapshotNotFound

FORMAT = "kvloom-snapshot"
VERSION = "2"
DIGEST_BYTES = 32
BESIDE = "beside."

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}

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
            dtype=str(layout.dtype).removeprefix("torch."),
            codec=layout.codec,
            block_tokens=layout.block_tokens,
        )


def write_snapshot(
    path: str | os.PathLike[str],
    cache: KVCache,
    sequence: CachedSequence,
    *,
    token_ids: Sequence[int],
    regime: Regime,
    origin: Origin,
    beside: Beside,
    retention: Retention | None = None,
) -> None:
    """Write what `sequence` holds. One layer at a time is gathered, so little memory is needed.

    Args:
        retention: the policy that whatever continues it is under; the sequence's own is that of its last request.

    Raises:
        InvalidRequest: there is no such folder, `path` is one, or the policy is none of KVLoom's own. An `OSError` (no
            space, no permission) passes through. In each case a file that was there before is as it was.
    """
    target = target_of(path)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": origin.model,
        "fingerprint": origin.fingerprint,
        "dtype": origin.dtype,
        "codec": origin.codec,
        "regime": json.dumps(regime),
        "tokens": str(sequence.tokens),
        **({"beside": json.dumps(beside.facts)} if beside.facts else {}),
        "block_tokens": str(origin.block_tokens),
        **({} if retention is None else {"retention": _of_policy(sequence, retention)}),
    }
    contents = _contents(cache, sequence, token_ids, beside)
    digest = _Digest(metadata)
    with written_aside(target) as file:
        file.write(_header(metadata, contents))
        for name, content in contents:
            tensor = content.read() if isinstance(content, Part) else content.cpu()
            digest.add(name, tensor)
            file.write(_bytes_of(tensor))
        file.write(digest.bytes())


@contextmanager
def open_snapshot(path: str | os.PathLike[str]) -> Iterator[SnapshotReader]:
    """Open a snapshot and look at its header; keys and values are read by `SnapshotReader.load`.

    Raises:
        SnapshotNotFound, CorruptSnapshot: the file is missing, is no snapshot, or is damaged or incomplete.
        SnapshotMismatch: it is of another version of the format.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        what = "is a folder, not a snapshot." if source.is_dir() else "does not exist. Save a context there first."
        raise SnapshotNotFound(f"`{source}` {what}")
    try:
        with safe_open(source, framework="pt") as file:
            yield SnapshotReader(source, file)
    except SafetensorError as error:
        raise CorruptSnapshot(f"`{source}` is damaged or incomplete: {error}.") from error


class SnapshotReader:
    """An open snapshot.

    Attributes:
        origin: which model, dtype and codec made it.
        regime: the rotary regime under which it was computed.
        tokens: how many of the tokens have keys and values, or had before a window let go of them.
        token_ids: all tokens of the context.
        beside: what it stands on besides these; to be believed once `load` has checked the digest.
        retention: the policy that the context is under; None without one.
    """

    def __init__(self, source: Path, file: Any) -> None:
        self._source, self._file = source, file
        self._metadata: dict[str, str] = file.metadata() or {}
        if self._metadata.get("format") != FORMAT:
            raise CorruptSnapshot(f"`{source}` is a safetensors file, but no snapshot of KVLoom.")
        if self._metadata.get("version") != VERSION:
            raise SnapshotMismatch(
                f"`{source}` has version {self._metadata.get('version')} of the format; this KVLoom reads {VERSION}."
            )
        self._digest = _Digest(self._metadata)
        try:
            self.origin = Origin(
                **{name: self._metadata[name] for name in ("model", "fingerprint", "dtype", "codec")},
                block_tokens=int(self._metadata["block_tokens"]),
            )
            self._retained = json.loads(self._metadata.get("retention", "null"))
            self.retention = None if self._retained is None else policy_of(self._retained["policy"])
            self.regime = _regime(json.loads(self._metadata["regime"]))
            self.tokens = int(self._metadata["tokens"])
            self.beside = Beside(json.loads(self._metadata.get("beside", "{}")), self._tensors_beside())
        except (KeyError, ValueError, TypeError) as error:
            raise self.corrupt(f"its header is wrong ({error})") from error
        self.token_ids: list[int] = self._read("token_ids", (None,), torch.int64).tolist()

    def check_origin(self, own: Origin) -> None:
        """Refuse a snapshot of another model, dtype or codec, by name."""
        facts = ["dtype", "codec", *(["block_tokens"] if self._names_blocks else [])]
        for what, theirs, ours in ((name, getattr(self.origin, name), getattr(own, name)) for name in facts):
            if theirs != ours:
                raise SnapshotMismatch(
                    f"`{self._source}` holds keys and values of {what} {theirs}; this model keeps {ours}. "
                    f"Load the model with {what}={theirs!r}, or prefill the context anew."
                )
        if self.origin.fingerprint != own.fingerprint:
            raise SnapshotMismatch(
                f"`{self._source}` was made by another model: {self.origin.model} with the fingerprint "
                f"{self.origin.fingerprint[:12]}; this is {own.model} with {own.fingerprint[:12]}. Its config, weights "
                "or adapters differ. Use the model that made it, or prefill the context anew."
            )

    def placements(self, layout: CacheLayout) -> tuple[Placement, ...]:
        """For each layer group, which tokens it holds, and how they lie in the blocks of a cache of that layout."""
        groups = []
        for index in range(len(layout.groups)):
            own = self._read(f"positions.{index}", (None,), torch.int64).numpy()
            end = len(own) if layout.groups[index].reach.cross else self.tokens
            if (np.diff(own) <= 0).any() or (len(own) and (own[0] < 0 or own[-1] >= end)):
                raise self.corrupt(f"the positions of group {index} are not ascending positions of its tokens")
            groups.append(own)
        if not 0 < self.tokens <= len(self.token_ids):
            raise self.corrupt(f"it says that {self.tokens} of {len(self.token_ids)} tokens are computed")
        if not self._names_blocks:
            return tuple(Placement.of_positions(own, layout.block_tokens) for own in groups)
        return tuple(self._same_placement(index, own, layout) for index, own in enumerate(groups))

    def retained(
        self, placements: Sequence[Placement], layout: CacheLayout, trained_tokens: int | None
    ) -> Retained | None:
        """What the policy knew of the sequence; None without one. Call it once, after `placements`."""
        if self.retention is None:
            return None
        try:
            first, end = self._retained["prompt"]
            exact, prompt = self._retained["exact_tokens"], range(first, end)
        except (KeyError, ValueError, TypeError) as error:
            raise self.corrupt(f"what its policy knew is wrong ({error})") from error
        if not 0 <= first <= end <= len(self.token_ids) or not (exact is None or type(exact) is int):
            raise self.corrupt("what its policy knew is wrong")
        scores = [
            self._read(f"scores.{index}", (int(own.runs[:, 1].sum()),), torch.float64).numpy().astype(np.float32)
            if self.retention.scored and group.reach.unlimited
            else np.empty(0, dtype=np.float32)
            for index, (own, group) in enumerate(zip(placements, layout.groups, strict=True))
        ]
        return Retained(self.retention, prompt, self.retention.sight(trained_tokens), exact, tuple(scores))

    @property
    def _names_blocks(self) -> bool:
        """Whether it says how the tokens lay in blocks."""
        return self.origin.codec != "native" or self.retention is not None

    def _same_placement(self, group: int, positions: Slots, layout: CacheLayout) -> Placement:
        """The runs of a group as they were: each sealed block has scales of its own, and policies go by blocks."""
        saved = self._read(f"runs.{group}", (None, 3), torch.int64).numpy()
        offsets, counts, opened = saved.T
        starts = np.cumsum(counts) - counts
        if (counts < 1).any() or int(counts.sum()) != len(positions) or opened[:-1].any():
            raise self.corrupt(f"the runs of group {group} are not those of its positions")
        placement = Placement(np.stack([offsets, counts, positions[starts]], axis=1), bool(opened[-1:].any()))
        if not placement.holds(positions, layout.block_tokens):
            raise self.corrupt(f"the runs of group {group} do not fit blocks of {layout.block_tokens} tokens")
        return placement

    def load(self, cache: KVCache, sequence: CachedSequence) -> None:
        """Read keys and values into what was placed for them, and check the digest of it all.

        Call it after `placements` and `retained`. Raises `CorruptSnapshot` if anything is not as it was written; the
        sequence then holds nothing of use.
        """
        contents = _contents(cache, sequence, self.token_ids, self.beside)
        if {name for name, _ in contents} | {"digest"} != set(self._file.keys()):
            raise self.corrupt("it holds other tensors than the model's layers")
        for name, part in contents:
            if isinstance(part, Part):
                part.write(self._read(name, part.shape, part.dtype))
            elif name.startswith(BESIDE):
                self._digest.add(name, part)
        stored = cache.held(sequence)
        for layer, group in enumerate(cache.layout.group_of_layer):
            cache.store.restored(layer, stored[group])
        if bytes(self._file.get_tensor("digest").numpy()) != self._digest.bytes():
            raise self.corrupt("its content does not match its digest")

    def _read(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Tensor:
        """One tensor, which the digest takes in, so each is read once and in the order of writing."""
        tensor: Tensor = self._file.get_tensor(name)
        fits = len(tensor.shape) == len(shape) and all(
            want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != dtype:
            raise self.corrupt(f"`{name}` has the shape {list(tensor.shape)} in {tensor.dtype}")
        self._digest.add(name, tensor)
        return tensor

    def _tensors_beside(self) -> dict[str, Tensor]:
        names = sorted(name for name in self._file.keys() if name.startswith(BESIDE))  # noqa: SIM118 - it is no dict
        return {name.removeprefix(BESIDE): self._file.get_tensor(name) for name in names}

    def corrupt(self, what: str) -> CorruptSnapshot:
        """The error of a file that is not as it was written."""
        return CorruptSnapshot(f"`{self._source}` is damaged: {what}. Save the context anew.")


def as_regime(regime: object) -> Regime:
    """A rotary regime as a file can hold it; regimes of all bindings are None or tuples of integers."""
    found = _regime(regime)
    assert found == regime, f"a regime is None or a tuple of integers, not {regime!r}"
    return found


def _regime(value: object) -> Regime:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(type(own) is int for own in value):
        raise ValueError(f"{value!r} is no rotary regime")
    return tuple(value)


# ---- what is in the file -----------------------------------------------------------------------------------------


def _contents(
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


def _of_policy(sequence: CachedSequence, retention: Retention) -> str:
    """The policy and what it knows besides scores, as JSON."""
    retained = sequence.retained
    assert retained is not None, "a context under a policy has tables under it"
    prompt = retained.prompt
    return json.dumps(
        {
            "policy": described(retention),
            "prompt": [prompt.start, prompt.stop],
            "exact_tokens": retained.exact_tokens,
        }
    )


def _runs_of(placement: Placement) -> Tensor:
    """int64[runs, 3]: offset and count of each run, and whether its block is open."""
    runs = placement.runs.copy()
    runs[:, 2] = 0
    runs[-1:, 2] = placement.last_is_open
    return torch.from_numpy(runs)


def _header(metadata: dict[str, str], contents: Sequence[tuple[str, Tensor | Part]]) -> bytes:
    """The length and the JSON header of a safetensors file, padded so that the data is aligned."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    specs = [(name, own.dtype, list(own.shape)) for name, own in contents]
    for name, dtype, shape in [*specs, ("digest", torch.uint8, [DIGEST_BYTES])]:
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Digest:
    """Takes in metadata and tensors, in the order of the file."""

    def __init__(self, metadata: dict[str, str]) -> None:
        self._hash = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=DIGEST_BYTES)

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor."""
        self._hash.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        self._hash.update(_bytes_of(tensor))

    def bytes(self) -> bytes:
        """The digest of all that was added."""
        return self._hash.digest()


def _bytes_of(tensor: Tensor) -> memoryview:
    # An empty tensor has no stride of 1, which the reinterpretation as bytes asks for.
    if not tensor.numel():
        return memoryview(b"")
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
