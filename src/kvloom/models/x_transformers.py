"""Models of the package x-transformers, attached through its own cache.

Its attention caches keys before their rotary turn, and turns all of them anew in each pass, by positions that it counts
from the cache's length. So what it caches belongs to a token alone, and can be paged like anything else: keys and
values are gathered from the store, handed in as the package's own cache, and those of the new tokens are written back.

The package is recognised by its name, and imported only once a model of it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvloom.errors import KVLoomError, UnsupportedModel
from kvloom.models.cached_callable import CachedCallableBinding
from kvloom.models.probe import AttentionCall
from kvloom.models.selfcheck import prove

PACKAGE = "x_transformers"
Pairs = tuple[tuple[Tensor, Tensor], ...]


def x_transformers_class(model: object) -> str | None:
    """The class of the package that a model is of, its own or the nearest that it inherits from; None if of none."""
    own = (base.__name__ for base in type(model).__mro__ if base.__module__.split(".")[0] == PACKAGE)
    return next(own, None)


def is_of(model: object, name: str) -> bool:
    """Whether a model is of the package's class `name`."""
    return any(base.__name__ == name and base.__module__.split(".")[0] == PACKAGE for base in type(model).__mro__)


def bind_wrapper(wrapper: Any) -> XTransformersBinding:
    """Attach a `TransformerWrapper`, proven by the same check as every model.

    Raises:
        UnsupportedModel: it cannot be decoded on a cache; says why.
    """
    if not is_of(wrapper, "TransformerWrapper"):
        raise UnsupportedModel(
            f"of x-transformers a TransformerWrapper or a Decoder can be attached; this is a {type(wrapper).__name__}. "
            "Attach what it wraps, such as the `net` of an AutoregressiveWrapper."
        )
    refuse_decoder(wrapper.attn_layers)
    _refuse_wrapper(wrapper)
    try:
        binding = XTransformersBinding(wrapper)
        binding.check_ready()
        prove(binding)
    except KVLoomError:
        raise
    except Exception as error:
        raise UnsupportedModel(f"this {type(wrapper).__name__} cannot be run on its own cache: {error}") from error
    return binding


class XTransformersBinding(CachedCallableBinding):
    """A `TransformerWrapper` around a `Decoder`: token ids to logits.

    Args:
        wrapper: in evaluation mode. Its weights and mode are left as they are.
    """

    name = "x-transformers cache"

    def __init__(self, wrapper: Any) -> None:
        device = next(wrapper.parameters()).device
        super().__init__(_speaking(wrapper), max_tokens=wrapper.max_seq_len or None, device=device)
        attentions = [(name, own) for name, own in wrapper.named_modules() if is_of(own, "Attention")]
        # A module that runs more than once in a pass has more than one input, so only the logits are compared.
        if len(attentions) == len(self.layers):
            self.calls = tuple(
                AttentionCall(own, name, shape) for (name, own), shape in zip(attentions, self.layers, strict=True)
            )


def layer_cache(pairs: Sequence[tuple[Tensor, Tensor]], tokens: int) -> Any:
    """The package's cache of `tokens` tokens: (keys, values) of each attention in the order of the forward pass."""
    from x_transformers.attend import Intermediates
    from x_transformers.x_transformers import LayerIntermediates

    return LayerIntermediates(attn_intermediates=[Intermediates(cached_kv=pair) for pair in pairs], cache_length=tokens)


def refuse_decoder(decoder: Any) -> None:
    """Refuse attention layers whose past is not keys and values of each token."""
    if not decoder.causal:
        raise UnsupportedModel(f"a {type(decoder).__name__} is not causal: its tokens see those after them.")
    modules = list(decoder.modules())
    shifts = any(is_of(module, "ShiftTokens") for module in modules)
    reasons = {
        "it shifts features from one token to the next (shift_tokens)": shifts,
        "it changes keys after the fact (attn_selective)": not decoder.can_cache_kv,
        "its cache holds latents in place of keys and values (attn_use_latent_kv)": _any_has(modules, "use_latent_kv"),
        "a recurrent module runs beside its attention (attn_hybrid_module)": _any_has(modules, "hybrid_module"),
        "its bias sums over all inputs before a token, of which the cache holds none (attn_data_dependent_alibi)": (
            _any_has(modules, "data_dependent_alibi")
        ),
        "it wants a `condition` in each pass": decoder.need_condition,
    }
    _refuse(decoder, reasons)


def _refuse_wrapper(wrapper: Any) -> None:
    reasons = {
        "it attends to a context, which token ids alone do not give. Attach its decoder, `wrapper.attn_layers`, which "
        "takes `encoder_outputs`": wrapper.attn_layers.cross_attend,
        "it carries recurrent memories from segment to segment (max_mem_len)": wrapper.max_mem_len > 0,
        "it puts memory tokens before each input (num_memory_tokens)": wrapper.num_memory_tokens > 0,
        "it runs its layers over their own output (recycling or looped)": wrapper.recycling or wrapper.looped,
        "it wants more than token ids (embed_num_tokens)": wrapper.embeds is not None,
        "it gives no logits for each token (return_only_embed, average_pool_embed or use_cls_token)": (
            wrapper.to_logits is None or wrapper.average_pool_embed or wrapper.cls_token is not None
        ),
        "it gives several logits a token (num_output_heads)": wrapper.has_multiple_heads,
    }
    _refuse(wrapper, reasons)


def _refuse(model: Any, reasons: dict[str, bool]) -> None:
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModel(f"this {type(model).__name__} cannot be decoded on a cache: {reason}.")


def _any_has(modules: Sequence[nn.Module], attribute: str) -> bool:
    """Whether an attention has something switched on."""
    own = (getattr(module, attribute, None) for module in modules if is_of(module, "Attention"))
    return any(value is not None and value is not False for value in own)


@dataclass(frozen=True)
class _Output:
    logits: Tensor
    past_key_values: Pairs | None


def _speaking(wrapper: Any) -> Callable[..., _Output]:
    """A wrapper that speaks the cache protocol, its past as pairs of keys and values."""

    def run(token_ids: Tensor, *, past_key_values: Pairs | None = None, use_cache: bool = False) -> _Output:
        if not use_cache:
            return _Output(wrapper(token_ids), None)
        cache = None
        if past_key_values is not None:
            cache = layer_cache(past_key_values, past_key_values[0][0].shape[2])
        logits, intermediates = wrapper(
            token_ids,
            cache=cache,
            input_not_include_cache=True,
            cache_age=token_ids.shape[1],  # of how many last tokens it runs: by default, of one
            return_intermediates=True,
        )
        return _Output(logits, tuple(own.cached_kv for own in intermediates.attn_intermediates))

    return run


__all__ = ["XTransformersBinding", "bind_wrapper", "is_of", "layer_cache", "refuse_decoder", "x_transformers_class"]
