"""Which arguments of a call are the model's inputs, and the batch that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvloom.decoding import Options
from kvloom.dropin import sourced
from kvloom.dropin.padding import Batch, read_batch
from kvloom.errors import InvalidRequest
from kvloom.language_model.model import LanguageModel
from kvloom.models import Binding
from kvloom.models.images.vision import MEDIA_INPUTS, NOT_OF_MEDIA


def input_names(binding: Binding) -> tuple[str, ...]:
    """The inputs of a model's forward that are taken; `inputs` stands for the first."""
    if binding.encoder is not None:
        return (binding.encoder.input_name, *sourced.NAMES)
    shown = () if binding.vision is None else sorted(MEDIA_INPUTS | NOT_OF_MEDIA - {"input_ids", "attention_mask"})
    return ("input_ids", "attention_mask", *shown)


def take_inputs(binding: Binding, inputs: Tensor | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs among the arguments of a call, which lose them. None is no input."""
    names = input_names(binding)
    given = {name: own for name in names if (own := arguments.pop(name, None)) is not None}
    if inputs is not None and names[0] in given:
        raise InvalidRequest(f"`inputs` and `{names[0]}` are the same argument. Pass one of them.")
    return given if inputs is None else {names[0]: inputs, **given}


def read_inputs(given: Mapping[str, Any], options: Options, lm: LanguageModel) -> Batch:
    """The prompts of a batch, each without padding."""
    if lm.binding.encoder is not None:
        return sourced.read_sourced_batch(given, options, lm)
    return read_batch(given, options, lm.binding)
