"""Rotary factors that depend on the longest position: longrope and dynamic NTK.

transformers chooses these factors from the largest position of a forward pass and keeps them on the module,
so one request's length would change another's keys. Here the factors belong to a sequence: its regime is what
they depend on, each forward pass runs sequences of one regime, and the module is put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvloom.models.binding import Regime


class _Factors:
    """One set of inverse frequencies of one rotary module."""

    def __init__(self, module: torch.nn.Module, layer_type: str | None) -> None:
        self.module = module
        self.layer_type = layer_type
        rope_type: Any = module.rope_type
        parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
        self.rope_type: str = rope_type if layer_type is None else rope_type[layer_type]
        own = parameters if layer_type is None else parameters[layer_type]
        # transformers compares longrope's length with the checkpoint's first context, dynamic's with its own.
        if self.rope_type == "longrope":
            self.trained_tokens = int(own["original_max_position_embeddings"])
        else:
            self.trained_tokens = int(module.original_max_seq_len)  # type: ignore[arg-type]
        self._prefix = "" if layer_type is None else f"{layer_type}_"

    def regime(self, tokens: int) -> int:
        """0 within the trained length; beyond it 1 for longrope, the length itself for dynamic factors."""
        if tokens <= self.trained_tokens:
            return 0
        return 1 if self.rope_type == "longrope" else tokens

    def apply(self, regime: int) -> None:
        """Set the module's inverse frequencies to those of `regime`."""
        module: Any = self.module
        original = getattr(module, f"{self._prefix}original_inv_freq")
        buffer = getattr(module, f"{self._prefix}inv_freq")
        inv_freq = original.to(buffer.device)
        if regime:
            length = self.trained_tokens + 1 if self.rope_type == "longrope" else regime
            # A tensor, as transformers has it: a plain number would be calculated with in other precision.
            seq_len = torch.tensor(length, device=buffer.device)
            named = {} if self.layer_type is None else {"layer_type": self.layer_type}
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[self.rope_type](
                module.config, buffer.device, seq_len=seq_len, **named
            )
            if self.rope_type != "longrope":
                setattr(module, f"{self._prefix}attention_scaling", scaling)
        setattr(module, f"{self._prefix}inv_freq", inv_freq)


class RotaryRegimes:
    """All rotary modules of a model whose factors depend on length."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._factors = [factors for module in model.modules() for factors in _factors_of(module)]

    @property
    def depend_on_length(self) -> bool:
        """Whether any factor depends on a sequence's length."""
        return bool(self._factors)

    def regime(self, tokens: int) -> Regime:
        """What the factors of a sequence of that many tokens depend on."""
        return tuple(factors.regime(tokens) for factors in self._factors)

    @contextmanager
    def fixed(self, regime: Regime) -> Iterator[None]:
        """Within the block the modules use the factors of `regime`, whatever positions they see."""
        if not self._factors:
            yield
            return
        assert isinstance(regime, tuple), "a regime comes from RotaryRegimes.regime"
        modules: list[Any] = list({id(f.module): f.module for f in self._factors}.values())
        saved = [(module, dict(module.__dict__), dict(module._buffers)) for module in modules]
        try:
            for factors, value in zip(self._factors, regime, strict=True):
                factors.apply(value)
            for module in modules:
                # Any other name switches off transformers' own update, which runs inside the module's forward.
                module.rope_type = _fixed_name(module.rope_type)
            yield
        finally:
            for module, attributes, buffers in saved:
                module.__dict__.update(attributes)
                module._buffers.update(buffers)


def _factors_of(module: torch.nn.Module) -> list[_Factors]:
    rope_type = getattr(module, "rope_type", None)
    if isinstance(rope_type, str):
        return [_Factors(module, None)] if _depends_on_length(rope_type) else []
    if isinstance(rope_type, dict):
        return [_Factors(module, layer) for layer, own in rope_type.items() if _depends_on_length(own)]
    return []


def _depends_on_length(rope_type: str) -> bool:
    return rope_type == "longrope" or "dynamic" in rope_type


def _fixed_name(rope_type: str | dict[str, str]) -> str | dict[str, str]:
    return "default" if isinstance(rope_type, str) else dict.fromkeys(rope_type, "default")
