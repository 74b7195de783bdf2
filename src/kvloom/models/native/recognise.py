"""Decoder layers that the native kernels know, found by what they are made of, not by what they are called.

A layer is recognised if it consists of an RMS norm, attention with query, key, value and output projections (perhaps
with norms of the heads), a second RMS norm, and a gated perceptron with SiLU. Whether it also puts them together as
the kernels do is not believed but measured (`proof`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ATTENTION_NAMES = ("self_attn", "attention")
"""Attributes under which layers keep their attention."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm."""

    module: nn.Module
    epsilon: float

    @property
    def weight(self) -> torch.Tensor:
        """float[columns]."""
        weight: torch.Tensor = self.module.weight  # type: ignore[assignment]
        return weight


@dataclass(frozen=True)
class LayerParts:
    """The modules of a decoder layer, by what they do.

    Attributes:
        layer, attention: the modules around them.
        query_norm, key_norm: of each head; None if there are none.
        heads, kv_heads, head_dim: of its attention.
        scaling: factor on the scores.
    """

    layer: nn.Module
    attention: nn.Module
    input_norm: Norm
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    query_norm: Norm | None
    key_norm: Norm | None
    output: nn.Linear
    post_norm: Norm
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """In the order in which they run."""
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Those that there are."""
        return tuple(n for n in (self.input_norm, self.query_norm, self.key_norm, self.post_norm) if n is not None)


@dataclass(frozen=True)
class ModelParts:
    """What is around the layers.

    Attributes:
        embedding: of the tokens.
        rotary: computes the cosines and sines of all layers.
        layers: every decoder layer, in order.
        norm: the last one. head: gives the logits.
    """

    embedding: nn.Embedding
    rotary: nn.Module
    layers: tuple[nn.Module, ...]
    norm: Norm
    head: nn.Linear


class Unrecognised(Exception):
    """What is not as the kernels want it, in half a sentence."""


def recognise_layer(layer: nn.Module, *, kv_heads: int, head_dim: int) -> LayerParts:
    """The parts of a decoder layer.

    Args:
        kv_heads, head_dim: what the probe saw its attention keep.

    Raises:
        Unrecognised: it is made of something else.
    """
    children = dict(layer.named_children())
    attention_name = next((name for name in ATTENTION_NAMES if name in children), None)
    if attention_name is None:
        raise Unrecognised("has no attention of its own")
    attention, mlp = children.pop(attention_name), children.pop("mlp", None)
    if mlp is None:
        raise Unrecognised("has no perceptron")
    input_norm = _norm(children.pop("input_layernorm", None), "input_layernorm")
    post_norm = _norm(children.pop("post_attention_layernorm", None), "post_attention_layernorm")
    _refuse_others(children)
    for own in (layer, attention, mlp):
        if own._parameters:
            raise Unrecognised(f"has weights of its own: `{next(iter(own._parameters))}`")
    query, key, value, output, query_norm, key_norm = _attention_parts(attention)
    gate, up, down = _perceptron_parts(mlp)
    if key.out_features != kv_heads * head_dim or query.out_features % head_dim:
        raise Unrecognised("has projections that are not as wide as its heads")
    scaling = getattr(attention, "scaling", None)
    return LayerParts(
        layer=layer,
        attention=attention,
        input_norm=input_norm,
        query=query,
        key=key,
        value=value,
        query_norm=query_norm,
        key_norm=key_norm,
        output=output,
        post_norm=post_norm,
        gate=gate,
        up=up,
        down=down,
        heads=query.out_features // head_dim,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scaling=float(head_dim**-0.5 if scaling is None else scaling),
    )


def recognise_model(model: Any, layers: list[nn.Module]) -> ModelParts:
    """What is around the decoder layers `layers` of a causal language model.

    Raises:
        Unrecognised: there is something else.
    """
    base = model.get_decoder() if hasattr(model, "get_decoder") else model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    children = dict(base.named_children())
    rotary = children.pop("rotary_emb", None)
    norm = _norm(children.pop("norm", None), "norm")
    if rotary is None or not isinstance(getattr(rotary, "inv_freq", None), torch.Tensor):
        raise Unrecognised("has no rotary positions that all layers share")
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        raise Unrecognised("has embeddings of another kind")
    if type(head) is not nn.Linear:
        raise Unrecognised("has an output layer of another kind")
    stacks = [name for name, own in children.items() if isinstance(own, nn.ModuleList)]
    inside = [own for name in stacks for own in children.pop(name)]
    _refuse_others({name: own for name, own in children.items() if own is not embedding})
    if [id(own) for own in inside] != [id(own) for own in layers]:
        raise Unrecognised("has layers that are not decoder layers")
    _refuse_others({name: own for name, own in model.named_children() if own is not base and own is not head})
    return ModelParts(embedding=embedding, rotary=rotary, layers=tuple(layers), norm=norm, head=head)


def _attention_parts(
    attention: nn.Module,
) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear, Norm | None, Norm | None]:
    children = dict(attention.named_children())
    query, key, value, output = (_linear(children, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    norms = [children.pop(name, None) for name in ("q_norm", "k_norm")]
    _refuse_others(children)
    query_norm, key_norm = (
        None if own is None else _norm(own, name) for own, name in zip(norms, ("q_norm", "k_norm"), strict=True)
    )
    return query, key, value, output, query_norm, key_norm


def _perceptron_parts(mlp: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    children = dict(mlp.named_children())
    gate, up, down = (_linear(children, name) for name in ("gate_proj", "up_proj", "down_proj"))
    activation = children.pop("act_fn", getattr(mlp, "act_fn", None))
    _refuse_others(children)
    numbers = torch.linspace(-6, 6, 25)
    if activation is None or not torch.allclose(activation(numbers), nn.functional.silu(numbers), atol=1e-5):
        raise Unrecognised("has another activation than SiLU")
    return gate, up, down


def _linear(children: dict[str, nn.Module], name: str) -> nn.Linear:
    module = children.pop(name, None)
    if module is None:
        raise Unrecognised(f"has no `{name}`")
    if type(module) is not nn.Linear:
        raise Unrecognised(f"has a {type(module).__name__} for `{name}`")
    return module


def _norm(module: nn.Module | None, name: str) -> Norm:
    if module is None:
        raise Unrecognised(f"has no `{name}`")
    epsilon = next((getattr(module, own) for own in ("variance_epsilon", "eps") if hasattr(module, own)), None)
    parameters = dict(module.named_parameters())
    if set(parameters) != {"weight"} or parameters["weight"].dim() != 1 or not isinstance(epsilon, float):
        raise Unrecognised(f"has a {type(module).__name__} for `{name}`")
    return Norm(module, epsilon)


def _refuse_others(children: dict[str, nn.Module]) -> None:
    """Refuse modules that nothing is known of; those without children and weights count too: they may calculate."""
    others: Iterator[str] = iter(children)
    if (name := next(others, None)) is not None:
        raise Unrecognised(f"has a {type(children[name]).__name__} `{name}` besides")
