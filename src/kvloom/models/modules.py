"""Questions about the modules of a model that several bindings ask."""

from __future__ import annotations

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Where the weights of a model lie; those that were given up for packed copies lie nowhere."""
    return next(torch.device(own.device) for own in model.parameters() if own.device.type != "meta")


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT. (The method `active_adapters` of a model needs PEFT to be installed.)"""
    return isinstance(getattr(type(module), "active_adapters", None), property)
