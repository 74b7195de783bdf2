"""Whether modules still are as they were when they were recognised: what the kernels bypass must not go unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as module_globals
from torch.utils.hooks import RemovableHandle
from transformers.utils import output_capturing

from kvloom.models.packing.packed import LookedUp, PackedLinear


class Watch:
    """Some modules as they are now.

    A hook, another `forward`, another child or another parameter on any of them changes what calling them would give.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        watched = list(modules)
        # The dictionaries live as long as their module, and are filled and emptied in place.
        self._hooks = [own for module in watched for own in (module._forward_hooks, module._forward_pre_hooks)]
        self._forwards = [(vars(module), vars(module).get("forward")) for module in watched]
        self._types = {type(module): type(module).forward for module in watched}
        self._children = [
            (module._modules, name, child) for module in watched for name, child in module._modules.items()
        ]
        self._parameters = [
            (module._parameters, name, own, own.data_ptr())
            for module in watched
            for name, own in module._parameters.items()
            if own is not None
        ]

    def runs_the_same(self) -> bool:
        """Whether calling the modules would still run nothing but what was there."""
        return not (
            any(_has_hooks(own) for own in self._hooks)
            or module_globals._has_any_global_hook()  # type: ignore[no-untyped-call]
            or any(own.get("forward") is not forward for own, forward in self._forwards)
            or any(kind.forward is not forward for kind, forward in self._types.items())
            or any(own.get(name) is not child for own, name, child in self._children)
        )

    def has_the_same_parameters(self) -> bool:
        """Whether they still are the same objects and lie where they lay; what they hold may have been changed."""
        return all(
            own.get(name) is parameter and parameter.data_ptr() == place
            for own, name, parameter, place in self._parameters
        )


def hooks_registered() -> int:
    """Grows whenever a hook is registered anywhere."""
    return RemovableHandle.next_id


def is_plain(module: nn.Module) -> bool:
    """Whether calling it runs its class's forward, or its packed weight's, and no hooks."""
    forward: Any = vars(module).get("forward")
    ours = forward is None or isinstance(getattr(forward, "__self__", None), PackedLinear | LookedUp)
    return ours and not _has_hooks(module._forward_hooks) and not _has_hooks(module._forward_pre_hooks)


def _has_hooks(hooks: Mapping[int, Callable[..., Any]]) -> bool:
    """Whether any of them does something.

    Those by which transformers captures hidden states stay on a model that was once asked for them, and wait for the
    next time.
    """
    return any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks.values())
