"""Which attention the decoder of a model of transformers uses, for the time of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel


class Implementation:
    """The attention of one model's decoder; encoders and vision towers keep their own.

    Args:
        model: left as it is. text_config: the config of its decoder.
    """

    def __init__(self, model: PreTrainedModel, text_config: Any) -> None:
        self._configs = _configs_of(model, text_config)

    @contextmanager
    def set_to(self, name: str) -> Iterator[None]:
        """Within the block the decoder uses the implementation of that name; afterwards its owner's."""
        saved = [config._attn_implementation_internal for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation_internal = name
            yield
        finally:
            for config, own in zip(self._configs, saved, strict=True):
                config._attn_implementation_internal = own


def _configs_of(model: PreTrainedModel, text_config: Any) -> list[Any]:
    """The config objects that the decoder's modules ask for their attention implementation."""
    configs = {id(text_config): text_config}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, type(text_config)):
            configs[id(config)] = config
    return list(configs.values())
