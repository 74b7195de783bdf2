"""A model of transformers that its owner lends us: what is asked of it whichever way its keys and values are kept."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvloom.attention import Plan, View, Wanted
from kvloom.attention.turn import Turn
from kvloom.cache import AnyStore, LayerShape
from kvloom.errors import UnsupportedModel
from kvloom.exclusive import Exclusive, interruptible
from kvloom.models.autocast import refuse_autocast
from kvloom.models.binding import Regime
from kvloom.models.hosted.implementation import Implementation
from kvloom.models.hosted.inside import asked, views_in, without_traces
from kvloom.models.hosted.positions import counting_of
from kvloom.models.hosted.probe import AttentionCall
from kvloom.models.hosted.rotary import RotaryRegimes
from kvloom.models.identity import Identity, digest_of_writes, identify
from kvloom.models.images.media import Media
from kvloom.models.images.showing import Showing, fresh_rotary_deltas
from kvloom.models.images.vision import Vision
from kvloom.models.modules import device_of, is_adapter
from kvloom.models.operations import Operation, linear_operations
from kvloom.models.packing.packed import PackedLinears
from kvloom.models.packing.packings import choose_packing
from kvloom.models.proofs.showcheck import prove_shows
from kvloom.models.sources.encoder import Encoder
from kvloom.models.sources.source import Source

MOST_ROWS = 4_096
"""More new tokens than a step ever has."""

WINDOW_FIELDS = ("sliding_window", "attention_chunk_size", "window_size")
"""Where configs and modules keep how far back attention sees."""


STATES_IN_LAYERS = ("linear_attention", "conv", "mamba")
"""What configs call layers that keep a state instead of keys and values. Some models do not say it in another way."""


class HostedModel(ABC):
    """A language model of transformers in evaluation mode, whose weights, config and mode are left as they are.

    Attributes:
        encoder: what reads the source of an encoder-decoder model; None for a causal model.
        counting: how positions are counted; None if they are the tokens' indices.
        calls: the attention modules that keep keys and values, in the order of `layers`.
        vision: how the model takes images; None if it takes none.
        showing: hands images to it; None likewise.
        reason: why a faster binding does not serve; None for the fastest.

    Raises:
        UnsupportedModel: for models that cannot be decoded; the message says which part and why.
    """

    name: str
    calls: tuple[AttentionCall, ...]
    reason: str | None = None
    vision: Vision | None = None
    showing: Showing | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._exclusive = Exclusive()
        self.dtype, self.device = _lies_as(model)
        self.check_ready()
        _refuse_by_config(model)
        self.encoder = Encoder(model) if model.config.is_encoder_decoder else None
        self._text_config: Any = model.config.get_text_config(decoder=True)
        self._implementation = Implementation(model, self._text_config)
        self._rotary = RotaryRegimes(model)
        self.counting = counting_of(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        trial = None if self.encoder is None else self.encoder.trial_source()
        self.vocab_size = int(self.forward_own(torch.zeros((1, 1), dtype=torch.int64), source=trial).shape[-1])
        self.max_tokens = self._find_max_tokens()
        self.packed: PackedLinears | None = None
        self._identity: tuple[bytes, Identity] | None = None
        self._shows: set[Wanted] = set()

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """What each attention layer keeps."""
        return tuple(call.shape for call in self.calls)

    @property
    def bit_identical(self) -> bool:
        """Whether the cache must not change a bit: where every operation runs in the native kernels."""
        return False

    def windows(self) -> set[int]:
        """The limits of all windows and chunks, as far as they are known."""
        reaches = [layer.reach for layer in self.layers]
        return {limit for own in reaches for limit in (own.window_tokens, own.chunk_tokens) if limit is not None}

    def early_scales(self) -> bool:
        """Whether a layer changes its temperature within the rows of a step."""
        return any(scale <= MOST_ROWS for scale in row_scales(self.model))

    def check_ready(self) -> None:
        """Refuse training mode, gradient checkpointing, autocast, and a model that was moved since it was attached."""
        refuse_autocast(self.device)
        dtype, device = _lies_as(self.model)
        if (dtype, device) != (self.dtype, self.device):
            raise UnsupportedModel(
                f"the model was attached as {self.dtype} on {self.device}, and is {dtype} on {device} now. "
                "Attach it again."
            )
        if any(module.training for module in self.model.modules()):
            raise UnsupportedModel("the model is in training mode, so its output is random. Call model.eval() first.")
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise UnsupportedModel(
                "the model has gradient checkpointing switched on, under which transformers drops its cache. "
                "Call model.gradient_checkpointing_disable() first."
            )

    def fingerprint(self) -> bytes:
        """Digest of where every weight lies, how often it was written in place, and of the active adapters.

        Writing through `parameter.data` leaves no trace that PyTorch keeps: attach again after that.
        """
        return digest_of_writes([self.model], adapters=self._adapters())

    def identity(self) -> Identity:
        """Digest of config, weights and active adapters, computed when first asked for and after a change."""
        state = self.fingerprint()
        if self._identity is None or self._identity[0] != state:
            identity = identify(
                self.model,
                self.model.config,
                adapters=self._adapters(),
                plain_weight=None if self.packed is None else self.packed.plain_weight,
                layers=len(self.layers),
            )
            self._identity = state, identity
        return self._identity[1]

    def _adapters(self) -> str:
        """Which adapters are active, and how."""
        names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
        return repr(
            [[getattr(module, name, None) for name in names] for module in self.model.modules() if is_adapter(module)]
        )

    def regime(self, tokens: int) -> Regime:
        """Which rotary factors a sequence of that many tokens uses."""
        return self._rotary.regime(tokens)

    @abstractmethod
    def forward(
        self, token_ids: Tensor, plan: Plan, store: AnyStore, *, regime: Regime, media: Sequence[Media | None] = ()
    ) -> Tensor:
        """Run one ragged row on the cache; see `Binding`."""

    @property
    def shows_attention(self) -> bool:
        """Whether tokens can be let go of, and attention be observed: only where both are ours, and of one sequence."""
        return False

    @property
    def reads_codes(self) -> bool:
        """Whether keys and values may be kept as codes: only where attention is ours."""
        return False

    def turns(self) -> tuple[Turn | None, ...]:
        """How each layer's queries turn with their positions; refused where the model attends by itself."""
        raise UnsupportedModel("it computes its attention itself")

    def run_order(self, plan: Plan) -> list[int]:
        """The order in which `forward` runs the rows of a plan."""
        return list(range(plan.tokens))

    def forward_uncached(
        self,
        token_ids: Tensor,
        *,
        last: int | None = 1,
        regime: Regime | None = None,
        source: Source | None = None,
        media: Media | None = None,
    ) -> Tensor:
        """Whole sequences, computed anew."""
        return self.forward_own(token_ids, last=last, regime=regime, source=source, media=media)

    @torch.no_grad()
    def forward_own(
        self,
        token_ids: Tensor,
        *,
        last: int | None = 1,
        regime: Regime | None = None,
        source: Source | None = None,
        media: Media | None = None,
    ) -> Tensor:
        """The model's own forward, its own attention and encoders: what everything else is compared with."""
        keep = {"logits_to_keep": last or 0} if self._keeps_logits else {}
        fixed = self.regime(token_ids.shape[1]) if regime is None else regime
        inputs_of = self._own_inputs(token_ids.to(self.device), source, media)
        with (
            self._alone(),
            self._rotary.fixed(fixed),
            fresh_rotary_deltas(self.model),
            inputs_of as inputs,
            interruptible(),
        ):
            logits: Tensor = self.model(**inputs, use_cache=False, **keep).logits
        return logits if last is None else logits[:, -last:]

    @torch.no_grad()
    def views_of(
        self, token_ids: Tensor, wanted: Wanted, *, source: Source | None = None, media: Media | None = None
    ) -> list[View]:
        """What the model's own forward shows of whole sequences: the reference of what the cache shows."""
        keep = {"logits_to_keep": 1} if self._keeps_logits else {}
        with (
            self._alone(),
            self._rotary.fixed(self.regime(token_ids.shape[1])),
            fresh_rotary_deltas(self.model),
            self._own_inputs(token_ids.to(self.device), source, media) as inputs,
            self._looked_into(wanted),
            interruptible(),
        ):
            output = self.model(**inputs, **asked(wanted), **keep, use_cache=False)
        return views_in(output, wanted)

    def check_shows(self, wanted: Wanted) -> None:
        """Refuse what the model does not show of itself, tried when it is first wanted."""
        if wanted not in self._shows:
            prove_shows(self, wanted)
            self._shows.add(wanted)

    @contextmanager
    def _looked_into(self, wanted: Wanted) -> Iterator[None]:
        """Within the block a forward pass can show what is wanted: weights come from eager attention alone."""
        eager = self._implementation.set_to("eager") if wanted.attentions else nullcontext()
        with without_traces(self.model), eager:
            yield

    def _own_inputs(
        self, token_ids: Tensor, source: Source | None, media: Media | None
    ) -> AbstractContextManager[dict[str, Any]]:
        """What the model's own forward is handed; pixels where there are images."""
        if self.encoder is not None:
            assert source is not None, "a decoder that attends to a source needs one"
            return nullcontext({"decoder_input_ids": token_ids, **self.encoder.inputs(source, rows=token_ids.shape[0])})
        if self.showing is not None and media is not None:
            return self.showing.whole(token_ids, media)
        return nullcontext({"input_ids": token_ids})

    @torch.no_grad()
    def encode(self, source: Source, store: AnyStore, slots: Tensor) -> None:
        """Run the encoder over a source, and put its keys and values for every cross-attention layer into `slots`.

        Args:
            slots: int64[source.tokens].
        """
        assert self.encoder is not None, "only encoder-decoder models read a source"
        cross = [index for index, layer in enumerate(self.layers) if layer.reach.cross]
        with self._alone(), self._packed(), interruptible():
            for layer, keys, values in self.encoder.project(source):
                store.write_source(cross[layer], slots, keys, values)

    def _alone(self) -> AbstractContextManager[None]:
        """Within the context no other thread runs the model, and signals wait: it is not as its owner left it."""
        return self._exclusive.turn()

    def _packed(self) -> AbstractContextManager[None]:
        """Within the context the linear layers use their packed copies, if there are any."""
        return nullcontext() if self.packed is None else self.packed.active()

    def pack(self, *, exclusive: bool) -> None:
        """Decode with packed copies of the linear layers; see `PackedLinears` for what `exclusive` does."""
        packing = choose_packing() if self.device.type == "cpu" else None
        with self._alone():
            self.packed = PackedLinears(self.model, packing, exclusive=exclusive)

    def operations(self) -> tuple[Operation, ...]:
        """The linear layers one by one, and the rest."""
        linear = linear_operations(self.model, self.packed)
        rest = Operation("attention, norms, activations", False, "there are no native kernels for it here")
        return (*linear, rest)

    def detach(self) -> None:
        """Put back weights that were given up; else, between two of our forward passes the model is its owner's."""
        if self.showing is not None:
            self.showing.features.clear()
        if self.packed is not None:
            with self._alone():
                self.packed.restore()

    def _find_max_tokens(self) -> int | None:
        """The trained context; dynamic rotary factors are made to stretch it by their factor."""
        trained = getattr(self._text_config, "max_position_embeddings", None)
        if self.encoder is not None:
            trained = getattr(self.model.config, "max_target_positions", trained)
        if trained is None:
            return None
        trained -= 0 if self.counting is None else self.counting.unused
        # A temperature by row index is right as long as it is that of the first interval, as for every short row.
        late = [scale for scale in row_scales(self.model) if scale > MOST_ROWS]
        trained = min([trained, *(scale - 1 for scale in late)])
        parameters = getattr(self._text_config, "rope_parameters", None) or {}
        stretch = parameters.get("factor", 1.0) if "dynamic" in str(parameters.get("rope_type")) else 1.0
        return int(trained * stretch)


def _lies_as(model: PreTrainedModel) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the weights."""
    return model.dtype, device_of(model)


def row_scales(model: nn.Module) -> list[int]:
    """Row indices at which an attention layer changes its temperature (Llama 4), which should count positions."""
    tuned = [module for module in model.modules() if getattr(module, "attn_temperature_tuning", False)]
    return [int(getattr(module, "floor_scale", 0)) for module in tuned]


def _refuse_by_config(model: PreTrainedModel) -> None:
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(f"{type(model).__name__} has no language-modelling head, so it gives no logits.")
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModel(f"{type(model).__name__} keeps a recurrent state, which a key/value cache cannot hold.")
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    if kept := [kind for kind in STATES_IN_LAYERS if kind in kinds]:
        raise UnsupportedModel(
            f"{type(model).__name__} keeps a state in layers of `{kept[0]}`, which a key/value cache cannot hold."
        )
