"""What the engine asks of any model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvloom.attention import Plan, View, Wanted
from kvloom.attention.turn import Turn
from kvloom.cache import AnyStore, Codec, LayerShape
from kvloom.errors import InvalidRequest
from kvloom.models.hosted.positions import Counting
from kvloom.models.identity import Identity
from kvloom.models.images.media import Media
from kvloom.models.images.vision import Vision
from kvloom.models.operations import Operation
from kvloom.models.sources.source import Source, SourceReader

# What the rotary factors of a sequence depend on besides positions; rows of unlike regimes run apart.
Regime = Hashable


class Binding(Protocol):
    """A model as the engine sees it."""

    @property
    def name(self) -> str:
        """How the model is attached, in a few words."""
        ...

    @property
    def vocab_size(self) -> int:
        """Width of the logits; ids below it are valid."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that the model's positions allow; None if it states none."""
        ...

    @property
    def device(self) -> torch.device:
        """Where token ids are expected and logits come from."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and of keys and values."""
        ...

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """What each attention layer keeps; empty if the model cannot use a cache."""
        ...

    @property
    def encoder(self) -> SourceReader | None:
        """What reads sources, of an encoder-decoder model; None for a causal model."""
        ...

    @property
    def vision(self) -> Vision | None:
        """How the model takes images and videos; None if it takes none."""
        ...

    @property
    def counting(self) -> Counting | None:
        """How the model counts positions; None if they are the tokens' indices, which plans hold."""
        ...

    def check_ready(self) -> None:
        """Raise `UnsupportedModel` if the model is in a state in which it cannot be decoded (training mode)."""
        ...

    def fingerprint(self) -> bytes:
        """Changes whenever the weights or the active adapters change, so that no old cache is met."""
        ...

    def identity(self) -> Identity | None:
        """Which model this is by content, the same in every process; None if its content cannot be seen."""
        ...

    def regime(self, tokens: int) -> Regime:
        """The regime of a sequence of that many tokens; a sequence whose regime changes is computed anew."""
        ...

    @property
    def shows_attention(self) -> bool:
        """Whether a retention policy can be honoured: whether attention is ours, over one sequence."""
        ...

    @property
    def reads_codes(self) -> bool:
        """Whether a codec can be honoured: whether attention is ours."""
        ...

    def turns(self) -> tuple[Turn | None, ...]:
        """How each layer's queries turn with their positions (None: they do not), once that has been proven.

        Raises `UnsupportedModel` if they cannot be moved to other positions; the message is the reason, as in "it has
        no rotary embedding".
        """
        ...

    def check_shows(self, wanted: Wanted) -> None:
        """Raise `UnsupportedOption` if the model cannot show this of its inside; the message is the reason."""
        ...

    def views_of(
        self, token_ids: Tensor, wanted: Wanted, *, source: Source | None = None, media: Media | None = None
    ) -> list[View]:
        """What the model's own forward shows of whole sequences, int64[batch, tokens]: a view of each."""
        ...

    def forward(
        self, token_ids: Tensor, plan: Plan, store: AnyStore, *, regime: Regime, media: Sequence[Media | None] = ()
    ) -> Tensor:
        """Run one ragged row: write its keys and values into the store, read by the plan, and fill the plan's `views`.

        Args:
            token_ids: int64[tokens].
            media: of each sequence of the plan; may be left out where all is text.

        Returns:
            logits, float[n, vocab], of the plan's `logit_rows`.
        """
        ...

    def encode(self, source: Source, store: AnyStore, slots: Tensor) -> None:
        """Put the keys and values of a source into int64[source.tokens] slots of every cross-attention layer."""
        ...

    def forward_uncached(
        self,
        token_ids: Tensor,
        *,
        last: int | None = 1,
        regime: Regime | None = None,
        source: Source | None = None,
        media: Media | None = None,
    ) -> Tensor:
        """Whole sequences, computed anew: nothing is read from a cache, nothing is kept.

        Args:
            token_ids: int64[batch, tokens], sequences of equal length.
            last: of how many last tokens logits are wanted; None for all.
            regime: by default that of the length.
            source: what all the sequences are decoded from; an encoder reads it anew each time.
            media: what all the sequences show.

        Returns:
            logits, float[batch, last, vocab].
        """
        ...

    def forward_own(
        self,
        token_ids: Tensor,
        *,
        last: int | None = 1,
        regime: Regime | None = None,
        source: Source | None = None,
        media: Media | None = None,
    ) -> Tensor:
        """The same by the model's own forward: the independent reference. See `forward_uncached`."""
        ...

    @property
    def bit_identical(self) -> bool:
        """Whether a token's logits are the same bits with and without the cache, in chunks and in any batch."""
        ...

    def operations(self) -> tuple[Operation, ...]:
        """What the model does, and which of it runs in native kernels."""
        ...

    def detach(self) -> None:
        """Undo whatever attaching did to the model."""
        ...


def check_countable(binding: Binding, token_ids: Sequence[int]) -> None:
    """Refuse tokens that the model would count otherwise with a cache than without. Raises `InvalidTokens`."""
    if binding.counting is not None:
        binding.counting.check(token_ids)


def check_codec_of(binding: Binding, codec: Codec) -> None:
    """Refuse a codec that the model cannot be decoded under. Raises `InvalidRequest`."""
    if codec == "native" or binding.reads_codes:
        return
    raise InvalidRequest(
        f"`codec={codec}` cannot be honoured: the model computes its attention itself, and is handed keys and values "
        "as numbers. Use codec='native'."
    )
