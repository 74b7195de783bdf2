"""Any callable f(token_ids[B, S]) -> logits[B, S, V]: decoded without a cache, by every decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvloom.attention import Plan, View, Wanted
from kvloom.attention.turn import Turn
from kvloom.cache import AnyStore, LayerShape
from kvloom.errors import UnsupportedModel, UnsupportedOption
from kvloom.exclusive import interruptible
from kvloom.models.binding import Regime
from kvloom.models.hosted.positions import Counting
from kvloom.models.identity import Identity
from kvloom.models.images.media import Media
from kvloom.models.images.vision import Vision
from kvloom.models.operations import Operation
from kvloom.models.sources.source import Source, SourceReader


class CallableBinding:
    """A function from token ids to logits. It offers no cache, so every step computes whole sequences.

    Args:
        function: takes int64[batch, tokens] and returns float[batch, tokens, vocab].
        vocab_size: width of the logits.
        max_tokens: longest input that the function takes; None for no limit.
        device: where the function expects its input.
    """

    name = "callable, uncached"
    layers: tuple[LayerShape, ...] = ()
    shows_attention = False
    reads_codes = False
    encoder: SourceReader | None = None
    vision: Vision | None = None
    counting: Counting | None = None

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        *,
        vocab_size: int,
        max_tokens: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self.device = torch.device(device)
        self._function = function
        self.dtype = self.forward_uncached(torch.zeros((1, 1), dtype=torch.int64, device=self.device)).dtype

    def check_ready(self) -> None:
        """Refuse a module that is in training mode: its dropout would make every answer another."""
        if isinstance(self._function, torch.nn.Module) and self._function.training:
            raise UnsupportedModel("the model is in training mode, so its output is random. Call model.eval() first.")

    def fingerprint(self) -> bytes:
        """Constant: nothing of a callable is ever cached."""
        return b""

    def identity(self) -> Identity | None:
        """None: what a callable calculates with cannot be seen."""
        return None

    def regime(self, tokens: int) -> Regime:
        """One regime: whatever depends on the length is recomputed anyway."""
        return None

    def turns(self) -> tuple[Turn | None, ...]:
        """Refused: what a callable does with positions cannot be seen."""
        raise UnsupportedModel("a callable does not show its attention")

    def check_shows(self, wanted: Wanted) -> None:
        """Refused: a callable gives logits and nothing else."""
        name = "output_attentions" if wanted.attentions else "output_hidden_states"
        raise UnsupportedOption(f"`{name}` is not supported: only the logits of a callable can be seen.")

    def views_of(
        self, token_ids: Tensor, wanted: Wanted, *, source: Source | None = None, media: Media | None = None
    ) -> list[View]:
        """Never called: see `check_shows`."""
        raise AssertionError("a callable shows nothing")

    def forward(
        self, token_ids: Tensor, plan: Plan, store: AnyStore, *, regime: Regime, media: Sequence[Media | None] = ()
    ) -> Tensor:
        """Never called: a binding without layers has no plan."""
        raise AssertionError("a callable has no cached forward; the engine must use forward_uncached")

    def encode(self, source: Source, store: AnyStore, slots: Tensor) -> None:
        """Never called: a callable has no encoder that is known."""
        raise AssertionError("a callable decodes from no source")

    @torch.no_grad()
    def forward_uncached(
        self,
        token_ids: Tensor,
        *,
        last: int | None = 1,
        regime: Regime | None = None,
        source: Source | None = None,
        media: Media | None = None,
    ) -> Tensor:
        """Call the function and check the shape of what it returns."""
        with interruptible():
            logits = self._function(token_ids)
        expected = (*token_ids.shape, self.vocab_size)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UnsupportedModel(
                f"the callable must return logits of shape {expected} for token ids of shape "
                f"{tuple(token_ids.shape)}; it returned {got}."
            )
        return logits if last is None else logits[:, -last:]

    def forward_own(
        self,
        token_ids: Tensor,
        *,
        last: int | None = 1,
        regime: Regime | None = None,
        source: Source | None = None,
        media: Media | None = None,
    ) -> Tensor:
        """The function is all there is."""
        return self.forward_uncached(token_ids, last=last, regime=regime, source=source)

    @property
    def bit_identical(self) -> bool:
        """Nobody knows."""
        return False

    def operations(self) -> tuple[Operation, ...]:
        """One, and what it does cannot be seen."""
        return (Operation("the callable", False, "what it calculates cannot be seen"),)

    def detach(self) -> None:
        """Nothing was done to the callable."""
