"""Which operations of a model run in native kernels, found when it is attached and looked at again before every pass.

A model that is recognised as a whole never enters a module of transformers. Of any other, the decoder layers that
are recognised take the place of their modules within our passes, and the rest runs as transformers wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kvloom.attention import Plan
from kvloom.cache import AnyStore, CacheLayout
from kvloom.models.hosted.probe import AttentionCall
from kvloom.models.native.decoder import LayerRunner, NativeModel, Turns, WeightOf
from kvloom.models.native.proof import Recording, Runs, as_factors, is_near, prove_whole, record
from kvloom.models.native.recognise import (
    LayerParts,
    ModelParts,
    Unrecognised,
    recognise_layer,
    recognise_model,
)
from kvloom.models.native.watch import Watch, hooks_registered, is_plain
from kvloom.models.operations import Operation
from kvloom.native import Library

AROUND = "embeddings, last norm and output layer"
"""What is not a decoder layer, as `operations` calls it."""


class NativePath:
    """The native part of a model.

    Args:
        model: of transformers; `calls` are its attention modules, in order.
        binding: runs steps by the model's modules, for the proof.
        weight_of: the packed weight of a linear layer; None if it is not packed.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[AttentionCall],
        binding: Runs,
        layout: CacheLayout,
        library: Library,
        weight_of: WeightOf,
    ) -> None:
        self._model, self._calls, self._layout = model, calls, layout
        self._binding = binding
        self._weight_of = weight_of
        self._library = library
        self._find()

    # ---- what is found -------------------------------------------------------------------------------------

    def _find(self) -> None:
        self._reasons: dict[str, str] = {}
        self._parts = self._recognise_layers()
        self._whole_parts: ModelParts | None = None
        self._whole: NativeModel | None = None
        self._runner = self._make_runner()
        if self._runner is not None:
            recording = record(self._binding, self._layout, [own.layer for own in self._parts.values()])
            self._keep_proven(recording)
            self._recognise_whole(recording)
        self._watches = {index: Watch(own.layer.modules()) for index, own in self._parts.items()}
        inside = {module for own in self._parts.values() for module in own.layer.modules()}
        self._outside = Watch(module for module in self._model.modules() if module not in inside)
        self._look()

    def look_again(self) -> None:
        """Take notice of what was changed on the model: weights are read anew, changed modules are left alone."""
        watches = [*self._watches.values(), self._outside]
        if not all(watch.has_the_same_parameters() for watch in watches) and self._all_run_the_same():
            self._find()
            return
        if self._runner is not None and any(self._weight_of(own) is not packed for own, packed in self._weights):
            self._runner = self._make_runner()
            if self._whole_parts is not None:
                self._whole = self._make_whole(self._whole_parts)
        self._look()

    def _look(self) -> None:
        self._hooks_seen = hooks_registered()
        self._usable = {
            index for index, watch in self._watches.items() if watch.runs_the_same() and watch.has_the_same_parameters()
        }
        outside = self._outside.runs_the_same() and self._outside.has_the_same_parameters()
        self._untouched = outside and len(self._usable) == len(self._watches)

    def _all_run_the_same(self) -> bool:
        return all(watch.runs_the_same() for watch in (*self._watches.values(), self._outside))

    def _recognise_layers(self) -> dict[int, LayerParts]:
        parts = {}
        for index, call in enumerate(self._calls):
            name = call.name.rpartition(".")[0]
            layer = self._model.get_submodule(name)
            try:
                parts[index] = self._recognise_layer(layer, call)
            except Unrecognised as reason:
                self._reasons[name] = str(reason)
        return parts

    def _recognise_layer(self, layer: nn.Module, call: AttentionCall) -> LayerParts:
        shape = call.shape
        if shape.key_dim != shape.value_dim:
            raise Unrecognised("has keys and values of unlike sizes")
        own = recognise_layer(layer, kv_heads=shape.kv_heads, head_dim=shape.key_dim)
        if own.attention is not call.module:
            raise Unrecognised("has more than one attention")
        for linear in own.linears:
            if self._weight_of(linear) is None:
                raise Unrecognised("has linear layers that are not packed")
        if any(norm.weight.dtype != own.query.weight.dtype for norm in own.norms):
            raise Unrecognised("has norms of another dtype")
        if not all(is_plain(module) for module in layer.modules()):
            raise Unrecognised("has forward hooks, which must run")
        return own

    def _make_runner(self) -> LayerRunner | None:
        if not self._parts:
            return None
        self._weights = [(own, self._weight_of(own)) for parts in self._parts.values() for own in parts.linears]
        return LayerRunner(self._library, self._parts, self._layout, self._weight_of)

    def _keep_proven(self, recording: Recording) -> None:
        """Keep the layers that give what their modules give."""
        assert self._runner is not None, "there are layers to be proven"
        wrong = [place for place, _ in enumerate(self._runner.indices) if not self._is_proven(place, recording)]
        for index in [self._runner.indices[place] for place in wrong]:
            name = self._calls[index].name.rpartition(".")[0]
            self._reasons[name] = "gives other numbers than the kernels, so it puts its parts together in another way"
            del self._parts[index]
        if wrong:
            self._runner = self._make_runner()

    def _is_proven(self, place: int, recording: Recording) -> bool:
        runner = self._runner
        assert runner is not None, "asked for one of its layers"
        layer = self._parts[runner.indices[place]].layer
        factors = as_factors(recording.embeddings.get(layer))
        given, expected = recording.inputs.get(layer), recording.outputs.get(layer)
        if factors is None or given is None or expected is None:
            return False
        if 2 * factors[0].shape[-1] != self._layout.layers[runner.indices[place]].key_dim:
            return False  # a part of each head is turned, and the kernels turn all of it
        found = runner.run_layer(place, given, recording.plan, recording.store, factors)
        return is_near(found, expected, given)

    def _recognise_whole(self, recording: Recording) -> None:
        try:
            if len(self._parts) < len(self._calls):
                raise Unrecognised("stands around layers that are not native")
            parts = recognise_model(self._model, [own.layer for own in self._parts.values()])
            if self._weight_of(parts.head) is None:
                raise Unrecognised("has an output layer that is not packed")
            if not all(is_plain(own) for own in (parts.embedding, parts.rotary, parts.norm.module, parts.head)):
                raise Unrecognised("has forward hooks, which must run")
            whole = self._make_whole(parts)
            prove_whole(whole, parts, recording)
        except Unrecognised as reason:
            self._reasons[AROUND] = str(reason)
        else:
            self._whole_parts, self._whole = parts, whole

    def _make_whole(self, parts: ModelParts) -> NativeModel:
        self._weights.append((parts.head, self._weight_of(parts.head)))
        return NativeModel(self._library, parts, self._parts, self._weight_of, self._layout)

    # ---- what is used --------------------------------------------------------------------------------------

    def whole(self) -> NativeModel | None:
        """The whole model in kernels; None unless all of it is native, and nothing was changed since it was attached.

        Hooks are noticed at once, all else by `look_again`.
        """
        if not self._untouched or hooks_registered() != self._hooks_seen:
            self._look()
        return self._whole if self._untouched else None

    @contextmanager
    def layers(self, plan: Plan, store: AnyStore, turns: Turns | None) -> Iterator[None]:
        """Within the block the recognised layers' modules run in kernels."""
        runner = self._runner
        if runner is None:
            yield
            return
        changed: list[dict[str, Any]] = []
        self._look()
        try:
            for place, index in enumerate(runner.indices):
                if index in self._usable:
                    attributes = vars(self._parts[index].layer)
                    attributes["forward"] = self._forward_of(runner, place, plan, store, turns)
                    changed.append(attributes)
            yield
        finally:
            for attributes in changed:
                del attributes["forward"]

    def _forward_of(
        self, runner: LayerRunner, place: int, plan: Plan, store: AnyStore, turns: Turns | None
    ) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *_: Any, position_embeddings: Any = None, **__: Any) -> Tensor:
            factors = as_factors(position_embeddings)
            assert factors is not None, "the layer was proven with factors for each half"
            return runner.run_layer(place, hidden_states[0], plan, store, factors, turns)[None]

        return forward

    def operations(self) -> tuple[Operation, ...]:
        """What the model does, layer by layer, and which of it is not native, and why."""
        self._look()
        names = {index: call.name.rpartition(".")[0] for index, call in enumerate(self._calls)}
        listed = [
            _operation(name, self._reasons.get(name), changed=index not in self._usable)
            for index, name in names.items()
        ]
        changed = not self._untouched and len(self._usable) == len(self._watches)
        return (*listed, _operation(AROUND, self._reasons.get(AROUND), changed=changed))


def _operation(name: str, reason: str | None, *, changed: bool) -> Operation:
    if reason is None and changed:
        reason = "was changed or given hooks since it was attached"
    return Operation(name, reason is None, reason or "")
