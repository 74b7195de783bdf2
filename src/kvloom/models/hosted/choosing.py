"""Which binding a model of transformers gets: the fastest that proves itself."""

from __future__ import annotations

from transformers import PreTrainedModel

from kvloom.errors import AttachMismatch, KVLoomError, UnsupportedModel
from kvloom.models.hosted.attention_interface import AttentionInterfaceBinding
from kvloom.models.hosted.base import HostedModel
from kvloom.models.hosted.cache_interface import CacheInterfaceBinding, PaddingCacheBinding
from kvloom.models.proofs.imagecheck import prove_images
from kvloom.models.proofs.selfcheck import prove


def bind(model: PreTrainedModel, *, proving: bool = True) -> HostedModel:
    """The attention interface where the model uses it, else the cache interface; `reason` says why not the first.

    Args:
        proving: whether cached output is compared with the model's own; a model without weights has none.

    Raises:
        UnsupportedModel: neither serves. The first binding's difference is named if it got as far as to have one.
    """
    try:
        return _bound(AttentionInterfaceBinding, model, proving)
    except UnsupportedModel as refusal:
        try:
            binding = _bound_to_cache(model, proving)
        except UnsupportedModel as second:
            if isinstance(refusal, AttachMismatch):
                raise refusal from second
            raise second from refusal
        binding.reason = str(refusal)
        return binding


def _bound_to_cache(model: PreTrainedModel, proving: bool) -> HostedModel:
    """With rows of unlike lengths in one pass where that proves right, else apart."""
    try:
        return _bound(PaddingCacheBinding, model, proving)
    except UnsupportedModel:
        return _bound(CacheInterfaceBinding, model, proving)


def _bound(kind: type[HostedModel], model: PreTrainedModel, proving: bool) -> HostedModel:
    try:
        binding = kind(model)
        if proving:
            prove(binding)
            prove_images(binding)
        return binding
    except KVLoomError:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be run on the cache: {type(error).__name__}: {error}"
        ) from error
