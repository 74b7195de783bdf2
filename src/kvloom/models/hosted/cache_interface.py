"""Models of transformers with an attention of their own (BLOOM, Falcon, T5), attached through its cache interface.

Whatever a model does inside, it puts keys and values into a cache and takes all of them out again. Here that cache is
a window onto the store: see `step_cache`. It is slower than our own attention, since keys and values are gathered
into dense tensors for every layer, and prompts of unlike lengths run apart; and it is right for any model that is right
with transformers' own cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from kvloom.attention import Plan, Views
from kvloom.cache import AnyStore, CacheLayout, LayerShape, Reach, Store, in_own_dtype
from kvloom.errors import KVLoomError, UnsupportedModel
from kvloom.exclusive import interruptible
from kvloom.models.binding import Regime
from kvloom.models.dense.batches import DenseBatch, dense_batches, run_dense, run_order
from kvloom.models.dense.step_cache import step_cache
from kvloom.models.hosted.base import WINDOW_FIELDS, HostedModel
from kvloom.models.hosted.inside import asked, views_in
from kvloom.models.hosted.probe import PROBE_TOKENS, AttentionCall
from kvloom.models.images.media import Media
from kvloom.models.sources.encoder import Encoded

MASKS = {False: "attention_mask", True: "decoder_attention_mask"}
"""Under which name a model takes the mask of its own tokens, without and with a source."""


class CacheInterfaceBinding(HostedModel):
    """A language model of transformers that is handed a cache.

    Args:
        model: in evaluation mode. Its weights, config and mode are left as they are.

    Attributes:
        padding_tokens: the most slots of padding in a batch of rows of unlike lengths; 0 runs these apart.

    Raises:
        UnsupportedModel: for models that cannot be decoded this way; the message says which part and why.
    """

    name = "transformers cache interface"
    padding_tokens = 0

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise UnsupportedModel(
                f"{type(model).__name__} takes no `past_key_values`, so there is no cache to hand to it."
            )
        self.calls = self._trial()

    @torch.no_grad()
    def forward(
        self, token_ids: Tensor, plan: Plan, store: AnyStore, *, regime: Regime, media: Sequence[Media | None] = ()
    ) -> Tensor:
        """One pass for each set of rows that run together; logits in the order of the plan."""
        kept = in_own_dtype(store)
        with self._alone(), self._rotary.fixed(regime), self._packed():
            if plan.views is not None:
                self._show(token_ids, plan, plan.views, kept)
            with interruptible():
                return run_dense(
                    plan,
                    self.device,
                    lambda batch: self._run(token_ids, plan, batch, kept),
                    padding_tokens=self.padding_tokens,
                )

    def _show(self, token_ids: Tensor, plan: Plan, views: Views, store: Store) -> None:
        """Run a step to be looked at. What it writes is written again, so looking changes nothing."""
        wanted = views.wanted
        with self._looked_into(wanted):
            for batch in dense_batches(plan, self.device):
                cache = step_cache(store, self.layers, batch)
                inputs = self._inputs(token_ids, plan, batch)
                output = self.model(**inputs, **asked(wanted), past_key_values=cache, use_cache=True)
                lengths = batch.source_tokens
                for index, view, tokens in zip(batch.members, views_in(output, wanted), lengths, strict=True):
                    views.add(index, view.of_source(tokens))

    def windows(self) -> set[int]:
        """The limits that the configs name: the model masks by itself, and the cache keeps everything."""
        configs = [module.config for module in self.model.modules() if hasattr(module, "config")]
        named = [getattr(config, name, None) for config in configs for name in WINDOW_FIELDS]
        return {limit for limit in named if isinstance(limit, int)}

    def run_order(self, plan: Plan) -> list[int]:
        """The order in which `forward` runs the rows of a plan."""
        return run_order(plan, padding_tokens=self.padding_tokens)

    def _run(self, token_ids: Tensor, plan: Plan, batch: DenseBatch, store: Store) -> Tensor:
        """Logits, float[batch, wanted, vocab]."""
        cache = step_cache(store, self.layers, batch)
        wanted = torch.arange(batch.count - batch.wanted, batch.count, device=self.device)
        keep = {"logits_to_keep": wanted} if self._keeps_logits else {}
        output = self.model(**self._inputs(token_ids, plan, batch), past_key_values=cache, use_cache=True, **keep)
        logits: Tensor = output.logits if self._keeps_logits else output.logits[:, wanted]
        return logits

    def _inputs(self, token_ids: Tensor, plan: Plan, batch: DenseBatch) -> dict[str, Any]:
        """A batch of int64[tokens] as the model takes it. Positions are passed, or follow from the cache's length."""
        own, given = token_ids[batch.rows], {}
        if batch.seen is not None:
            given[MASKS[batch.source is not None]] = batch.seen.long()
        if batch.source is not None:
            hidden = torch.zeros((batch.batch, batch.source.tokens, 1), dtype=self.dtype, device=self.device)
            encoded = Encoded(last_hidden_state=hidden)
            return {"decoder_input_ids": own, "encoder_outputs": encoded, "attention_mask": batch.source.seen, **given}
        if self._takes_positions:
            given["position_ids"] = plan.positions[batch.rows]
        return {"input_ids": own, **given}

    def _trial(self) -> tuple[AttentionCall, ...]:
        """One trial pass, which shows what each layer puts into a cache, and which module does it."""
        token_ids = torch.arange(PROBE_TOKENS, device=self.device)[None] % self.vocab_size
        trial = _Trial(self.model)
        try:
            with torch.no_grad(), self._alone(), self._rotary.fixed(self.regime(PROBE_TOKENS)), trial.watching():
                if self.encoder is None:
                    self.model(input_ids=token_ids, past_key_values=trial.own, use_cache=True)
                else:
                    self.model(
                        decoder_input_ids=token_ids,
                        encoder_outputs=self.encoder.run(self.encoder.trial_source()),
                        past_key_values=EncoderDecoderCache(trial.own, trial.cross),
                        use_cache=True,
                    )
        except KVLoomError:
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"{type(self.model).__name__} cannot be run on a key/value cache, which is all that can be paged: "
                f"{error}"
            ) from error
        return trial.calls()


class PaddingCacheBinding(CacheInterfaceBinding):
    """The same for models that are right with padding too: rows of unlike lengths decode in one pass.

    A pass reads all weights. So rows are padded as long as what padding adds to read is no more than these.

    Raises:
        UnsupportedModel: also where the model takes no mask of its own tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        name = MASKS[self.encoder is not None]
        if name not in inspect.signature(model.forward).parameters:
            raise UnsupportedModel(f"{type(model).__name__} takes no `{name}`, so its rows cannot be padded.")
        weights = sum(own.nbytes for own in model.parameters())
        self.padding_tokens = weights // CacheLayout(layers=self.layers, dtype=self.dtype).bytes_per_token


class _Trial:
    """Two recording caches, and which module is running."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []
        self.own, self.cross = _Recorder(self, Reach()), _Recorder(self, Reach(cross=True))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block the innermost running module is known."""
        handles = []
        for module in self._model.modules():
            handles.append(module.register_forward_pre_hook(lambda module, _: self._running.append(module)))
            handles.append(module.register_forward_hook(lambda *_: self._running.pop() and None, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def note(self, reach: Reach, keys: Tensor, values: Tensor) -> AttentionCall:
        """What the running module has put into a cache."""
        module = self._running[-1]
        shape = LayerShape(kv_heads=keys.shape[1], key_dim=keys.shape[3], value_dim=values.shape[3], reach=reach)
        if keys.shape[:3] != values.shape[:3]:
            raise UnsupportedModel(f"`{self._names[module]}` keeps different numbers of keys and of values.")
        return AttentionCall(module, self._names[module], shape)

    def calls(self) -> tuple[AttentionCall, ...]:
        """Self-attention's layers in the order of the cache, then those of cross-attention."""
        kind = type(self._model).__name__
        for recorder in (self.own, self.cross):
            if sorted(recorder.calls) != list(range(len(recorder.calls))):
                raise UnsupportedModel(f"{kind} leaves out layers of its cache: it fills {sorted(recorder.calls)}.")
        if not self.own.calls:
            raise UnsupportedModel(f"{kind} puts no keys and values into transformers' cache.")
        return tuple(recorder.calls[layer] for recorder in (self.own, self.cross) for layer in sorted(recorder.calls))


class _Recorder(DynamicCache):  # type: ignore[misc]  # transformers is untyped for us
    """A cache that notes who puts what into which layer."""

    def __init__(self, trial: _Trial, reach: Reach) -> None:
        super().__init__()
        self._trial, self._reach = trial, reach
        self.calls: dict[int, AttentionCall] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer in self.calls:
            raise UnsupportedModel(f"layer {layer} is put into the cache twice in a forward pass.")
        self.calls[layer] = self._trial.note(self._reach, keys, values)
        updated: tuple[Tensor, Tensor] = super().update(keys, values, layer)
        return updated
