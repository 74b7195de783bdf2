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

The metadata holds ``format``, ``version``, ``model``, ``fingerprint``, ``dtype``, ``codec``, ``regime`` (JSON) and
``tokens`` (how many have been computed). Blocks are not in the file: a snapshot fits any block size and budget.

Under the int8 codec a block has scales of its own, so blocks are in the file, which fits caches of the same block size
(``block_tokens`` in the metadata). ``keys`` and ``values`` are then those of the open block, and there are

======================  =====================================================================================
tensor                  holds
======================  =====================================================================================
``runs.{group}``         int64[runs, 3]: offset in its block and tokens of each run, and 1 if the block is open
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

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvloom.blocks.table import Slots
from kvloom.cache.cache import CachedSequence, KVCache
from kvloom.cache.layout import CacheLayout
from kvloom.cache.placement import Placement
from kvloom.cache.store import Part
from kvloom.errors import CorruptSnapshot, InvalidRequest, SnapshotMismatch, SnapshotNotFound

FORMAT = "kvloom-snapshot"
VERSION = "1"
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
        block_tokens: of the blocks, if the codec seals them; else None, as any will do.
    """

    model: str
    fingerprint: str
    dtype: str
    codec: str = "native"
    block_tokens: int | None = None

    @classmethod
    def of(cls, model: str, fingerprint: str, layout: CacheLayout) -> Origin:
        """The origin of what a cache of that layout holds of a model."""
        return cls(
            model=model,
            fingerprint=fingerprint,
            dtype=str(layout.dtype).removeprefix("torch."),
            codec=layout.codec,
            block_tokens=layout.block_tokens if layout.seals else None,
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
) -> None:
    """Write what `sequence` holds. One layer at a time is gathered, so little memory is needed.

    Raises:
        InvalidRequest: there is no such folder, or `path` is one. An `OSError` (no space, no permission) passes
            through. In each case a file that was there before is as it was.
    """
    target = _target(path)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": origin.model,
        "fingerprint": origin.fingerprint,
        "dtype": origin.dtype,
        "codec": origin.codec,
        "regime": json.dumps(regime),
        "tokens": str(sequence.tokens),
        **({} if origin.block_tokens is None else {"block_tokens": str(origin.block_tokens)}),
        **({"beside": json.dumps(beside.facts)} if beside.facts else {}),
    }
    contents = _contents(cache, sequence, token_ids, beside)
    digest = _Digest(metadata)
    with _written_aside(target) as file:
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
            size = self._metadata.get("block_tokens")
            self.origin = Origin(
                **{name: self._metadata[name] for name in ("model", "fingerprint", "dtype", "codec")},
                block_tokens=None if size is None else int(size),
            )
            self.regime = _regime(json.loads(self._metadata["regime"]))
            self.tokens = int(self._metadata["tokens"])
            self.beside = Beside(json.loads(self._metadata.get("beside", "{}")), self._tensors_beside())
        except (KeyError, ValueError, TypeError) as error:
            raise self.corrupt(f"its header is wrong ({error})") from error
        self.token_ids: list[int] = self._read("token_ids", (None,), torch.int64).tolist()

    def check_origin(self, own: Origin) -> None:
        """Refuse a snapshot of another model, dtype or codec, by name."""
        for what, theirs, ours in (
            ("dtype", self.origin.dtype, own.dtype),
            ("codec", self.origin.codec, own.codec),
            ("block_tokens", self.origin.block_tokens, own.block_tokens),
        ):
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
        if not layout.seals:
            return tuple(Placement.of_positions(own, layout.block_tokens) for own in groups)
        return tuple(self._sealed_placement(index, own, layout) for index, own in enumerate(groups))

    def _sealed_placement(self, group: int, positions: Slots, layout: CacheLayout) -> Placement:
        """The runs of a group as they were, since each sealed block has scales of its own."""
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

        Call it after `placements`. Raises `CorruptSnapshot` if anything is not as it was written; the sequence then
        holds nothing of use.
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
    if cache.layout.seals:
        contents += [(f"runs.{index}", _runs_of(own)) for index, own in enumerate(cache.placements(sequence))]
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


# ---- writing aside -----------------------------------------------------------------------------------------------


def _target(path: str | os.PathLike[str]) -> Path:
    """The file to be replaced: where a link points, not the link."""
    target = Path(path).expanduser().resolve()
    if not target.parent.is_dir():
        raise InvalidRequest(f"there is no folder `{target.parent}` to save a snapshot in.")
    if target.is_dir():
        raise InvalidRequest(f"`{target}` is a folder. A snapshot is a file.")
    if target.exists() and not target.is_file():
        raise InvalidRequest(f"`{target}` is no regular file, so a snapshot cannot take its place.")
    return target


@contextmanager
def _written_aside(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `target` at the end of the block; if the block fails, it is removed.

    It has one name for each target, so a writer that was killed leaves one file, which the next one writes over.
    """
    aside = target.with_name(f".{target.name}.partial")
    file = _open_alone(aside)
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    finally:
        file.close()
    _sync_folder(target.parent)


def _open_alone(aside: Path) -> BinaryIO:
    """An empty file that no other process writes; a lock on it ends with the process that holds it."""
    while True:
        file = open(aside, "ab")  # noqa: SIM115 (the caller closes it)
        fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, aside):
            file.truncate(0)
            return file
        file.close()  # the writer that we waited for has renamed or removed it


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Without this a power cut may undo the rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
