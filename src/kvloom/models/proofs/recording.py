"""What goes into and comes out of each attention module of a pass is recorded, and may be replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from kvloom.models.proofs.provable import Provable


@dataclass(frozen=True)
class Trace:
    """What each token of one sequence brought into and out of each attention layer, and the logits of some.

    Attributes:
        rows: by what it is, [tokens, hidden].
        logits: [checked, vocab], of the last tokens of each chunk.
    """

    rows: dict[str, Tensor]
    logits: Tensor


@contextmanager
def recorded(
    binding: Provable, given: dict[str, Tensor] | None = None, order: list[int] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Within the block, what goes into and comes out of each attention module is kept, [tokens, hidden].

    Args:
        given: what the modules are handed instead of the input that was kept.
        order: of the rows, if a binding runs them in several passes; by default as they are.
    """
    rows: dict[str, Tensor] = {}
    passes: dict[str, list[Tensor]] = {}

    def before(names: Iterator[str]) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            name = f"the input of {next(names)}"
            hidden = named.get("hidden_states", inputs[0] if inputs else None)
            if not isinstance(hidden, Tensor) or hidden.dim() != 3:
                return None
            done = sum(map(len, passes.setdefault(name, [])))
            passes[name].append(hidden.flatten(0, -2).detach())
            if given is None:
                return None
            now = slice(done, done + len(passes[name][-1]))
            own = given[name][now if order is None else order[now]].view_as(hidden)
            if "hidden_states" in named:
                return inputs, named | {"hidden_states": own}
            return (own, *inputs[1:]), named

        return hook

    def after(names: Iterator[str]) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            own = (output[0] if isinstance(output, tuple) else output).flatten(0, -2).detach()
            passes.setdefault(next(names), []).append(own)

        return hook

    handles = []
    for module, names in names_of(binding).items():
        handles.append(module.register_forward_pre_hook(before(cycle(names)), with_kwargs=True))
        handles.append(module.register_forward_hook(after(cycle(names))))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
        for name, parts in passes.items():
            rows[name] = torch.cat(parts)
            if order is not None:
                places = torch.tensor(order, device=rows[name].device)
                rows[name] = torch.empty_like(rows[name]).index_copy_(0, places, rows[name])


def names_of(binding: Provable) -> dict[nn.Module, list[str]]:
    """For each attention module a name, or one for each of its runs in a pass: a model may loop over its layers."""
    names: dict[nn.Module, list[str]] = {}
    for call in binding.calls:
        earlier = names.setdefault(call.module, [])
        earlier.append(f"`{call.name}`" + (f" in run {len(earlier) + 1}" if earlier else ""))
    return names
