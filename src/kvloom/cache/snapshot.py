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

A file is written aside and renamed, so there is the old file or the new one, whole, whatever happens.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvloom.blocks.table import Slots
from kvloom.cache.cache import CachedSequence, KVCache
from kvloom.cache.layout import CacheLayout
from kvloom.errors import CorruptSnapshot, InvalidRequest, SnapshotMismatch, SnapshotNotFound

FORMAT = "kvloom-snapshot"
VERSION = "1"
DIGEST_BYTES = 32

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}

Regime = tuple[int, ...] | None
"""A rotary regime as a file can hold it."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What keys and values depend on besides the tokens; a snapshot is restored where all of it is the same.

    Attributes:
        model: what it is, for messages.
        fingerprint: digest of the model's config and weights.
        dtype: of keys and values.
        codec: how they are kept.
    """

    model: str
    fingerprint: str
    dtype: str
    codec: str = "native"


def write_snapshot(
    path: str | os.PathLike[str],
    cache: KVCache,
    sequence: CachedSequence,
    *,
    token_ids: Sequence[int],
    regime: Regime,
    origin: Origin,
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
    }
    specs = _specs(cache.layout, len(token_ids), [table.held for table in sequence.tables])
    digest = _Digest(metadata)
    with _written_aside(target) as file:
        file.write(_header(metadata, specs))
        for (name, _, _), tensor in zip(specs, _tensors(cache, sequence, token_ids), strict=False):
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
            self.origin = Origin(**{name: self._metadata[name] for name in ("model", "fingerprint", "dtype", "codec")})
            self.regime = _regime(json.loads(self._metadata["regime"]))
            self.tokens = int(self._metadata["tokens"])
        except (KeyError, ValueError, TypeError) as error:
            raise self._corrupt(f"its header is wrong ({error})") from error
        self.token_ids: list[int] = self._read("token_ids", (None,), torch.int64).tolist()

    def check_origin(self, own: Origin) -> None:
        """Refuse a snapshot of another model, dtype or codec, by name."""
        for what, theirs, ours in (
            ("dtype", self.origin.dtype, own.dtype),
            ("codec", self.origin.codec, own.codec),
        ):
            if theirs != ours:
                raise SnapshotMismatch(
                    f"`{self._source}` holds keys and values of {what} {theirs}; this model keeps {ours}. "
                    f"Load the model with {what}='{theirs}', or prefill the context anew."
                )
        if self.origin.fingerprint != own.fingerprint:
            raise SnapshotMismatch(
                f"`{self._source}` was made by another model: {self.origin.model} with the fingerprint "
                f"{self.origin.fingerprint[:12]}; this is {own.model} with {own.fingerprint[:12]}. Its config, weights "
                "or adapters differ. Use the model that made it, or prefill the context anew."
            )

    def positions(self, layout: CacheLayout) -> tuple[Slots, ...]:
        """For each layer group, int64[held], which tokens it holds."""
        groups = []
        for index in range(len(layout.groups)):
            own = self._read(f"positions.{index}", (None,), torch.int64).numpy()
            if (np.diff(own) <= 0).any() or (len(own) and (own[0] < 0 or own[-1] >= self.tokens)):
                raise self._corrupt(f"the positions of group {index} are not ascending positions of its tokens")
            groups.append(own)
        if not 0 < self.tokens <= len(self.token_ids):
            raise self._corrupt(f"it says that {self.tokens} of {len(self.token_ids)} tokens are computed")
        return tuple(groups)

    def load(self, cache: KVCache, slots: Sequence[Slots]) -> None:
        """Read keys and values into the store, at each group's `slots`, and check the digest of it all.

        Call it after `positions`. Raises `CorruptSnapshot` if anything is not as it was written; the slots then
        hold nothing of use.
        """
        layout = cache.layout
        expected = {name for name, _, _ in _specs(layout, 0, [0] * len(layout.groups))}
        if expected != set(self._file.keys()):
            raise self._corrupt("it holds other tensors than the model's layers")
        for layer, shape in enumerate(layout.layers):
            own = slots[layout.group_of_layer[layer]]
            keys = self._read(f"keys.{layer}", (shape.kv_heads, len(own), shape.key_dim), layout.dtype)
            values = self._read(f"values.{layer}", (shape.kv_heads, len(own), shape.value_dim), layout.dtype)
            device = cache.store.keys[layer].device
            cache.store.write(layer, torch.from_numpy(own).to(device), keys.to(device), values.to(device))
        if bytes(self._file.get_tensor("digest").numpy()) != self._digest.bytes():
            raise self._corrupt("its content does not match its digest")

    def _read(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Tensor:
        """One tensor, which the digest takes in, so each is read once and in the order of writing."""
        tensor: Tensor = self._file.get_tensor(name)
        fits = len(tensor.shape) == len(shape) and all(
            want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != dtype:
            raise self._corrupt(f"`{name}` has the shape {list(tensor.shape)} in {tensor.dtype}")
        self._digest.add(name, tensor)
        return tensor

    def _corrupt(self, what: str) -> CorruptSnapshot:
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


def _specs(layout: CacheLayout, tokens: int, held: Sequence[int]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of each tensor, in the order of the file: wide dtypes first, so that all are aligned."""
    specs: list[tuple[str, torch.dtype, tuple[int, ...]]] = [("token_ids", torch.int64, (tokens,))]
    specs += [(f"positions.{index}", torch.int64, (count,)) for index, count in enumerate(held)]
    for layer, shape in enumerate(layout.layers):
        count = held[layout.group_of_layer[layer]]
        specs.append((f"keys.{layer}", layout.dtype, (shape.kv_heads, count, shape.key_dim)))
        specs.append((f"values.{layer}", layout.dtype, (shape.kv_heads, count, shape.value_dim)))
    return [*specs, ("digest", torch.uint8, (DIGEST_BYTES,))]


def _tensors(cache: KVCache, sequence: CachedSequence, token_ids: Sequence[int]) -> Iterator[Tensor]:
    """The tensors of `_specs`, without the digest."""
    yield torch.tensor(list(token_ids), dtype=torch.int64)
    for table in sequence.tables:
        yield torch.from_numpy(table.positions())
    store = cache.store
    slots = [torch.from_numpy(table.slots()) for table in sequence.tables]
    for layer, group in enumerate(cache.layout.group_of_layer):
        for tensor in (store.keys[layer], store.values[layer]):
            yield tensor.index_select(1, slots[group].to(tensor.device)).cpu()


def _header(metadata: dict[str, str], specs: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The length and the JSON header of a safetensors file, padded so that the data is aligned."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in specs:
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
