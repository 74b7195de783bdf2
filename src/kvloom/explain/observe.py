"""What there is to see in one text: a head's attention, and what changes when a token is added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kvloom.errors import InvalidRequest, UnsupportedModel
from kvloom.language_model.model import LanguageModel
from kvloom.models import AttentionInterfaceBinding
from kvloom.models.hosted.dissection import Dissection
from kvloom.prompts import read_prompt
from kvloom.text import INCOMPLETE
from kvloom.units import dtype_name

FEWEST, MOST = 2, 40
"""Tokens that make a readable matrix."""

BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}
SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥"}
"""Of tokens that are nothing but spaces."""


@dataclass(frozen=True)
class Change:
    """The largest change of the earlier tokens' numbers when the last token is added, over all layers and heads.

    Relative to the largest number of its kind, so that 0 is no change and 1 a whole other value.
    """

    weights: float
    keys: float
    values: float


@dataclass(frozen=True)
class Observation:
    """A text under one head.

    Attributes:
        tokens: as they read, one string a token.
        layer, head: which matrix is shown, counted from 0.
        weights: [tokens][tokens], row i what query i gave to each key; rows add up to 1 (less with attention sinks).
        with_mask, without_mask: what adding the last token changed for those before it.
        stepwise: the largest difference between the last token's logits computed on the cache and computed whole.
        tolerance: below which such differences are rounding.
        bytes_per_token: of keys and values, in all layers.
        layers, kv_heads: of the model; heads are those of the shown layer.
    """

    model: str
    dtype: str
    tokens: tuple[str, ...]
    layer: int
    head: int
    weights: tuple[tuple[float, ...], ...]
    with_mask: Change
    without_mask: Change
    stepwise: float
    tolerance: float
    bytes_per_token: int
    layers: int
    kv_heads: int


def observe(
    lm: LanguageModel, text: Any, *, layer: int | None = None, head: int | None = None, name: str = "model"
) -> Observation:
    """Look at a text of 2 to 40 tokens.

    Args:
        text: text or token ids.
        layer, head: by default those whose attention is spread most widely, which shows most.

    Raises:
        UnsupportedModel: a model whose attention cannot be looked at. InvalidRequest: too few or too many tokens, or
            no such layer or head.
    """
    binding = lm.binding
    if not isinstance(binding, AttentionInterfaceBinding) or lm.engine.cache is None:
        raise UnsupportedModel(
            "this model's attention cannot be looked at: it is not reached through transformers' attention interface."
        )
    if binding.encoder is not None:
        raise UnsupportedModel("only the attention of causal models is shown; this one decodes from a source.")
    token_ids = read_prompt(text, lm.tokenizer, vocab_size=lm.vocab_size)
    if not FEWEST <= len(token_ids) <= MOST:
        remedy = "Lengthen" if len(token_ids) < FEWEST else "Shorten"
        raise InvalidRequest(
            f"a picture needs {FEWEST} to {MOST} tokens, and the text has {len(token_ids)}. {remedy} it."
        )
    whole = torch.tensor(token_ids)
    seen, shorter = binding.dissect(whole), binding.dissect(whole[:-1])
    unmasked = [binding.dissect(own, causal=False) for own in (whole, whole[:-1])]
    layer, head = _choose(seen, layer, head)
    shown = seen.layers[layer].weights
    scale = float(seen.logits[-1].abs().max())
    return Observation(
        model=name,
        dtype=dtype_name(binding.dtype),
        tokens=_readable(lm.tokenizer, token_ids),
        layer=layer,
        head=head,
        weights=tuple(tuple(row) for row in shown[head].tolist()),
        with_mask=_change(seen, shorter),
        without_mask=_change(*unmasked),
        stepwise=_stepwise(lm, token_ids, seen) / scale,
        tolerance=1e-4 if binding.dtype == torch.float32 else 5e-2,
        bytes_per_token=lm.engine.cache.layout.bytes_per_token,
        layers=len(seen.layers),
        kv_heads=seen.layers[layer].keys.shape[0],
    )


def _stepwise(lm: LanguageModel, token_ids: list[int], seen: Dissection) -> float:
    """The largest difference of logits between steps on the cache, token by token, and one pass over everything."""
    step = None
    rows = []
    for position, token in enumerate(token_ids):
        step = lm.extend(None if step is None else step.context, [token], start=position)
        rows.append(step.logits[0].float())
    return float((torch.stack(rows) - seen.logits.to(rows[0].device)).abs().max())


def _change(longer: Dissection, shorter: Dissection) -> Change:
    """Of the tokens that both have."""

    def largest(kind: str) -> float:
        changes = []
        for with_last, without in zip(longer.layers, shorter.layers, strict=True):
            before: Tensor = getattr(without, kind)
            rows = before.shape[1]
            after = getattr(with_last, kind)[:, :rows]
            if kind == "weights":
                after = after[..., :rows]
            changes.append(float((after - before).abs().max() / before.abs().max()))
        return max(changes)

    return Change(*(largest(kind) for kind in ("weights", "keys", "values")))


def _choose(seen: Dissection, layer: int | None, head: int | None) -> tuple[int, int]:
    """The layer and head asked for; of those left open, the most widely spread."""
    layers = len(seen.layers)
    if layer is not None and not 0 <= layer < layers:
        raise InvalidRequest(f"`layer={layer}` does not exist. Pass 0 to {layers - 1}.")
    wanted = range(layers) if layer is None else [layer]
    spread = []
    for index in wanted:
        weights = seen.layers[index].weights
        heads = weights.shape[0]
        if head is not None and not 0 <= head < heads:
            raise InvalidRequest(f"`head={head}` does not exist in layer {index}. Pass 0 to {heads - 1}.")
        entropy = -(weights * weights.clamp_min(1e-9).log()).sum(-1).mean(-1)
        spread += [(float(entropy[own]), index, own) for own in (range(heads) if head is None else [head])]
    _, layer, head = max(spread)
    return layer, head


def _readable(tokenizer: Any, token_ids: list[int]) -> tuple[str, ...]:
    """Each token as it reads; signs for spaces, and bytes where it is part of a character."""
    if tokenizer is None:
        return tuple(map(str, token_ids))
    return tuple(_readable_token(tokenizer, token) for token in token_ids)


def _readable_token(tokenizer: Any, token: int) -> str:
    text = str(tokenizer.decode([token]))
    if text and INCOMPLETE not in text:
        return text if text.strip() else "".join(SIGNS.get(character, character) for character in text)
    name = str(tokenizer.convert_ids_to_tokens(token))
    # Byte-level tokenizers write each byte as a letter of an alphabet of their own.
    data = bytes(BYTE_OF[letter] for letter in name if letter in BYTE_OF)
    is_broken = len(data) == len(name) and data.decode(errors="replace") != data.decode(errors="ignore")
    return " ".join(f"{byte:02X}" for byte in data) if is_broken else name
