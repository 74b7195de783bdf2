"""A context out of a file, of which nothing is believed before it is checked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvloom.blocks.runs import Slots
from kvloom.cache.cache import KVCache
from kvloom.cache.layout import CacheLayout
from kvloom.cache.placement import Placement
from kvloom.cache.retention import Retained, policy_of
from kvloom.cache.sequence import CachedSequence
from kvloom.cache.snapshot.format import (
    BESIDE,
    FORMAT,
    VERSION,
    Beside,
    Digest,
    Origin,
    contents_of,
    read_regime,
)
from kvloom.cache.store import Part
from kvloom.errors import CorruptSnapshot, SnapshotMismatch, SnapshotNotFound


@contextmanager
def open_snapshot(path: str | os.PathLike[str]) -> Iterator[SnapshotReader]:
    """Open a snapshot and look at its header; keys and values are read by `SnapshotReader.load`.

    Raises:
        SnapshotNotFound, CorruptSnapshot: the file is missing, is no snapshot, or is damaged or incomplete.
        SnapshotMismatch: it is of another version of the format.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        what = (
            "is a folder, not a snapshot. Name the file in it."
            if source.is_dir()
            else "does not exist. Save a context there first."
        )
        raise SnapshotNotFound(f"`{source}` {what}")
    try:
        with safe_open(source, framework="pt") as file:
            yield SnapshotReader(source, file)
    except SafetensorError as error:
        raise CorruptSnapshot(f"`{source}` is damaged or incomplete: {error}. Save the context again.") from error


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
            raise CorruptSnapshot(
                f"`{source}` is a safetensors file, but not a snapshot of KVLoom. Name one that `Context.save` wrote."
            )
        if self._metadata.get("version") != VERSION:
            raise SnapshotMismatch(
                f"`{source}` has version {self._metadata.get('version')} of the format; this KVLoom reads {VERSION}. "
                "Prefill the context again, and save that."
            )
        self._digest = Digest(self._metadata)
        try:
            self.origin = Origin(
                **{name: self._metadata[name] for name in ("model", "fingerprint", "dtype", "codec")},
                block_tokens=int(self._metadata["block_tokens"]),
            )
            self._retained = json.loads(self._metadata.get("retention", "null"))
            self.retention = None if self._retained is None else policy_of(self._retained["policy"])
            self.regime = read_regime(json.loads(self._metadata["regime"]))
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
                    f"Load the model with {what}={theirs!r}, or prefill the context again."
                )
        if self.origin.fingerprint != own.fingerprint:
            raise SnapshotMismatch(
                f"`{self._source}` was made by another model: {self.origin.model} with the fingerprint "
                f"{self.origin.fingerprint[:12]}; this is {own.model} with {own.fingerprint[:12]}. Its config, weights "
                "or adapters differ. Use the model that made it, or prefill the context again."
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
        contents = contents_of(cache, sequence, self.token_ids, self.beside)
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
        return CorruptSnapshot(f"`{self._source}` is damaged: {what}. Save the context again.")
