"""A model of transformers is attached at its first call and remembered, because attaching proves itself each time."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from kvloom.attaching import attach
from kvloom.errors import InvalidRequest, UnsupportedModel
from kvloom.language_model.model import LanguageModel

NAME = "_kvloom_attached"


class Attached:
    """What is remembered with a model, for as long as the model lives.

    It stands among the model's own attributes: in a table of ours, even under a weak key, the language model would hold
    the model that is its key, and neither would ever go. Copies and pickles of the model remember nothing.
    """

    def __init__(self, lm: LanguageModel | None = None) -> None:
        self.lm = lm

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        return Attached()

    def __reduce__(self) -> tuple[type[Attached], tuple[()]]:
        return Attached, ()


def language_model(model: Any, tokenizer: Any) -> LanguageModel:
    """`model` attached, with its present generation config.

    Args:
        model: a language model of transformers (PEFT's wrapper around one too), or a `LanguageModel`.
        tokenizer: for stop strings; by default that of the `LanguageModel`.
    """
    if isinstance(model, LanguageModel):
        lm, config = model, model.generation_config
    else:
        wrapped = _transformers_model(model)
        lm, config = _remembered(model, wrapped), wrapped.generation_config
    tokenizer = lm.tokenizer if tokenizer is None else tokenizer
    return LanguageModel(lm.engine, tokenizer, config, lm.retention, processor=lm.processor)


def _transformers_model(model: Any) -> PreTrainedModel:
    wrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(wrapped, PreTrainedModel):
        raise InvalidRequest(
            f"`model` must be a model of transformers or a LanguageModel; got {type(model).__name__}. Attach a "
            "callable with kvloom.attach(callable, vocab_size=...) and pass what that returns."
        )
    return wrapped


def _remembered(model: Any, wrapped: PreTrainedModel) -> LanguageModel:
    found = vars(model).get(NAME)
    lm = found.lm if isinstance(found, Attached) else None
    # A shallow copy of a model has the same attributes and other modules.
    if lm is None or getattr(lm.binding, "model", None) is not wrapped or not _is_ready(lm):
        lm = attach(model)
        vars(model)[NAME] = Attached(lm)
    return lm


def _is_ready(lm: LanguageModel) -> bool:
    """False for a model that was moved; also for one in training mode, of which `attach` says so."""
    try:
        lm.binding.check_ready()
    except UnsupportedModel:
        return False
    return True
