"""A recognised model in native kernels: from token ids to logits without a module of transformers.

One forward pass is: embeddings are looked up, one call takes the ragged row through all decoder layers, the rows whose
logits are wanted get the last norm and the output layer. Nothing in it depends on what else is in the row, so a
token's logits are the same bits in a chunk and alone, on a cache and without one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kvloom.attention import GroupPlan, Plan
from kvloom.attention.native import bounds_facts, kernels, sealed_facts
from kvloom.attention.source import Source
from kvloom.attention.turn import Turn
from kvloom.cache import AnyStore, CacheLayout, Int8Store, Landing
from kvloom.models.native.recognise import LayerParts, ModelParts, Norm
from kvloom.native import Library
from kvloom.native.layers import (
    EndWeights,
    GroupStep,
    KeysValues,
    LayerWeights,
    NativeLayers,
    NormWeight,
    ProjectionWeight,
    Scratch,
    native_order_bytes,
)
from kvloom.native.linear import PackedWeight

KEPT_ROWS = 1_024
"""Rows for which buffers are kept from pass to pass: those of a step. Whole sequences without a cache may be longer."""

Kept = TypeVar("Kept")

Turns = Sequence[Turn | None]
"""How the queries of each attention layer of a model turn; None for those that do not."""

WeightOf = Callable[[nn.Linear], PackedWeight | None]
"""The packed weight of a linear layer, as it is now; None if it is not packed."""


class LayerRunner:
    """Recognised decoder layers, whichever they are of a model's.

    Args:
        layers: by the index of their attention among the model's attention layers.
        group_of_layer: for each attention layer of the model.
        ends: what is around the layers, if they are all of a recognised model.
    """

    def __init__(
        self,
        library: Library,
        layers: dict[int, LayerParts],
        layout: CacheLayout,
        weight_of: WeightOf,
        ends: ModelParts | None = None,
    ) -> None:
        self.indices = tuple(sorted(layers))
        self._parts = layers
        self._groups = layout.group_of_layer
        self._attention = kernels(library)
        self._dtype = layout.dtype
        weights = [layer_weights(layers[index], self._groups[index], weight_of) for index in self.indices]
        around = None if ends is None else end_weights(ends, weight_of)
        self._layers = NativeLayers(library, weights, layout.dtype, around)
        # Layers of one group ask the same of attention if their heads are the same.
        self._kinds = {
            place: (self._groups[index], layers[index].heads, layers[index].kv_heads, layers[index].head_dim)
            for place, index in enumerate(self.indices)
        }
        self._place_of_kind = {kind: place for place, kind in self._kinds.items()}
        self._kept: tuple[weakref.ref[AnyStore], KeysValues] | None = None
        self.scratch = self._layers.scratch

    def run_layer(
        self,
        place: int,
        rows: Tensor,
        plan: Plan,
        store: AnyStore,
        factors: tuple[Tensor, Tensor],
        turns: Turns | None = None,
    ) -> Tensor:
        """Take `rows`, [rows, hidden], through one layer; keys and values go into the store.

        Args:
            place: of the layer among these. factors: cosines and sines, float32[rows, dim / 2].
            turns: as of `run_model`.
        """
        self.scratch.reserve(plan.tokens)
        hidden = self.scratch["hidden"][: plan.tokens]
        hidden.copy_(rows)
        groups, memory = self._attention_of(plan, [place], turns)
        kept = self.keys_values(store)
        self._layers.run(kept, factors, groups, memory, rows=plan.tokens, first=place, count=1)
        return hidden.clone()

    def run_model(
        self, token_ids: Tensor, plan: Plan, kept: KeysValues, rotary: Any, turns: Turns | None = None
    ) -> Tensor:
        """Logits [n, vocab] of the plan's `logit_rows`, by the rotary factors that the module has now.

        Args:
            turns: how the queries of each attention layer of the model turn; may be left out if none is turned back.
        """
        self.scratch.reserve(plan.tokens)
        groups, memory = self._attention_of(plan, list(self._place_of_kind.values()), turns)
        frequencies = rotary.inv_freq.float().contiguous()
        logits = self._layers.run_model(
            kept,
            token_ids,
            plan.positions,
            plan.logit_rows,
            frequencies,
            float(rotary.attention_scaling),
            groups,
            memory,
        )
        self.scratch.shrink(KEPT_ROWS)
        return logits

    def keys_values(self, store: AnyStore) -> KeysValues:
        """Where the layers keep their keys and values in `store`."""
        if self._kept is None or self._kept[0]() is not store:
            self._kept = weakref.ref(store), self._places_in(store)
        return self._kept[1]

    def _places_in(self, store: AnyStore) -> KeysValues:
        native = store.open if isinstance(store, Int8Store) else store
        keys, values = self._own(native.keys), self._own(native.values)
        bounds = [
            () if own is None else bounds_facts(own, store.layout.block_tokens) for own in self._own(store.bounds)
        ]
        if not isinstance(store, Int8Store):
            return self._layers.keys_values(keys, values, bounds=bounds)
        both = zip(self._own(store.sealed_keys), self._own(store.sealed_values), strict=True)
        return self._layers.keys_values(keys, values, [sealed_facts(*own) for own in both], bounds)

    def _own(self, of_layers: Sequence[Kept]) -> list[Kept]:
        """Those of these layers."""
        return [of_layers[index] for index in self.indices]

    def shared_keys_values(self, tokens: int) -> KeysValues:
        """One place for as many tokens that all layers use one after the other, each overwriting the last one's."""
        shapes = {index: (self._parts[index].kv_heads, self._parts[index].head_dim) for index in self.indices}
        places = {
            shape: torch.empty(2, shape[0], tokens, shape[1], dtype=self._dtype) for shape in set(shapes.values())
        }
        keys, values = zip(*(places[shapes[index]] for index in self.indices), strict=True)
        return self._layers.keys_values(keys, values)

    def _attention_of(self, plan: Plan, places: list[int], turns: Turns | None) -> tuple[list[GroupStep], int]:
        """What attention of some layers reads in each group, and the address of what it works in.

        Layers of one group that run in one call are handed the same rotary factors, so they turn alike.
        """
        steps, memory_bytes = [GroupStep(plan.positions, 0)] * len(plan.groups), 0
        for place in places:
            group, heads, kv_heads, dim = self._kinds[place]
            own = plan.groups[group]
            schedule = self._attention.schedule_for(own, heads=heads, kv_heads=kv_heads)
            wanted = self._attention.bytes_for(schedule, self._dtype, heads=heads, kv_heads=kv_heads, dim=dim)
            if isinstance(own.writes, Landing):
                wanted += native_order_bytes(own.writes, self._dtype, rows=plan.tokens, kv_heads=kv_heads, dim=dim)
            memory_bytes = max(memory_bytes, wanted)
            turn = None if turns is None else self._attention.turn(schedule, turns[self.indices[place]])
            steps[group] = GroupStep(own.writes, schedule.numbers.ctypes.data, turn, own.observed)
        return steps, self.scratch.memory(memory_bytes)


class NativeModel:
    """A model all of whose operations are native."""

    def __init__(
        self,
        library: Library,
        parts: ModelParts,
        layers: dict[int, LayerParts],
        weight_of: WeightOf,
        layout: CacheLayout,
    ) -> None:
        assert len(layers) == len(parts.layers) == len(layout.layers), "every layer is recognised"
        self._parts = parts
        self._layout = layout
        self._runner = LayerRunner(library, layers, layout, weight_of, parts)

    @property
    def scratch(self) -> Scratch:
        """What a pass works in."""
        return self._runner.scratch

    def forward(self, token_ids: Tensor, plan: Plan, store: AnyStore, turns: Turns | None = None) -> Tensor:
        """Logits [n, vocab] of the plan's `logit_rows`; keys and values go into the store.

        Args:
            turns: as of `LayerRunner.run_model`.
        """
        return self._runner.run_model(token_ids, plan, self._runner.keys_values(store), self._parts.rotary, turns)

    def forward_uncached(self, token_ids: Tensor, *, last: int | None) -> Tensor:
        """Logits [batch, last, vocab] of whole sequences [batch, tokens]: all is computed, nothing is kept."""
        batch, tokens = token_ids.shape
        plan = whole_plan(self._layout, batch, tokens, last=tokens if last is None else min(last, tokens))
        kept = self._runner.shared_keys_values(batch * tokens)
        logits = self._runner.run_model(token_ids.flatten(), plan, kept, self._parts.rotary)
        return logits.view(batch, -1, logits.shape[-1])


def end_weights(parts: ModelParts, weight_of: WeightOf) -> EndWeights:
    """What is around the layers, as the kernels take it."""
    embeddings, bias = parts.embedding.weight.detach(), parts.head.bias
    tied = parts.embedding.weight is parts.head.weight or embeddings.device.type == "meta"
    return EndWeights(
        embeddings=None if tied else embeddings,
        norm=NormWeight(parts.norm.weight.detach(), parts.norm.epsilon),
        head=ProjectionWeight(_packed(weight_of, parts.head), None if bias is None else bias.detach()),
    )


def layer_weights(parts: LayerParts, group: int, weight_of: WeightOf) -> LayerWeights:
    """A layer's weights as the kernels take them."""

    def norm(own: Norm | None) -> NormWeight | None:
        return None if own is None else NormWeight(own.weight.detach(), own.epsilon)

    def projection(linear: nn.Linear) -> ProjectionWeight:
        return ProjectionWeight(_packed(weight_of, linear), None if linear.bias is None else linear.bias.detach())

    input_norm, post_norm = norm(parts.input_norm), norm(parts.post_norm)
    assert input_norm is not None and post_norm is not None, "a recognised layer has both norms"
    return LayerWeights(
        input_norm=input_norm,
        query_norm=norm(parts.query_norm),
        key_norm=norm(parts.key_norm),
        post_norm=post_norm,
        query=projection(parts.query),
        key=projection(parts.key),
        value=projection(parts.value),
        output=projection(parts.output),
        gate=projection(parts.gate),
        up=projection(parts.up),
        down=projection(parts.down),
        heads=parts.heads,
        kv_heads=parts.kv_heads,
        dim=parts.head_dim,
        scale=parts.scaling,
        group=group,
    )


def _packed(weight_of: WeightOf, linear: nn.Linear) -> PackedWeight:
    weight = weight_of(linear)
    assert weight is not None, "only packed layers are recognised"
    return weight


def whole_plan(layout: CacheLayout, batch: int, tokens: int, *, last: int) -> Plan:
    """The plan of whole sequences of equal length, one behind the other, that share no past and keep nothing.

    Args:
        last: of how many last tokens of each sequence logits are wanted.
    """
    slots = torch.arange(batch * tokens)
    # Each sequence is one block of its own.
    sources = tuple(
        Source(torch.tensor([[row, 0, tokens, 0]], dtype=torch.int32).numpy(), row * tokens, 0, tokens)
        for row in range(batch)
    )
    return Plan(
        positions=torch.arange(tokens).repeat(batch),
        logit_rows=slots.view(batch, tokens)[:, tokens - last :].reshape(-1).contiguous(),
        groups=tuple(
            GroupPlan(writes=slots, sources=sources, reach=group.reach, block_tokens=tokens) for group in layout.groups
        ),
    )
