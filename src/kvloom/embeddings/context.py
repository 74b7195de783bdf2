"""Contexts of embeddings: batches of sequences whose keys and values are kept."""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.cache import CachedSequence
from kvloom.errors import ContextClosed
from kvloom.models import Source

if TYPE_CHECKING:
    from kvloom.embeddings.model import EmbeddingModel

Sequences = tuple[CachedSequence, ...]


@dataclass(frozen=True)
class Embedded:
    """What `EmbeddingModel.extend` returns.

    Attributes:
        outputs: float[batch, tokens, dim], a row for each new token and none for those before it: compare with the
            last `tokens` rows of a pass over the whole input, `full[:, -tokens:]`.
        context: the past and the new tokens, to be continued.
    """

    outputs: Tensor
    context: EmbeddingContext


@dataclass(frozen=True)
class Past:
    """What a context stands for: its tables, and digests of what was fed to them.

    Attributes:
        fed: of the embeddings, token by token.
        source: the encoder's outputs; None without cross-attention.
        weights: digest of those that it was computed with.
    """

    sequences: Sequences
    fed: hashlib.blake2b
    source: Source | None
    weights: bytes


class EmbeddingContext:
    """A batch of sequences of equal lengths whose keys and values are kept, to be continued any number of times.

    It never changes: what continues it works on a fork, which shares its blocks. They are freed when the context is
    dropped, or by `close`. The keys and values of the encoder's outputs belong to it, and are shared like the others.
    `EmbeddingModel.extend` makes it.

    Attributes:
        batch: how many sequences.
        tokens: of each.
        source_tokens: of the encoder's outputs; 0 without cross-attention.
    """

    def __init__(self, model: EmbeddingModel, past: Past) -> None:
        self.batch, self.tokens = len(past.sequences), past.sequences[0].tokens
        self.source_tokens = 0 if past.source is None else past.source.tokens
        self._model, self._past = model, past
        self._finalizer = weakref.finalize(self, model._turns.drop, past.sequences)

    def fork(self) -> EmbeddingContext:
        """Another context of the same past, which shares the blocks and may outlive this one."""
        return self._model._fork(self)

    def close(self) -> None:
        """Free the blocks now. The context cannot be used afterwards."""
        self._finalizer()

    def past_for(self, model: EmbeddingModel) -> Past:
        """What stands behind the context, for the model that made it."""
        if not self._finalizer.alive:
            raise ContextClosed("the context was closed. Extend None with the whole input again.")
        if model is not self._model:
            raise ContextClosed("the context belongs to another model. Extend None with the whole input on this one.")
        return self._past

    def __enter__(self) -> EmbeddingContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._finalizer.alive else ", closed"
        return (
            f"EmbeddingContext({self.batch} sequences of {self.tokens} tokens, source of {self.source_tokens}{state})"
        )


def feed(digest: hashlib.blake2b, embeddings: Tensor) -> None:
    """Add embeddings token by token, so that the digest does not depend on how they were cut into calls."""
    digest.update(embeddings.transpose(0, 1).contiguous().cpu().view(torch.uint8).numpy().tobytes())
