"""A trial forward pass that learns what a model asks of its attention.

transformers hands its attention function the rotated queries and keys, and the mask that the model built. The
probe runs one short row through the model with an attention function of its own, and notes for each attention
module the heads, the head sizes, the options, and how far back the mask lets a query see. What cannot be
honoured is refused here, by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvloom.cache import LayerShape, Reach
from kvloom.errors import UnsupportedModel

PROBE = "kvloom_probe"
PROBE_TOKENS = 8

# Options that change the result and that our attention honours.
HONOURED = {"scaling", "softcap", "s_aux", "sliding_window"}
# Options that change nothing here: bookkeeping of transformers, or facts that the plan already holds.
HARMLESS = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "is_causal",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}

MaskPredicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionCall:
    """What one attention module does in a forward pass."""

    module: nn.Module
    name: str
    shape: LayerShape


@dataclass
class Probe:
    """Collects the calls of one trial pass; travels to the attention function as a keyword argument.

    Attributes:
        source: length of the source that a decoder's cross-attention attends to; None if there is none.
    """

    names: dict[nn.Module, str]
    max_tokens: int
    source: int | None
    calls: list[AttentionCall] = field(default_factory=list)


def run_probe(
    model: nn.Module, forward: Callable[..., Any], max_tokens: int, *, source: int | None = None
) -> tuple[AttentionCall, ...]:
    """One trial pass. `forward` runs the model with the probe's attention; returns its calls in order.

    Args:
        source: length of the source that the pass decodes from, if there is one; not that of the decoder's row.

    Raises `UnsupportedModel` if the model does not use the interface, or uses it in a way that is not supported.
    """
    probe = Probe({module: name for name, module in model.named_modules()}, max_tokens, source)
    forward(probe)
    if not probe.calls:
        raise UnsupportedModel(
            f"{type(model).__name__} never calls transformers' attention interface: it computes its attention itself, "
            "so a custom attention would be silently ignored."
        )
    modules = [call.module for call in probe.calls]
    for module in modules:
        if modules.count(module) > 1:
            raise UnsupportedModel(f"attention module `{probe.names[module]}` runs more than once in a forward pass.")
    return tuple(probe.calls)


def _probe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kvloom: Probe | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Note what is asked; the numbers that flow on do not matter."""
    if kvloom is None:
        raise UnsupportedModel(
            f"{type(module).__name__} does not pass keyword arguments on to its attention, so the plan cannot reach it."
        )
    name = kvloom.names.get(module, type(module).__name__)
    _refuse_unknown(name, options)
    causal = getattr(module, "is_causal", True) is not False
    cross = key.shape[2] == kvloom.source and (not causal or key.shape[2] != query.shape[2])
    if not cross and not causal:
        raise UnsupportedModel(f"`{name}` attends in both directions; only causal attention can be cached.")
    if not cross and key.shape[2] != query.shape[2]:
        raise UnsupportedModel(f"`{name}` attends to other tokens than the input (cross-attention).")
    if query.shape[1] % key.shape[1]:
        raise UnsupportedModel(f"`{name}` has {query.shape[1]} query heads for {key.shape[1]} key heads.")
    shape = LayerShape(
        kv_heads=key.shape[1],
        key_dim=key.shape[3],
        value_dim=value.shape[3],
        reach=Reach(cross=True)
        if cross
        else _reach(name, attention_mask, options.get("sliding_window"), kvloom.max_tokens),
    )
    kvloom.calls.append(AttentionCall(module, name, shape))
    output = value.mean(dim=(1, 2), keepdim=True).expand(-1, query.shape[2], query.shape[1], -1)
    return output.contiguous(), None


def _refuse_unknown(name: str, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if option in HONOURED or option in HARMLESS or value is None or value is False:
            continue
        if option == "dropout" and value == 0:
            continue
        raise UnsupportedModel(f"`{name}` passes `{option}` to its attention, which is not supported.")


def _probe_mask(
    mask_function: MaskPredicate, q_length: int, kv_length: int, device: torch.device | None = None, **_: Any
) -> Tensor:
    """A mask whose content does not matter, but which carries the model's rule along."""
    mask = torch.ones((1, 1, q_length, kv_length), dtype=torch.bool, device=device)
    mask.kvloom_predicate = mask_function  # type: ignore[attr-defined]
    return mask


def _reach(name: str, mask: Tensor | None, sliding_window: int | None, max_tokens: int) -> Reach:
    """How far back the mask lets a query see. The mask decides: transformers' own attention obeys it alone."""
    if mask is None:
        return Reach(window_tokens=sliding_window)
    predicate = getattr(mask, "kvloom_predicate", None)
    if predicate is None:
        raise UnsupportedModel(f"`{name}` uses an attention mask that the model builds in a way of its own.")
    queries = _sample_positions(max_tokens)
    lowest = [_lowest_visible(name, predicate, query, mask.device) for query in queries]
    for reach in _candidates(queries, lowest):
        if reach.first_visible(torch.tensor(queries).numpy()).tolist() == lowest:
            return reach
    raise UnsupportedModel(
        f"`{name}` uses an attention mask that is neither causal, nor a sliding window, nor chunked."
    )


def _sample_positions(max_tokens: int) -> list[int]:
    """Positions that reveal windows and chunks of any size up to the model's context."""
    dense = range(min(max_tokens, 64))
    sparse = [int(64 * 1.37**power) for power in range(40)]
    return [*dense, *(position for position in sparse if 64 <= position < max_tokens), max_tokens - 1]


def _lowest_visible(name: str, predicate: MaskPredicate, query: int, device: torch.device) -> int:
    """The lowest key position that the query sees; refuses masks that show later keys or have holes."""
    zero = torch.tensor(0, device=device)
    keys = torch.arange(query + 17, device=device)
    seen = predicate(zero, zero, torch.tensor(query, device=device), keys)
    seen = torch.as_tensor(seen).expand(keys.shape)
    if bool(seen[query + 1 :].any()):
        raise UnsupportedModel(f"`{name}` lets a token see later ones; only causal attention can be cached.")
    visible = seen[: query + 1].nonzero().flatten()
    if len(visible) == 0 or int(visible[-1]) != query or len(visible) != query + 1 - int(visible[0]):
        raise UnsupportedModel(f"`{name}` uses an attention mask with holes, which is not supported.")
    return int(visible[0])


def _candidates(queries: list[int], lowest: list[int]) -> list[Reach]:
    """Reaches that could explain the observations."""
    limited = [(query, low) for query, low in zip(queries, lowest, strict=True) if low > 0]
    if not limited:
        return [Reach()]
    query, low = limited[0]
    # The first chunk boundary lies at or before the first query that cannot see position 0.
    return [Reach(window_tokens=query - low + 1), Reach(chunk_tokens=low)]


ALL_ATTENTION_FUNCTIONS.register(PROBE, _probe_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, _probe_mask)
