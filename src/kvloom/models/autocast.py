"""Autocast chooses dtypes while a model runs: what is cached under it is not what is computed without it."""

from __future__ import annotations

import torch

from kvloom.errors import UnsupportedModel


def refuse_autocast(device: torch.device) -> None:
    """Raise `UnsupportedModel` within an autocast block for this device.

    Modules would cast where native kernels do not, and keys and values of both kinds would meet in one cache.
    """
    if torch.is_autocast_enabled(device.type):
        raise UnsupportedModel(
            f"autocast is switched on for {device.type}, and a cache keeps the dtype of the weights. Leave the "
            "autocast block, or convert the model to the dtype that is wanted and attach that."
        )
