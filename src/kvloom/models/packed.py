"""Linear layers over weights that are packed once, by oneDNN, for the CPU they run on.

A decode step reads every weight once, so it is as fast as weights can be read. `F.linear` reads plain weights
at a third of the memory bandwidth for one to eight rows; oneDNN's own layout, in blocks that match the vector
registers, comes close to all of it (measured in `benchmarks/README.md`). The two operators are those that
`torch.compile` uses on CPUs; they are not public API, so everything works without them, at the plain speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kvloom.models.mapped import Range, drop_pages, mapped_files

# Packing favours this number of rows; measured, one hint serves 1 to 512 rows alike.
ROWS_HINT = 512
# Below this many weights a plain product costs as little as the call.
MIN_WEIGHTS = 1 << 16
PACKED_DTYPES = (torch.bfloat16, torch.float32)


class PackedLinear:
    """The packed copy of one linear layer, and a forward that uses it."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self._pack()

    @torch.no_grad()
    def is_right(self) -> bool:
        """Whether the packed product equals the plain one on a small input, up to rounding."""
        weight = self.module.weight
        probe = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype).view(2, -1)
        plain = nn.functional.linear(probe, weight, self.module.bias).float()
        error = (self.forward(probe).float() - plain).norm()
        return bool(error <= 1e-2 * plain.norm())

    def _pack(self) -> None:
        weight = self.module.weight
        self._seen = _state(weight)
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)

    def refresh(self) -> None:
        """Pack again if the owner has replaced the weights or written to them."""
        if self._seen != _state(self.module.weight):
            self._pack()

    def plain(self) -> Tensor:
        """The weight as it was before packing, bit for bit: packing only moves numbers."""
        return self._packed.to_dense()

    def forward(self, input: Tensor) -> Tensor:
        """What `nn.Linear.forward` returns."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input, self._packed, self.module.bias, "none", [], "")
        return output


class PackedLinears:
    """The packed copies of a model's linear layers.

    Only plain `nn.Linear` modules are packed: what adapters and quantizers put in their place is left alone.

    Args:
        exclusive: whether the model is ours. Then the plain weights are given up, so that one copy is in memory
            (weights that other modules share, such as tied embeddings, stay), and every forward pass uses the
            packed ones. Else the owner's weights stay, and packed ones are used within `active` alone.
    """

    def __init__(self, model: nn.Module, *, exclusive: bool) -> None:
        self._exclusive = exclusive
        self._layers: list[PackedLinear] = []
        modules = packable(model)
        given_up = {id(module) for module in unshared(model, modules)} if exclusive else set()
        files = mapped_files() if exclusive else []
        for module in modules:
            layer = PackedLinear(module)
            if layer.is_right():
                self._layers.append(layer)
                if exclusive:
                    module.__dict__["forward"] = layer.forward
                if id(module) in given_up:
                    # One by one, so that a whole second copy is never in memory.
                    _give_up_plain_weight(module, files)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed copies."""
        return sum(layer.module.weight.numel() * layer.module.weight.element_size() for layer in self._layers)

    def plain_weight(self, module: nn.Module) -> Tensor | None:
        """The plain weight of a packed layer, made anew; None if the module is not packed."""
        return next((layer.plain() for layer in self._layers if layer.module is module), None)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block the layers use their packed copies."""
        if self._exclusive or not self._layers:
            yield
            return
        own: list[tuple[dict[str, object], Callable[[Tensor], Tensor] | None]] = []
        try:
            for layer in self._layers:
                layer.refresh()
                attributes = layer.module.__dict__
                own.append((attributes, attributes.get("forward")))
                attributes["forward"] = layer.forward
            yield
        finally:
            for attributes, forward in own:
                if forward is None:
                    del attributes["forward"]
                else:
                    attributes["forward"] = forward


def packable(model: nn.Module) -> list[nn.Linear]:
    """The plain linear layers on a CPU that are of a dtype and a size that packing helps."""
    if not _operators_exist():
        return []
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and module.weight.dtype in PACKED_DTYPES
        and module.weight.numel() >= MIN_WEIGHTS
    ]


def _state(weight: Tensor) -> tuple[int, int]:
    """Changes when the weight is replaced or written to."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _operators_exist() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def unshared(model: nn.Module, modules: list[nn.Linear]) -> list[nn.Linear]:
    """Those of the packable `modules` whose weights no other module uses, as tied embeddings do."""
    own = {id(module) for module in modules}
    used_elsewhere = {
        id(parameter)
        for module in model.modules()
        if id(module) not in own
        for parameter in module.parameters(recurse=False)
    }
    return [module for module in modules if id(module.weight) not in used_elsewhere]


def _give_up_plain_weight(module: nn.Linear, files: list[Range]) -> None:
    """Replace the plain weight by a tensor that has a shape and a dtype, and no memory."""
    drop_pages(module.weight, files)
    module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
