"""What a model's weights take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kvloom.models import HostedModel
from kvloom.models.packing.packed import packable
from kvloom.models.packing.packings import choose_packing


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes of a model's weights.

    Attributes:
        plain_bytes: parameters, tied ones once, and buffers.
        packed_bytes: the copies of linear layers in the layout that the CPU reads fastest.
        given_up_bytes: the plain weights that `load` gives up for their packed copies.
        converted_bytes: of the checkpoint, if it is in another dtype than the weights are wanted in.
    """

    plain_bytes: int
    packed_bytes: int
    given_up_bytes: int
    converted_bytes: int = 0

    @property
    def load_bytes(self) -> int:
        """What is in memory after `load`: one copy, and a second one of what packed layers share with others."""
        return self.attach_bytes - self.given_up_bytes

    @property
    def attach_bytes(self) -> int:
        """What is in memory after `attach`: the owner's weights and the packed copies."""
        return self.plain_bytes + self.packed_bytes


def count_weights(model: PreTrainedModel, *, checkpoint_dtype: torch.dtype | None = None) -> Weights:
    """Bytes of a model's weights, and of what `load` and `attach` make of them."""
    packing = choose_packing()
    weights = packable(model, packing)
    tensors = [*model.parameters(), *model.buffers()]
    checkpoint = model.dtype if checkpoint_dtype is None else checkpoint_dtype
    elements = sum(parameter.numel() for parameter in model.parameters())
    return Weights(
        plain_bytes=sum(tensor.nbytes for tensor in tensors),
        packed_bytes=sum(packing.packed_bytes(own.matrix) for own in weights) if packing else 0,
        given_up_bytes=sum(own.parameter.nbytes for own in weights if packing and own.can_be_given_up(packing)),
        converted_bytes=0 if checkpoint == model.dtype else elements * checkpoint.itemsize,
    )


def held_bytes(binding: HostedModel) -> int:
    """Bytes of the weights that a loaded model holds in memory."""
    tensors = [*binding.model.parameters(), *binding.model.buffers()]
    plain: int = sum(tensor.nbytes for tensor in tensors if tensor.device.type != "meta")
    return plain + (0 if binding.packed is None else binding.packed.packed_bytes)
