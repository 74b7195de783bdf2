"""What the bindings of models of the package x-transformers share.

Its attention caches keys before their rotary turn, and turns all of them anew in each pass, by positions that it counts
from the cache's length. So what it caches belongs to a token alone, and can be paged like anything else: keys and
values are gathered from the store, handed in as the package's own cache, and those of the new tokens are written back.

The package is recognised by its name, and imported only once a model of it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kvloom.cache import LayerShape, Reach, Store
from kvloom.errors import UnsupportedModel
from kvloom.models.dense.batches import DenseBatch

PACKAGE = "x_transformers"


def x_transformers_class(model: object) -> str | None:
    """The class of the package that a model is of, its own or the nearest that it inherits from; None if of none."""
    own = (base.__name__ for base in type(model).__mro__ if base.__module__.split(".")[0] == PACKAGE)
    return next(own, None)


def is_of(model: object, name: str) -> bool:
    """Whether a model is of the package's class `name`."""
    return any(base.__name__ == name and base.__module__.split(".")[0] == PACKAGE for base in type(model).__mro__)


def layer_cache(pairs: Sequence[tuple[Tensor, Tensor]], tokens: int) -> Any:
    """The package's cache of `tokens` tokens: (keys, values) of each attention in the order of the forward pass."""
    from x_transformers.attend import Intermediates
    from x_transformers.x_transformers import LayerIntermediates

    return LayerIntermediates(attn_intermediates=[Intermediates(cached_kv=pair) for pair in pairs], cache_length=tokens)


def attention_layers(module: Any, intermediates: Any) -> tuple[list[int], tuple[LayerShape, ...]]:
    """For each attention in the order of a forward pass its layer in the store, and the store's layers.

    Args:
        intermediates: of a pass over a few tokens.
    """
    shapes = [_shape(own) for own in intermediates.attn_intermediates]
    if all(shape.reach.cross for shape in shapes):
        raise UnsupportedModel(f"this {type(module).__name__} has no self-attention, so it has no past.")
    first = sorted(range(len(shapes)), key=lambda attention: shapes[attention].reach.cross)
    return [first.index(attention) for attention in range(len(shapes))], tuple(shapes[own] for own in first)


def source_dim(decoder: Any) -> int:
    """Width of what the first cross-attention of a decoder projects."""
    attention: Any = next(own for own in _crossing(decoder) if hasattr(own, "to_k"))
    return int(attention.to_k.in_features)


def _crossing(decoder: Any) -> list[nn.Module]:
    """The modules of all cross-attention layers."""
    kinds = zip(decoder.layers, decoder.layer_types, strict=True)
    return [module for (_, block, _), kind in kinds if kind == "c" for module in block.modules()]


def gathered(
    batch: DenseBatch, store: Store, order: Sequence[int], shapes: Sequence[LayerShape]
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of what came before, and of the sources, in the order of a forward pass.

    Each is [batch, kv_heads, tokens, dim]; of a single row, or of a source that all rows read, a view.

    Args:
        order: of each attention its layer in the store.
    """
    slots = batch.read_slots
    before = slice(slots.start, slots.start + batch.past) if isinstance(slots, slice) else slots[:, : batch.past]
    reads: dict[bool, slice | Tensor] = {False: before}
    if batch.source is not None:
        reads[True] = batch.source.slots
    pairs = (store.gather(layer, reads[shapes[layer].reach.cross]) for layer in order)
    return [(keys.expand(batch.batch, -1, -1, -1), values.expand(batch.batch, -1, -1, -1)) for keys, values in pairs]


def rows_of(states: Tensor) -> Tensor:
    """[batch, kv_heads, tokens, dim] as [kv_heads, batch * tokens, dim]."""
    return states.transpose(0, 1).flatten(1, 2)


def refuse_decoder(decoder: Any) -> None:
    """Refuse attention layers whose past is not keys and values of each token."""
    if not decoder.causal:
        raise UnsupportedModel(f"a {type(decoder).__name__} is not causal: its tokens see those after them.")
    modules, crossing = list(decoder.modules()), _crossing(decoder)
    shifts = any(is_of(module, "ShiftTokens") for module in modules)
    reasons = {
        "it shifts features from one token to the next (shift_tokens)": shifts,
        "it changes keys after the fact (attn_selective)": not decoder.can_cache_kv,
        "its cache holds latents in place of keys and values (attn_use_latent_kv)": _any_has(modules, "use_latent_kv"),
        "a recurrent module runs beside its attention (attn_hybrid_module)": _any_has(modules, "hybrid_module"),
        "its bias sums over all inputs before a token, of which the cache holds none (attn_data_dependent_alibi)": (
            _any_has(modules, "data_dependent_alibi")
        ),
        "its cross-attention measures distances from the end of a pass (attn_max_attend_past, "
        "attn_use_rel_proj_pos_bias)": _any_has(crossing, "max_attend_past") or _any_has(crossing, "rel_proj_pos_bias"),
        "none of its layers attends to the source that it wants (cross_attend)": decoder.cross_attend and not crossing,
        "it wants a `condition` in each pass": decoder.need_condition,
    }
    refuse(decoder, reasons)


def running_attentions(decoder: Any) -> list[nn.Module]:
    """The attention modules in the order of a forward pass, one that runs several times as often."""
    blocks = (decoder.layers[index][1] for index in decoder.layers_execute_order)
    return [own for block in blocks for own in block.modules() if is_of(own, "Attention")]


def reason_of(error: Exception) -> str:
    """What an error of the package says; many of its assertions say nothing."""
    return str(error) or f"{type(error).__name__} in its own code."


def refuse(model: Any, reasons: dict[str, bool]) -> None:
    """Refuse a model for the first of the reasons that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModel(f"this {type(model).__name__} cannot be decoded on a cache: {reason}.")


def _any_has(modules: Sequence[nn.Module], attribute: str) -> bool:
    """Whether an attention has something switched on."""
    own = (getattr(module, attribute, None) for module in modules if is_of(module, "Attention"))
    return any(value is not None and value is not False for value in own)


def _shape(attention: Any) -> LayerShape:
    keys, values = attention.cached_kv
    reach = Reach(cross=attention.layer_type == "c")
    return LayerShape(kv_heads=keys.shape[1], key_dim=keys.shape[3], value_dim=values.shape[3], reach=reach)
