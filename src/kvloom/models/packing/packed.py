"""Linear layers over weights that are packed once for the CPU that they run on.

A decode step reads every weight once, so it is as fast as weights can be read; `F.linear` reads plain weights at a
third of the memory bandwidth for one to eight rows (measured in `benchmarks/README.md`).

A model that is ours alone, from `load` or `attach(exclusive=True)`, gives its plain weights up as they are packed, so
that one copy is in memory. Tied embeddings look their rows up in the packed weight. `restore` undoes all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvloom.exclusive import interruptible
from kvloom.models.modules import is_adapter
from kvloom.models.packing.mapped import Range, drop_pages, mapped_files
from kvloom.models.packing.packings import Packing, is_right
from kvloom.models.packing.products import as_matrix, is_product, keeps_transposed
from kvloom.native.linear import PackedWeight


@dataclass(eq=False)
class Weight:
    """A parameter and all that use it.

    Attributes:
        linears: plain linear layers, which use it packed.
        transposed: whether these keep it as [inner, outputs].
        embeddings: plain embeddings, which can look its rows up.
        elsewhere: whether anything else uses it.
    """

    parameter: nn.Parameter
    linears: list[nn.Module] = field(default_factory=list)
    transposed: bool = False
    embeddings: list[nn.Embedding] = field(default_factory=list)
    elsewhere: bool = False

    @property
    def matrix(self) -> Tensor:
        """[outputs, inner], as it is packed."""
        return as_matrix(self.parameter, transposed=self.transposed)

    def can_be_given_up(self, packing: Packing) -> bool:
        """Whether nobody needs it plain."""
        rows_can_be_looked_up = packing.is_native and not self.transposed
        return not self.elsewhere and (rows_can_be_looked_up or not self.embeddings)


def packable(model: nn.Module, packing: Packing | None, *, exclusive: bool = False) -> list[Weight]:
    """The weights of a model's plain linear layers on a CPU that are of a dtype and a size that packing helps.

    What adapters and quantizers put in the place of a linear layer is left alone. So is, in a model that is to give its
    weights up, the layer that an adapter wraps: adapters are merged into plain weights.
    """
    if packing is None:
        return []
    weights: dict[int, Weight] = {}
    wrapped = {id(own) for outer in model.modules() if exclusive and is_adapter(outer) for own in outer.modules()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            weight = weights.setdefault(id(parameter), Weight(parameter))
            if name == "weight" and id(module) not in wrapped and is_product(module) and _is_plain(module):
                weight.linears.append(module)
                weight.transposed = keeps_transposed(module)
            elif name == "weight" and type(module) is nn.Embedding and _is_plain(module) and module.max_norm is None:
                weight.embeddings.append(module)
            else:
                weight.elsewhere = True
    return [
        weight
        for weight in weights.values()
        if weight.linears
        and weight.parameter.device.type == "cpu"
        and weight.parameter.dtype in packing.dtypes
        and weight.parameter.numel() >= packing.min_weights
    ]


class PackedLinear:
    """A linear layer that uses a packed weight.

    Args:
        adapter: what wraps the layer and may be merged into its weight; None if nothing does.
    """

    def __init__(self, module: nn.Module, packing: Packing, packed: Any, adapter: nn.Module | None = None) -> None:
        self.module: Any = module
        self.packed = packed
        self._packing = packing
        self._adapter = adapter
        self._seen = self._state()

    def refresh(self) -> None:
        """Pack again if the owner has replaced the weight, written to it, or merged adapters into it."""
        if self._seen != self._state():
            matrix = as_matrix(self.module.weight, transposed=keeps_transposed(self.module))
            self.packed = self._packing.pack(matrix)
            self._seen = self._state()

    def _state(self) -> tuple[int, int, tuple[str, ...]]:
        """Changes when the weight is replaced or written to; PEFT merges without a trace, but says what it merged."""
        weight = self.module.weight
        merged = () if self._adapter is None else tuple(getattr(self._adapter, "merged_adapters", ()))
        return weight.data_ptr(), 0 if weight.is_inference() else weight._version, merged

    def forward(self, input: Tensor) -> Tensor:
        """What the layer's own forward returns."""
        return self._packing.linear(input, self.packed, self.module.bias)


class LookedUp:
    """An embedding that looks rows up in a packed weight."""

    def __init__(self, packing: Packing, packed: Any) -> None:
        self._packing = packing
        self._packed = packed

    def forward(self, input: Tensor) -> Tensor:
        """What `nn.Embedding.forward` returns."""
        return self._packing.look_up(self._packed, input)


class GivenUp:
    """A parameter without its memory. In its modules a placeholder with its shape and dtype stands for it."""

    def __init__(self, weight: Weight, packed: Any, files: list[Range]) -> None:
        self._parameter, self._transposed = weight.parameter, weight.transposed
        self._users: list[Any] = [*weight.linears, *weight.embeddings]
        self._packed = packed
        placeholder = nn.Parameter(weight.parameter.to("meta"), requires_grad=False)
        for module in self._users:
            module.weight = placeholder
        drop_pages(weight.parameter, files)
        # The object stays, with all that its owner has hung on it.
        self._parameter.data = torch.empty(0, dtype=self._parameter.dtype)

    def restore(self, packing: Packing) -> None:
        """Put it back as it was."""
        self._parameter.data = as_matrix(packing.unpack(self._packed), transposed=self._transposed).contiguous()
        for module in self._users:
            module.weight = self._parameter


class PackedLinears:
    """The packed copies of a model's linear layers.

    Args:
        packing: how; None packs nothing.
        exclusive: whether the model is ours. Then the plain weights that nothing else uses are given up, and every
            forward pass uses the packed ones. Else the owner's weights stay, and packed ones are used within
            `active` alone.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, packing: Packing | None, *, exclusive: bool) -> None:
        self._exclusive = exclusive
        self._packing = packing
        self._layers: dict[nn.Module, PackedLinear] = {}
        self._packed_of: dict[nn.Module, Any] = {}
        self._given_up: list[GivenUp] = []
        self.packed_bytes = 0
        if packing is None:
            return
        weights = packable(model, packing, exclusive=exclusive)
        packing.reserve(weight.matrix for weight in weights)
        files = mapped_files() if exclusive else []
        self._adapters = {own: outer for outer in model.modules() if is_adapter(outer) for own in outer.modules()}
        # One by one, so that a whole second copy is never in memory.
        try:
            for weight in weights:
                with interruptible():
                    packed = _pack(weight, packing, files if exclusive and weight.can_be_given_up(packing) else [])
                if packed is not None:
                    self._take_over(weight, packing, packed, files)
        except BaseException:
            self.restore()
            raise

    def _take_over(self, weight: Weight, packing: Packing, packed: Any, files: list[Range]) -> None:
        self.packed_bytes += packing.packed_bytes(weight.matrix)
        for module in weight.linears:
            self._layers[module] = PackedLinear(module, packing, packed, self._adapters.get(module))
            self._packed_of[module] = packed
        if not self._exclusive:
            return
        for module in weight.linears:
            module.__dict__["forward"] = self._layers[module].forward
        if weight.can_be_given_up(packing):
            for embedding in weight.embeddings:
                embedding.__dict__["forward"] = LookedUp(packing, packed).forward
                self._packed_of[embedding] = packed
            self._given_up.append(GivenUp(weight, packed, files))

    @property
    def is_native(self) -> bool:
        """Whether the native kernels' packing is used."""
        return self._packing is not None and self._packing.is_native

    def weight_of(self, module: nn.Module) -> PackedWeight | None:
        """The packed weight of a linear layer as it is now; None if the native kernels have none."""
        layer = self._layers.get(module)
        if layer is None or not isinstance(layer.packed, PackedWeight):
            return None
        if not self._exclusive:
            layer.refresh()
        return layer.packed

    def plain_weight(self, module: nn.Module) -> Tensor | None:
        """The plain weight of a module that has given it up, made anew; None if it has not."""
        packed = self._packed_of.get(module)
        if packed is None or self._packing is None:
            return None
        return as_matrix(self._packing.unpack(packed), transposed=is_product(module) and keeps_transposed(module))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block the layers use their packed copies."""
        if self._exclusive or not self._layers:
            yield
            return
        own: list[tuple[dict[str, object], Callable[[Tensor], Tensor] | None]] = []
        try:
            for module, layer in self._layers.items():
                layer.refresh()
                attributes = module.__dict__
                own.append((attributes, attributes.get("forward")))
                attributes["forward"] = layer.forward
            yield
        finally:
            for attributes, forward in own:
                if forward is None:
                    del attributes["forward"]
                else:
                    attributes["forward"] = forward

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model back as it was, plain weights and all. Nothing is packed any more."""
        if self._exclusive and self._packing is not None:
            for module in self._packed_of:
                module.__dict__.pop("forward", None)
            for given_up in self._given_up:
                given_up.restore(self._packing)
        self._layers, self._packed_of, self._given_up, self.packed_bytes = {}, {}, [], 0


def _pack(weight: Weight, packing: Packing, files: list[Range]) -> Any:
    """The packed weight; None if its products are not the plain one's.

    Pages of `files` leave memory as they are packed: if they are wanted after all, they are read again.
    """
    wrong = False

    def look(rows: Tensor, packed: Any) -> None:
        nonlocal wrong
        wrong = wrong or not is_right(packing, packed, rows)
        if not weight.transposed:  # else its rows lie across all pages
            drop_pages(rows, files)

    packed = packing.pack(weight.matrix, look)
    return None if wrong else packed


def _is_plain(module: nn.Module) -> bool:
    """Whether nobody has replaced its forward."""
    return "forward" not in module.__dict__
