"""Models of transformers, attached through its attention interface.

For the time of one forward pass the model's attention implementation is ours: it writes the new keys and
values into the store and reads by the plan, both of which travel as a keyword argument. Before and after,
the model is as its owner left it, so the owner's own calls give the same bits as ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvloom.attention import Plan, Wanted, torch_ops
from kvloom.attention.native import NativeAttention, kernels_for
from kvloom.attention.turn import Turn
from kvloom.cache import AnyStore, CacheLayout, MixedKept
from kvloom.errors import ModelError, UnsupportedModel
from kvloom.exclusive import interruptible
from kvloom.models.binding import Regime
from kvloom.models.hosted.base import HostedModel
from kvloom.models.hosted.dissection import DISSECT, Dissection, dissect
from kvloom.models.hosted.inside import asked, hidden_states_in, without_traces
from kvloom.models.hosted.probe import PROBE, PROBE_TOKENS, Probe, run_probe
from kvloom.models.hosted.ragged_decoder import ragged_inputs
from kvloom.models.images.media import Media
from kvloom.models.images.showing import Showing
from kvloom.models.images.vision import Vision, takes_images
from kvloom.models.native import NativePath
from kvloom.models.operations import Operation, linear_operations
from kvloom.models.proofs.turning import TURNING, Recorded, prove_turns
from kvloom.models.sources.source import Source
from kvloom.native import Library, native

NAME = "kvloom"


@dataclass(frozen=True)
class _Step:
    """What one forward pass hands to the attention of every layer; `native` is None where PyTorch's operators serve."""

    native: NativeAttention | None
    plan: Plan
    store: AnyStore
    layer_of: dict[nn.Module, int]
    group_of_layer: tuple[int, ...]
    turns: tuple[Turn | None, ...] | None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    kvloom: _Step | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, heads, tokens, dim], keys and values rotated already."""
    if kvloom is None:
        raise ModelError(
            "the model was called while KVLoom decodes with it in another thread. Calls of a model that is attached "
            "must not overlap with decoding: serialise them, or attach a copy."
        )
    layer = kvloom.layer_of[module]
    plan = kvloom.plan.groups[kvloom.group_of_layer[layer]]
    queries = query[0].transpose(0, 1)
    keys: Tensor | MixedKept
    values: Tensor | MixedKept
    if plan.reach.cross:
        keys, values = kvloom.store.source(layer)
    else:
        keys, values = kvloom.store.write(layer, plan.writes, key[0], value[0])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": s_aux}
    turn, bounds = None if kvloom.turns is None else kvloom.turns[layer], kvloom.store.bounds[layer]
    # A source's codes are read by PyTorch's operators: the kernel takes those of tokens that attention is causal over.
    coded_source = plan.reach.cross and isinstance(keys, MixedKept)
    if kvloom.native is not None and not coded_source:
        output = kvloom.native.attend(queries, keys, values, plan, **options, turn=turn, bounds=bounds)
    else:
        output = torch_ops.attend(queries, keys, values, plan, **options, turn=turn, bounds=bounds)
        if plan.observation is not None:
            plan.observation.add(queries, keys, plan, **options)
    if kvloom.plan.views is not None:
        kvloom.plan.views.add_attention(queries, keys, plan, **options)
    # Some models go on with `view`, which wants what their own attention returns: contiguous.
    return output[None].contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


class AttentionInterfaceBinding(HostedModel):
    """A language model of transformers whose attention goes through the interface.

    Args:
        model: in evaluation mode. Its weights, config and mode are left as they are.

    Attributes:
        dtype, device: of the model's weights.
        native: which of its operations run in native kernels; None if none do.

    Raises:
        UnsupportedModel: for models that cannot be decoded this way; the message says which part and why.
    """

    name = "transformers attention interface"
    native: NativePath | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        source = None if self.encoder is None else self.encoder.trial_source().tokens
        self.calls = run_probe(model, self._forward_probe, self.max_tokens or 32_768, source=source)
        self._layer_of = {call.module: index for index, call in enumerate(self.calls)}
        self._group_of_layer: tuple[int, ...] | None = None
        self._turns: tuple[Turn | None, ...] | None = None
        self._seen_store: tuple[weakref.ref[AnyStore], NativeAttention | None, bool] | None = None
        if takes_images(model):
            self.vision = Vision(model)
            self.showing = Showing(model, self.vision, self.fingerprint)

    def check_ready(self) -> None:
        """Refuse what `HostedModel` refuses, and look whether the model's layers are those that the kernels know."""
        super().check_ready()
        if self.native is not None:
            self.native.look_again()

    def turns(self) -> tuple[Turn | None, ...]:
        """How each layer's queries turn with their positions, proven when first asked for."""
        if self._turns is None:
            if self.encoder is not None:
                raise UnsupportedModel("it decodes from a source")
            if self._rotary.depend_on_length:
                raise UnsupportedModel("its rotary factors depend on the length of a sequence")
            self._turns = prove_turns(self.model, self._forward_turning, self.dtype)
        return self._turns

    @torch.no_grad()
    def forward(
        self, token_ids: Tensor, plan: Plan, store: AnyStore, *, regime: Regime, media: Sequence[Media | None] = ()
    ) -> Tensor:
        """One ragged row [1, tokens] with explicit positions: no padding, no mask, no cache of transformers' own."""
        with self._alone(), self._rotary.fixed(regime):
            # The kernels were proven on text, whose positions are one number.
            if self.native is None or any(media) or not self._kernels_for(store)[1]:
                return self.forward_by_modules(token_ids, plan, store, regime=regime, media=media)
            if plan.views is not None:
                # Kernels show nothing. What the modules write is written again, so looking changes no bit.
                self.forward_by_modules(token_ids, plan.unobserved, store, regime=regime)
                plan = replace(plan, views=None)
            if (whole := self.native.whole()) is not None:
                with interruptible():
                    return whole.forward(token_ids, plan, store, self._turns)
            with self.native.layers(plan, store, self._turns):
                return self.forward_by_modules(token_ids, plan, store, regime=regime)

    def _kernels_for(self, store: AnyStore) -> tuple[NativeAttention | None, bool]:
        """The kernels that attend in a store, and whether a native model can work in it."""
        if self._seen_store is None or self._seen_store[0]() is not store:
            kernels = kernels_for(store)
            serves = kernels is not None and store.layout.dtype == self.dtype
            self._seen_store = weakref.ref(store), kernels, serves
        return self._seen_store[1:]

    @torch.no_grad()
    def forward_by_modules(
        self, token_ids: Tensor, plan: Plan, store: AnyStore, *, regime: Regime, media: Sequence[Media | None] = ()
    ) -> Tensor:
        """The same by the model's modules, but for their attention and their packed linear layers."""
        if self._group_of_layer is None:
            self._group_of_layer = store.layout.group_of_layer
        step = _Step(self._kernels_for(store)[0], plan, store, self._layer_of, self._group_of_layer, self._turns)
        inputs_of = self._step_inputs(token_ids, plan, media)
        shown = {} if plan.views is None else asked(Wanted(hidden_states=plan.views.wanted.hidden_states))
        with (
            self._alone(),
            self._rotary.fixed(regime),
            self._packed(),
            inputs_of as inputs,
            self._implementation.set_to(NAME),
            without_traces(self.model) if shown else nullcontext(),
            interruptible(),
        ):
            output = self.model(
                **inputs,
                **shown,
                kvloom=step,
                **({"logits_to_keep": plan.logit_rows} if self._keeps_logits else {}),
            )
        if plan.views is not None:
            states = hidden_states_in(output, plan.views.wanted)
            plan.views.add_hidden_states(tuple(own[0] for own in states), plan.groups[0])
        logits: Tensor = output.logits[0]
        return logits if self._keeps_logits else logits[plan.logit_rows]

    @torch.no_grad()
    def forward_uncached(
        self,
        token_ids: Tensor,
        *,
        last: int | None = 1,
        regime: Regime | None = None,
        source: Source | None = None,
        media: Media | None = None,
    ) -> Tensor:
        """Whole sequences by the same native operations as on the cache, where all are native; else the model's own."""
        fixed = self.regime(token_ids.shape[1]) if regime is None else regime
        with self._alone():
            if self.native is None or media is not None or (whole := self.native.whole()) is None:
                return self.forward_own(token_ids, last=last, regime=fixed, source=source, media=media)
            with self._rotary.fixed(fixed), interruptible():
                return whole.forward_uncached(token_ids, last=last)

    def _inputs(self, token_ids: Tensor, positions: Tensor) -> dict[str, Any]:
        """One ragged row as the model takes it."""
        if self.encoder is not None:
            return ragged_inputs(self.model, token_ids, positions, [call.shape for call in self.calls])
        return {"input_ids": token_ids[None], "position_ids": positions[None], "use_cache": False}

    def _step_inputs(
        self, token_ids: Tensor, plan: Plan, media: Sequence[Media | None]
    ) -> AbstractContextManager[dict[str, Any]]:
        """The same, with images."""
        if self.showing is None or not any(media):
            return nullcontext(self._inputs(token_ids, plan.positions))
        return self.showing.step(token_ids, plan, media)

    @property
    def shows_attention(self) -> bool:
        """True: a policy lets go of a sequence's own tokens; what it attends to of a source is never dropped."""
        return True

    @property
    def reads_codes(self) -> bool:
        """True: attention is ours, to a source too."""
        return True

    @property
    def bit_identical(self) -> bool:
        """Whether every operation runs in native kernels, so that the cache changes no bit of the logits."""
        return self.vision is None and self.native is not None and self.native.whole() is not None

    @torch.no_grad()
    def dissect(self, token_ids: Tensor, *, causal: bool = True) -> Dissection:
        """Attention weights, keys and values of every layer for a row int64[tokens], computed without a cache.

        Args:
            causal: False takes the mask away: every token sees every other.
        """

        def forward(seen: Dissection) -> Tensor:
            logits: Tensor = self.model(input_ids=token_ids[None].to(self.device), use_cache=False, kvloom=seen).logits
            return logits[0]

        with (
            self._alone(),
            self._implementation.set_to(DISSECT),
            self._rotary.fixed(self.regime(len(token_ids))),
            interruptible(),
        ):
            return dissect(forward, {call.module: call.shape.reach for call in self.calls}, causal=causal)

    def pack(self, *, exclusive: bool) -> None:
        """Decode with packed copies of the linear layers; see `PackedLinears` for what `exclusive` does."""
        super().pack(exclusive=exclusive)
        library = native()
        assert self.packed is not None, "the weights were packed just now"
        on_cpu = self.encoder is None and self.device.type == "cpu"
        if isinstance(library, Library) and on_cpu and self.dtype in library.dtypes:
            layout = CacheLayout(layers=self.layers, dtype=self.dtype)
            self.native = NativePath(self.model, self.calls, self, layout, library, self.packed.weight_of)

    def operations(self) -> tuple[Operation, ...]:
        """The linear layers one by one, attention, and the small operations layer by layer."""
        if self.native is None:
            return super().operations()
        return (*linear_operations(self.model, self.packed), Operation("attention", True), *self.native.operations())

    def detach(self) -> None:
        """Put back weights that were given up; else, between two of our forward passes the model is its owner's."""
        with self._alone():
            self.native = None
            super().detach()

    def _forward_probe(self, probe: Probe) -> None:
        positions = torch.arange(PROBE_TOKENS, device=self.device)
        if self.encoder is None:
            inputs = self._inputs(positions % self.vocab_size, positions)
        else:
            # The encoder keeps its own attention, and runs before ours is set.
            hidden = self.encoder.run(self.encoder.trial_source())
            inputs = {"decoder_input_ids": positions[None] % self.vocab_size, "encoder_outputs": hidden}
        with (
            torch.no_grad(),
            self._alone(),
            self._implementation.set_to(PROBE),
            self._rotary.fixed(self.regime(PROBE_TOKENS)),
            interruptible(),
        ):
            self.model(**inputs, kvloom=probe)

    @torch.no_grad()
    def _forward_turning(self, positions: Tensor, recorded: Recorded) -> Tensor:
        token_ids = torch.full((1, len(positions)), min(1, self.vocab_size - 1), device=self.device)
        with self._alone(), self._implementation.set_to(TURNING), self._packed(), interruptible():
            output = self.model(
                input_ids=token_ids, position_ids=positions[None].to(self.device), use_cache=False, kvloom=recorded
            )
        logits: Tensor = output.logits[0]
        return logits
