"""A model built from its config alone: shapes and dtypes of all weights, and no memory behind them.

Its tensors are PyTorch's fake tensors, which know their shape, dtype and device. Indices stay real: token ids,
positions and masks are made by operators that touch no weight. So whatever looks at masks and positions, such as
the probe, works on this model as it does on the real one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from kvloom.errors import KVLoomError, UnsupportedModel, first_line
from kvloom.models.hosted.base import HostedModel
from kvloom.models.hosted.choosing import bind

NUMBERS_MISSING = (DataDependentOutputException, DynamicOutputShapeException)
"""What operators raise whose course depends on numbers."""


class Fakes(FakeTensorMode):
    """Fake tensors that may meet real ones, which then count for their shape.

    Attributes:
        building: whether weights are being drawn. Some are drawn anew until none lies too far out; here none does.
    """

    building = False

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # type: ignore[no-untyped-call]

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The shape of what an operator returns."""
        if func is torch.ops.aten._grouped_mm.default and args[0].dim() == 2:
            # PyTorch's rule for mixtures of experts wants bfloat16; its CPU kernel takes other dtypes too.
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        try:
            return super().dispatch(func, types, args, kwargs)
        except DataDependentOutputException:
            if self.building and func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
                return False
            raise


@dataclass(frozen=True)
class Weightless:
    """A binding whose model has no weights.

    Attributes:
        fakes: within `with fakes:`, new tensors have no memory either.
    """

    binding: HostedModel
    fakes: Fakes


def auto_class(config: Any) -> Any:
    """The class of transformers that makes a language model of a config: with the encoder that it has, of whatever."""
    if getattr(config, "is_encoder_decoder", False):
        if config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            return AutoModelForSeq2SeqLM
        if config.model_type in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
            return AutoModelForSpeechSeq2Seq
    elif getattr(config, "vision_config", None) is not None and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def build_weightless(config: Any, dtype: torch.dtype) -> Weightless:
    """The language model of a transformers config, as loading it in `dtype` would make it.

    Raises:
        UnsupportedModel: as attaching the real model would, as far as shapes and masks tell.
    """
    fakes = Fakes()
    try:
        with fakes, torch.no_grad():
            fakes.building = True
            model = auto_class(config).from_config(config, dtype=dtype).eval()
            fakes.building = False
            _keep_in_float32(model, dtype)
    except (ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise UnsupportedModel(
            f"the config describes no language model that can be built: {first_line(error)}"
        ) from error
    with following_shapes(model):
        return Weightless(bind(model, proving=False), fakes)


@contextmanager
def following_shapes(model: nn.Module) -> Iterator[None]:
    """Within the block, a model whose course depends on numbers, which it does not have here, is refused as such."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(error, KVLoomError) and not isinstance(cause, NUMBERS_MISSING):
            raise
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be followed without weights ({type(cause).__name__}), so it cannot be "
            "planned from its config. Attaching it may work all the same."
        ) from error


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Widen the weights that loading keeps in float32 whatever dtype is asked for."""
    wide = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    for name, parameter in model.named_parameters():
        if any(re.search(pattern.replace("*", ".*"), name) for pattern in wide):
            parameter.data = parameter.data.to(torch.float32)
