"""A copy of a model with small windows, which shares its weights: long windows cannot be outgrown in a short check."""

from __future__ import annotations

import copy
from typing import Any

from kvloom.errors import UnsupportedModel
from kvloom.models.hosted.base import MOST_ROWS, WINDOW_FIELDS, HostedModel
from kvloom.models.proofs.provable import Provable

SMALL_WINDOW = 8


def with_small_windows(binding: Provable) -> HostedModel:
    """The same weights under a config and modules whose windows or chunks are `SMALL_WINDOW` tokens."""
    assert isinstance(binding, HostedModel), "only of a model of transformers windows are known"
    model = binding.model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        twin = copy.deepcopy(model, shared)
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} has windows longer than the check, and cannot be copied to check them: {error}"
        ) from error
    large = binding.windows()
    for holder in [
        *twin.modules(),
        *(module.config for module in twin.modules() if hasattr(module, "config")),
    ]:
        for attribute in WINDOW_FIELDS:
            if getattr(holder, attribute, None) in large:
                setattr(holder, attribute, SMALL_WINDOW)
    for module in twin.modules():
        if getattr(module, "attn_temperature_tuning", False) and int(getattr(module, "floor_scale", 0)) <= MOST_ROWS:
            module.floor_scale = SMALL_WINDOW
    small = type(binding)(twin)
    if any(limit > SMALL_WINDOW for limit in small.windows()):
        raise UnsupportedModel(
            f"{type(model).__name__} has windows longer than the check, and they cannot be made smaller to check them."
        )
    return small
