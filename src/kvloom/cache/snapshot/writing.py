"""A context into a file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.cache.aside import target_of, written_aside
from kvloom.cache.cache import KVCache
from kvloom.cache.retention import Retention, described
from kvloom.cache.sequence import CachedSequence
from kvloom.cache.snapshot.format import (
    DIGEST_BYTES,
    FORMAT,
    VERSION,
    Beside,
    Digest,
    Origin,
    Regime,
    bytes_of,
    contents_of,
)
from kvloom.cache.store import Part

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
    contents = contents_of(cache, sequence, token_ids, beside)
    digest = Digest(metadata)
    with written_aside(target) as file:
        file.write(_header(metadata, contents))
        for name, content in contents:
            tensor = content.read() if isinstance(content, Part) else content.cpu()
            digest.add(name, tensor)
            file.write(bytes_of(tensor))
        file.write(digest.bytes())


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
