"""Callables that speak the cache protocol of transformers: f(ids, past_key_values=..., use_cache=True).

They return an object with `logits` and `past_key_values`, and take the latter back. Whatever holds the keys and values
between two calls, here it is the store: what a call adds is taken out of what it returns, and what the next call wants
is gathered and handed to it in the form that it returned.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from kvloom.attention import Plan
from kvloom.cache import AnyStore, LayerShape, Store, in_own_dtype
from kvloom.errors import UnsupportedModel
from kvloom.exclusive import interruptible
from kvloom.models.autocast import refuse_autocast
from kvloom.models.binding import Regime
from kvloom.models.callables.uncached import CallableBinding
from kvloom.models.dense.batches import DenseBatch, run_dense, run_order
from kvloom.models.dense.step_cache import step_cache
from kvloom.models.hosted.probe import AttentionCall
from kvloom.models.identity import digest_of_writes
from kvloom.models.images.media import Media
from kvloom.models.packing.packed import PackedLinears
from kvloom.models.packing.packings import choose_packing

TRIAL_TOKENS = 3
Pairs = list[tuple[Tensor, Tensor]]


def speaks_cache_protocol(function: Callable[..., Any]) -> bool:
    """Whether a callable names `past_key_values` and `use_cache` among its parameters."""
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        return {"past_key_values", "use_cache"} <= inspect.signature(target).parameters.keys()
    except (TypeError, ValueError):
        return False


class CachedCallableBinding(CallableBinding):
    """A function from token ids and a past to logits and a longer past, which is kept in the store.

    Positions must follow from the length of the past: the callable is told no others.

    Args:
        function: f(token_ids int64[batch, tokens], past_key_values=past, use_cache=True) gives an object with `logits`,
            float[batch, tokens, vocab], and `past_key_values`: a tuple of (keys, values) for each layer, each
            [batch, kv_heads, tokens, dim], or the same stacked into tensors; a cache of transformers; or an object with
            `to_legacy_cache` and `from_legacy_cache`, which give and take such a tuple. With `past_key_values=None` it
            begins; with `use_cache=False` it is asked for whole sequences, with which its cached output is compared.
        vocab_size: width of the logits; by default what the function returns.
        max_tokens, device: as for `CallableBinding`.

    Weights are watched, and linear layers packed, where they can be seen: of a module, a method of one, or what a
    function closes over.

    Attributes:
        padding_tokens: as of `CacheInterfaceBinding`; 0 here, since a callable is told nothing of padding.

    Raises:
        UnsupportedModel: what it returns cannot be read as keys and values; says what it is.
    """

    name = "callable, by the cache protocol of transformers"
    padding_tokens = 0

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        vocab_size: int | None = None,
        max_tokens: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        refuse_autocast(torch.device(device))
        self._cached_function = function
        self._packed: PackedLinears | None = None
        trial = torch.zeros((1, TRIAL_TOKENS), dtype=torch.int64, device=device)
        with torch.no_grad():
            output = function(trial, past_key_values=None, use_cache=True)
        logits, past = getattr(output, "logits", None), getattr(output, "past_key_values", None)
        if not isinstance(logits, Tensor) or past is None:
            raise UnsupportedModel(
                "the callable takes `past_key_values`, and must return an object with `logits` and `past_key_values`; "
                f"it returned {type(output).__name__}. To decode it without a cache, pass a function of the ids alone."
            )
        self._hands_out_a_cache = isinstance(past, Cache)
        self._form = _form(past)
        pairs = _pairs(past, tokens=TRIAL_TOKENS)
        dtypes = sorted({str(tensor.dtype) for pair in pairs for tensor in pair})
        if len(dtypes) > 1:
            raise UnsupportedModel(
                f"the callable's `past_key_values` holds tensors of {' and '.join(dtypes)}; the cache keeps one dtype "
                "for all keys and values."
            )
        self.calls: tuple[AttentionCall, ...] = ()
        self.layers = tuple(
            LayerShape(kv_heads=keys.shape[1], key_dim=keys.shape[3], value_dim=values.shape[3])
            for keys, values in pairs
        )
        super().__init__(
            self._whole, vocab_size=vocab_size or int(logits.shape[-1]), max_tokens=max_tokens, device=device
        )
        self.dtype = pairs[0][0].dtype

    def check_ready(self) -> None:
        """Refuse autocast, and a module that is in training mode."""
        refuse_autocast(self.device)
        if any(module.training for module in _modules(self._cached_function)):
            raise UnsupportedModel("the model is in training mode, so its output is random. Call model.eval() first.")

    def fingerprint(self) -> bytes:
        """Digest of where the weights lie that can be seen, and how often they were written in place."""
        return digest_of_writes(_modules(self._cached_function))

    def windows(self) -> set[int]:
        """None are known: the callable masks by itself."""
        return set()

    def early_scales(self) -> bool:
        """Nothing is known of it."""
        return False

    def run_order(self, plan: Plan) -> list[int]:
        """The order in which `forward` runs the rows of a plan."""
        return run_order(plan, padding_tokens=self.padding_tokens)

    def pack(self) -> None:
        """Decode with packed copies of the linear layers that can be seen; see `PackedLinears`."""
        packing = choose_packing() if self.device.type == "cpu" else None
        self._packed = PackedLinears(nn.ModuleList(_modules(self._cached_function)), packing, exclusive=False)

    def detach(self) -> None:
        """Let go of the packed copies; nothing was done to the callable."""
        if self._packed is not None:
            self._packed.restore()

    @torch.no_grad()
    def forward(
        self, token_ids: Tensor, plan: Plan, store: AnyStore, *, regime: Regime, media: Sequence[Media | None] = ()
    ) -> Tensor:
        """One call for each set of rows that run together; logits in the order of the plan."""
        kept = in_own_dtype(store)
        with nullcontext() if self._packed is None else self._packed.active(), interruptible():
            return run_dense(
                plan,
                self.device,
                lambda batch: self._run(token_ids[batch.rows], batch, kept),
                padding_tokens=self.padding_tokens,
            )

    def _run(self, token_ids: Tensor, batch: DenseBatch, store: Store) -> Tensor:
        """Logits, float[batch, wanted, vocab], of int64[batch, count] token ids."""
        if self._hands_out_a_cache:
            past: Any = step_cache(store, self.layers, batch)
            output = self._cached_function(token_ids, past_key_values=past, use_cache=True)
        else:
            past = self._past(batch, store)
            padding = {} if batch.padding is None else {"padding": batch.padding[:, 0]}
            output = self._cached_function(token_ids, past_key_values=past, use_cache=True, **padding)
            self._take(output.past_key_values, batch, store)
        logits: Tensor = output.logits[:, batch.count - batch.wanted :]
        return logits

    def _past(self, batch: DenseBatch, store: Store) -> Any:
        """What came before, in the callable's own form; None at the beginning.

        Nothing of it is the store's own: in a loop of its own nobody reads a past again, so a callable may write there.
        """
        if not batch.past:
            return None
        slots = batch.read_slots
        before = slice(slots.start, slots.start + batch.past) if isinstance(slots, slice) else slots[:, : batch.past]
        pairs = [store.gather(layer, before) for layer in range(len(self.layers))]
        if isinstance(before, slice):
            pairs = [(keys.clone(), values.clone()) for keys, values in pairs]
        return self._form(tuple(pairs))

    def _take(self, past: Any, batch: DenseBatch, store: Store) -> None:
        """Put the keys and values of the new tokens into the store."""
        pairs = _pairs(past, tokens=batch.past + batch.count)
        for layer, pair in enumerate(pairs):
            keys, values = (own[:, :, batch.past :].transpose(0, 1).flatten(1, 2) for own in pair)
            store.write(layer, batch.write_slots, keys, values)

    def _whole(self, token_ids: Tensor) -> Tensor:
        """Logits of whole sequences, without a cache."""
        logits: Tensor = self._cached_function(token_ids, past_key_values=None, use_cache=False).logits
        return logits


def _form(past: Any) -> Callable[[tuple[tuple[Tensor, Tensor], ...]], Any]:
    """What makes of a tuple of pairs a past of the same form as `past`."""
    if isinstance(past, Tensor):
        return lambda pairs: torch.stack([torch.stack(pair) for pair in pairs])
    if isinstance(past, list | tuple):
        stacked = all(isinstance(layer, Tensor) for layer in past)
        return lambda pairs: tuple(torch.stack(pair) for pair in pairs) if stacked else pairs
    if hasattr(past, "to_legacy_cache"):
        remade: Callable[[tuple[tuple[Tensor, Tensor], ...]], Any] = type(past).from_legacy_cache
        return remade
    return lambda pairs: pairs


def _pairs(past: Any, *, tokens: int) -> Pairs:
    """Keys and values of each layer, of which each row has `tokens`."""
    if isinstance(past, EncoderDecoderCache):
        raise UnsupportedModel("the callable keeps cross-attention, of which nothing but the model itself is known.")
    pairs = [_pair(layer, number, tokens) for number, layer in enumerate(_layers(past))]
    if not pairs:
        raise UnsupportedModel("the callable's `past_key_values` has no layers.")
    return pairs


def _layers(past: Any) -> Sequence[Any]:
    if isinstance(past, Cache):
        return [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in past.layers]
    if hasattr(past, "to_legacy_cache"):
        past = past.to_legacy_cache()
    if isinstance(past, list | tuple | Tensor):
        return list(past)
    raise UnsupportedModel(
        f"the callable's `past_key_values` is a {type(past).__name__}, of which keys and values cannot be read. Return "
        "a tuple of (keys, values) for each layer, or a cache of transformers."
    )


def _pair(layer: Any, number: int, tokens: int) -> tuple[Tensor, Tensor]:
    own = list(layer)[:2] if isinstance(layer, list | tuple | Tensor) else []
    if len(own) < 2 or not all(isinstance(tensor, Tensor) and tensor.dim() == 4 for tensor in own):
        raise UnsupportedModel(
            f"layer {number} of the callable's `past_key_values` is not a pair of keys and values of the shape [batch, "
            "kv_heads, tokens, dim]."
        )
    if any(tensor.shape[2] != tokens for tensor in own):
        raise UnsupportedModel(
            f"layer {number} of the callable's `past_key_values` holds {own[0].shape[2]} tokens where it has read "
            f"{tokens}: a window that drops tokens, or a recurrent state, cannot be paged."
        )
    return own[0], own[1]


def _modules(function: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a callable can be seen to use."""
    if isinstance(function, nn.Module):
        return [function]
    if isinstance(function, functools.partial):
        return _modules(function.func)
    owner = getattr(function, "__self__", None)
    closed_over = []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            closed_over.append(cell.cell_contents)
        except ValueError:  # not yet bound
            continue
    return [own for own in (owner, *closed_over) if isinstance(own, nn.Module)]
