"""What a model does, and which of it runs in native kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from kvloom.models.packing.packed import PackedLinears
from kvloom.models.packing.products import is_product


@dataclass(frozen=True)
class Operation:
    """Something that a model does.

    Attributes:
        name: of the module, or of what it does.
        native: whether kernels do it.
        reason: why not, in half a sentence; empty if they do.
    """

    name: str
    native: bool
    reason: str = ""


def linear_operations(model: nn.Module, packed: PackedLinears | None) -> list[Operation]:
    """The linear layers of a model."""
    return [
        Operation(name, not (reason := _why_not(module, packed)), reason)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_product(module)
    ]


def _why_not(module: Any, packed: PackedLinears | None) -> str:
    if packed is not None and packed.weight_of(module) is not None:
        return ""
    if packed is None or not packed.is_native:
        return "there are no native kernels for it here"
    if not is_product(module):
        return f"a {type(module).__name__} is no plain linear layer"
    if "forward" in module.__dict__ and packed.plain_weight(module) is None:
        return "its forward was replaced"
    return f"is not packed: its weight is {module.weight.dtype} on {module.weight.device}, or an adapter wraps it"
