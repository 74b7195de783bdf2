"""The encoder of an encoder-decoder model: run once a source, whose cross-attention keys and values it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from kvloom.errors import InvalidRequest, ModelError, PromptTooLong, UnsupportedModel
from kvloom.models.modules import device_of
from kvloom.models.sources.source import Source

TRIAL_TOKENS = 5
"""Of the source that trial passes decode from; unlike the number of tokens that they decode."""

Projection = tuple[int, Tensor, Tensor]
"""A cross-attention layer, counted from 0, and its keys and values, [kv_heads, tokens, dim]."""


@dataclass
class Encoded(BaseModelOutput):  # type: ignore[misc]  # transformers is untyped for us
    """What an encoder gave; decoders of mixtures of experts look for the routers' logits, too."""

    router_logits: Any = None
    encoder_router_logits: Any = None


class _Projections(DynamicCache):  # type: ignore[misc]  # transformers is untyped for us
    """A cross-attention cache that keeps what it is given for the length of one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Projection] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.given.append((layer, keys[0], values[0]))
        return keys, values


class Encoder:
    """What of a model of transformers reads sources.

    Attributes:
        input_name: under which the model's forward takes a source.
        reads_features: whether sources are features (a spectrogram) instead of token ids.
        vocab_size: valid ids of a source lie below it; None for features.
        max_tokens: the longest source that the model's positions allow; None if it states none.

    Raises:
        UnsupportedModel: the encoder reads something else.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._module: Any = model.get_encoder()
        self.input_name: str = model.main_input_name
        self.vocab_size: int | None = None
        self.max_tokens: int | None = None
        config = model.config
        if self.input_name == "input_ids":
            self.vocab_size = int(self._module.get_input_embeddings().weight.shape[0])
            self.max_tokens = getattr(config, "max_position_embeddings", None)
        elif self.input_name == "input_features" and hasattr(self._module, "conv2"):
            self.max_tokens = int(config.max_source_positions)
            frames = self.max_tokens * self._module.conv1.stride[0] * self._module.conv2.stride[0]
            self._feature_shape = [int(config.num_mel_bins), frames]
        else:
            raise UnsupportedModel(
                f"{type(model).__name__} reads `{self.input_name}`. Sources are token ids, or the `input_features` of "
                "Whisper."
            )

    @property
    def _device(self) -> torch.device:
        return device_of(self._model)

    @property
    def reads_features(self) -> bool:
        """Whether sources are features instead of token ids."""
        return self.vocab_size is None

    @property
    def fixed_length(self) -> bool:
        """Whether every source has one length, as features have."""
        return self.reads_features

    @property
    def description(self) -> str:
        """What a source is."""
        if not self.reads_features:
            return "text or token ids"
        return f"`{self.input_name}`, as its feature extractor gives them"

    def of_ids(self, token_ids: Sequence[int]) -> Source:
        """A source of token ids, which are valid."""
        if self.max_tokens is not None and len(token_ids) > self.max_tokens:
            raise PromptTooLong(
                f"the source has {len(token_ids):,} tokens; the model's encoder reads {self.max_tokens:,}. Shorten it."
            )
        return Source.of(torch.tensor([list(token_ids)], dtype=torch.int64), tokens=len(token_ids))

    def of_features(self, features: Tensor) -> Source:
        """A source of features, float[bins, frames] or float[1, bins, frames]."""
        own = features[0] if features.dim() == 3 and features.shape[0] == 1 else features
        bins, frames = self._feature_shape
        if not own.is_floating_point() or own.dim() != 2 or own.shape[0] != bins:
            raise InvalidRequest(
                f"`input_features` are floats of shape [{bins}, {frames}] or [1, {bins}, {frames}]; got {own.dtype} of "
                f"shape {list(features.shape)}. Pass several sources as a list."
            )
        if own.shape[1] > frames:
            raise InvalidRequest(
                f"the features have {own.shape[1]:,} frames; the encoder reads {frames:,}. Longer recordings are for "
                "`kvloom.generate(model, input_features=...)`, which cuts them as Whisper's own `generate` does."
            )
        if own.shape[1] < frames:
            raise InvalidRequest(
                f"the features have {own.shape[1]:,} frames; the encoder reads exactly {frames:,}. Let the feature "
                "extractor pad them."
            )
        assert self.max_tokens is not None, "set where features are read"
        return Source.of(own[None], tokens=self.max_tokens)

    def trial_source(self) -> Source:
        """A short source, for trial passes."""
        return self.random_source(torch.Generator().manual_seed(0), tokens=TRIAL_TOKENS)

    def random_source(self, generator: torch.Generator, *, tokens: int) -> Source:
        """A source of random content; features are always as long as they must be."""
        if self.vocab_size is None:
            return self.of_features(torch.randn(self._feature_shape, generator=generator))
        return self.of_ids(torch.randint(self.vocab_size, (tokens,), generator=generator).tolist())

    def inputs(self, source: Source, *, rows: int = 1) -> dict[str, Tensor]:
        """The source as the model takes it, for `rows` sequences that decode from it."""
        own = source.inputs.to(self._device)
        if own.is_floating_point():
            own = own.to(self._model.dtype)
        return {self.input_name: own.expand(rows, *own.shape[1:])}

    @torch.no_grad()
    def run(self, source: Source) -> Encoded:
        """What the encoder makes of a source, float[1, source.tokens, hidden]."""
        hidden: Tensor = self._module(**self.inputs(source)).last_hidden_state
        if hidden.shape[1] != source.tokens:
            raise ModelError(
                f"the encoder gave {hidden.shape[1]} positions for a source of {source.tokens}, so its keys and values "
                "would not fit the room that was made for them."
            )
        return Encoded(last_hidden_state=hidden)

    @torch.no_grad()
    def project(self, source: Source) -> list[Projection]:
        """Run the encoder, and every cross-attention's projections of what it gives.

        The projections are learned by decoding a single token: whatever a model calls them, it puts them into a
        cache of transformers.
        """
        projections = _Projections()
        self._model(
            encoder_outputs=self.run(source),
            decoder_input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self._device),
            past_key_values=EncoderDecoderCache(DynamicCache(), projections),
            use_cache=True,
        )
        return projections.given
