"""What a model of transformers shows of its inside, by its own `output_attentions` and `output_hidden_states`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kvloom.attention import View, Wanted
from kvloom.errors import UnsupportedOption

INSTALLED = "_output_capturing_hooks_installed"
"""What transformers notes on a model whose modules have its capturing hooks."""


def asked(wanted: Wanted) -> dict[str, bool]:
    """The arguments of a forward pass that shows what is wanted."""
    named = {"output_attentions": wanted.attentions, "output_hidden_states": wanted.hidden_states}
    return {name: True for name, own in named.items() if own}


@contextmanager
def without_traces(model: nn.Module) -> Iterator[None]:
    """Within the block the model may be asked to show; afterwards its modules have the hooks that they had.

    transformers captures by hooks that it leaves on the modules after the first such call. They do nothing unless asked
    again, but a module with hooks can neither be pickled nor be told from one that its owner has changed.
    """
    modules: list[Any] = list(model.modules())
    noted = [module for module in modules if INSTALLED in vars(module)]
    hooks = [set(module._forward_hooks) for module in modules]
    try:
        yield
    finally:
        for module, before in zip(modules, hooks, strict=True):
            for hook in set(module._forward_hooks) - before:
                del module._forward_hooks[hook]
            if module not in noted:
                vars(module).pop(INSTALLED, None)


def hidden_states_in(output: Any, wanted: Wanted) -> tuple[Tensor, ...]:
    """Of the output of a forward pass, each [batch, tokens, hidden]; empty unless they are wanted."""
    return _layers(output, "hidden_states") if wanted.hidden_states else ()


def views_in(output: Any, wanted: Wanted) -> list[View]:
    """What the output of a forward pass shows of each sequence of its batch.

    Raises:
        UnsupportedOption: the model does not give what is wanted.
    """
    attentions = _layers(output, "attentions") if wanted.attentions else ()
    cross = _layers(output, "cross_attentions", may_lack=True) if wanted.attentions else ()
    states = hidden_states_in(output, wanted)

    def of(row: int, layers: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return tuple(own[row] for own in layers) or None

    return [View(of(row, attentions), of(row, cross), of(row, states)) for row in range(len(output.logits))]


def _layers(output: Any, name: str, *, may_lack: bool = False) -> tuple[Tensor, ...]:
    """A field of the output of a decoder, or of an encoder-decoder model's decoder."""
    decoders = f"decoder_{name}"
    layers: tuple[Any, ...] = getattr(output, decoders if hasattr(output, decoders) else name, None) or ()
    if any(not isinstance(own, Tensor) for own in layers) or not (layers or may_lack):
        raise UnsupportedOption(f"`output_{name}` is not supported: the model's own forward does not return them.")
    if name == "hidden_states" and any(own.dim() != 3 for own in layers):
        shape = list(layers[0].shape)
        raise UnsupportedOption(
            f"`output_{name}` is not supported: those of the model are not rows of tokens, but have the shape {shape}."
        )
    return tuple(layers)
