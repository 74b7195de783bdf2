"""Sources that come as embeddings: an encoder of the caller's own has run already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvloom.errors import InvalidRequest
from kvloom.models.sources.encoder import TRIAL_TOKENS
from kvloom.models.sources.source import Source


class EmbeddedSources:
    """Reads sources of embeddings, float[tokens, dim]; a `SourceReader`.

    Attributes:
        dim: width of the embeddings.
    """

    input_name = "context"
    description = "embeddings, float[tokens, dim], as an encoder of yours gives them"
    reads_features = True
    fixed_length = False
    vocab_size: int | None = None
    max_tokens: int | None = None

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dim, self._dtype, self._device = dim, dtype, device

    def of_ids(self, token_ids: Sequence[int]) -> Source:
        """Refused: there is no encoder to read them."""
        raise InvalidRequest(f"this model's source is {self.description}; got token ids. Embed them first.")

    def of_features(self, features: Tensor) -> Source:
        """A source of embeddings, float[tokens, dim] or float[1, tokens, dim]."""
        own = features[0] if features.dim() == 3 and features.shape[0] == 1 else features
        if not own.is_floating_point() or own.dim() != 2 or own.shape[1] != self.dim or not len(own):
            raise InvalidRequest(
                f"a source is floats of shape [tokens, {self.dim}] or [1, tokens, {self.dim}]; got {own.dtype} of "
                f"shape {list(features.shape)}. Pass several sources as a list."
            )
        return Source.of(own[None], tokens=len(own))

    def trial_source(self) -> Source:
        """A short source, for trial passes."""
        return self.random_source(torch.Generator().manual_seed(0), tokens=TRIAL_TOKENS)

    def random_source(self, generator: torch.Generator, *, tokens: int) -> Source:
        """A source of random content."""
        return self.of_features(torch.randn((tokens, self.dim), generator=generator))

    def inputs(self, source: Source) -> Tensor:
        """float[1, tokens, dim], as the model takes it."""
        return source.inputs.to(self._device, self._dtype)
