"""What the encoder of an encoder-decoder model reads, and what a sequence decodes from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

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


class SourceReader(Protocol):
    """What makes sources of what users pass.

    Attributes:
        input_name: under which the model takes a source.
        description: what a source is, in a few words.
        vocab_size: valid ids of a source lie below it; None for features.
        max_tokens: the longest source; None if there is no limit.
        fixed_length: whether every source has that length.
    """

    @property
    def input_name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def vocab_size(self) -> int | None: ...

    @property
    def max_tokens(self) -> int | None: ...

    @property
    def fixed_length(self) -> bool: ...

    @property
    def reads_features(self) -> bool:
        """Whether sources are features instead of token ids."""
        ...

    def of_ids(self, token_ids: Sequence[int]) -> Source:
        """A source of token ids, which are valid."""
        ...

    def of_features(self, features: Tensor) -> Source:
        """A source of features, with or without a batch of one."""
        ...

    def trial_source(self) -> Source:
        """A short source, for trial passes."""
        ...

    def random_source(self, generator: torch.Generator, *, tokens: int) -> Source:
        """A source of random content, `tokens` long unless they have one length."""
        ...
