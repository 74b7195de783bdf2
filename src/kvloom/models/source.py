"""What the encoder of an encoder-decoder model reads, and what a sequence decodes from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Source:
    """One source.

    Attributes:
        inputs: int64[1, tokens] of token ids, or features, float[1, ...], as the encoder takes them.
        tokens: how many keys and values each cross-attention layer keeps for it: the length of the encoder's output.
        token_ids: None if the source is features.
        key: digest of the content; equal keys mean equal sources.
    """

    inputs: Tensor = field(repr=False)
    tokens: int
    token_ids: tuple[int, ...] | None = field(repr=False)
    key: bytes = field(repr=False)

    @classmethod
    def of(cls, inputs: Tensor, *, tokens: int) -> Source:
        """The source of some inputs, which are copied: a key must not outlive what it was made of."""
        own = inputs.detach().clone().contiguous()
        host = own.cpu()
        digest = hashlib.blake2b(f"{host.dtype} {list(host.shape)}".encode(), digest_size=16)
        digest.update(host.view(-1).view(torch.uint8).numpy().tobytes())
        ids = None if own.is_floating_point() else tuple(host[0].tolist())
        return cls(own, tokens, ids, digest.digest())
