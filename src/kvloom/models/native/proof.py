"""Recognised layers prove themselves: what the kernels give is compared with what the modules give.

One pass of the model's modules over two sequences, one of them behind a past in the store, is recorded layer by layer.
Then the kernels take each layer's own input, so that rounding does not add up, and must come to its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from kvloom.attention import Plan, build_plan
from kvloom.cache import AnyStore, CacheLayout, KVCache, Store, in_own_dtype
from kvloom.exclusive import uninterrupted
from kvloom.models.binding import Regime
from kvloom.models.native.decoder import NativeModel
from kvloom.models.native.recognise import ModelParts, Unrecognised
from kvloom.native.reference import rotary_factors

PAST_TOKENS, NEW_TOKENS, OTHER_TOKENS = 11, 3, 5
BLOCK_TOKENS = 4

# Of what a layer adds to its input, and of the input itself, whose last bits are rounded away in either way.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


LOOSE = 5


class Runs(Protocol):
    """What the proof needs of a binding: to run a step by the model's modules."""

    vocab_size: int

    def forward_by_modules(self, token_ids: Tensor, plan: Plan, store: AnyStore, *, regime: Regime) -> Tensor:
        """Logits of a step; every module of the model is called."""
        ...

    def regime(self, tokens: int) -> Regime:
        """The rotary regime of a sequence of that many tokens."""
        ...


@dataclass(frozen=True)
class Recording:
    """One pass of the modules.

    Attributes:
        token_ids, plan, store: what it was given; the store holds what it has written.
        inputs, outputs: [rows, hidden] of each decoder layer.
        embeddings: what each layer was handed as `position_embeddings`.
        logits: of every row.
    """

    token_ids: Tensor
    plan: Plan
    store: Store
    regime: Regime
    inputs: dict[nn.Module, Tensor]
    outputs: dict[nn.Module, Tensor]
    embeddings: dict[nn.Module, Any]
    logits: Tensor


def record(binding: Runs, layout: CacheLayout, layers: list[nn.Module]) -> Recording:
    """A pass over a sequence that continues and one that begins."""
    cache = KVCache(layout, budget_bytes=16 * layout.bytes_per_row_of_blocks, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(20_26)
    first, second = cache.open(), cache.open()
    regime = binding.regime(PAST_TOKENS + NEW_TOKENS)
    for work in ([(first, PAST_TOKENS)], [(first, NEW_TOKENS), (second, OTHER_TOKENS)]):
        extension = cache.extend(work)
        plan = build_plan(cache, extension, logits=[count for _, count in work])
        token_ids = torch.randint(binding.vocab_size, (plan.tokens,), generator=generator)
        with uninterrupted(), _recorded(layers) as kept:
            logits = binding.forward_by_modules(token_ids, plan, cache.store, regime=regime)
        cache.commit(extension)
    return Recording(token_ids, plan, in_own_dtype(cache.store), regime, logits=logits, **kept)


def as_factors(embeddings: Any) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines, float32[rows, dim / 2], from a layer's `position_embeddings`: cos and sin [1, rows, dim].

    None if these are something else, or not two equal halves.
    """
    if not isinstance(embeddings, tuple) or len(embeddings) != 2:
        return None
    halves = []
    for own in embeddings:
        if not isinstance(own, Tensor) or own.dim() != 3 or own.shape[0] != 1 or own.shape[2] % 2:
            return None
        low, high = own[0].chunk(2, dim=-1)
        if not torch.equal(low, high):
            return None
        halves.append(low.float().contiguous())
    return halves[0], halves[1]


def is_near(found: Tensor, expected: Tensor, given: Tensor | None = None, *, loose: bool = False) -> bool:
    """Whether rows agree up to rounding.

    Args:
        given: what the rows were before; what was added to them must agree.
        loose: for rows that have been through many layers.
    """
    tolerance = TOLERANCE[expected.dtype] * (LOOSE if loose else 1)
    if not bool(found.isfinite().all()):
        return False
    added = expected.float() if given is None else expected.float() - given.float()
    lost = 2 * torch.finfo(expected.dtype).eps * expected.float().norm(dim=-1)
    error = (found.float() - expected.float()).norm(dim=-1)
    return bool((error <= tolerance * added.norm(dim=-1) + lost).all())


def prove_whole(model: NativeModel, parts: ModelParts, recording: Recording) -> None:
    """Compare what is around the layers, and the logits, with a recorded pass of the modules.

    Raises:
        Unrecognised: where they differ.
    """
    first = parts.layers[0]
    if not torch.equal(parts.embedding(recording.token_ids), recording.inputs[first]):
        raise Unrecognised("changes the embeddings before the first layer")
    handed = as_factors(recording.embeddings[first])
    frequencies, scaling = cast(Any, parts.rotary).inv_freq, cast(Any, parts.rotary).attention_scaling
    own = rotary_factors(recording.plan.positions, frequencies, scaling, recording.logits.dtype)
    if handed is None or not all(is_near(a, b) for a, b in zip(own, handed, strict=True)):
        raise Unrecognised("computes rotary positions in another way")
    normed = parts.norm.module(recording.outputs[parts.layers[-1]])
    if not is_near(parts.head(normed), recording.logits):
        raise Unrecognised("changes the rows before the output layer, or the logits behind it")
    if not is_near(model.forward(recording.token_ids, recording.plan, recording.store), recording.logits, loose=True):
        raise Unrecognised("gives other logits than the kernels, though its parts are known")


@contextmanager
def _recorded(layers: list[nn.Module]) -> Iterator[dict[str, Any]]:
    """Within the block what goes into and comes out of each layer is kept."""
    seen: dict[str, Any] = {"inputs": {}, "outputs": {}, "embeddings": {}}

    def before(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = named.get("hidden_states", inputs[0] if inputs else None)
        if isinstance(hidden, Tensor):
            seen["inputs"][layer] = hidden[0].clone()
        seen["embeddings"][layer] = named.get("position_embeddings")

    def after(layer: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen["outputs"][layer] = output[0].clone()

    handles: list[Any] = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
