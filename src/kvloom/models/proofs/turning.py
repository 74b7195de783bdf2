"""Prove how a model's queries turn with their positions, so that they can be moved to other ones.

Nothing is assumed from the architecture's name. One token is run at several positions, each of them attending to itself
alone, so that all rows have the same hidden states unless positions enter elsewhere. Then each layer's queries and keys
at a position, turned back by the frequencies of one of the model's rotary modules, must be those at position 0, or be
the same already (layers without positions), and the logits must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvloom.attention.turn import Turn
from kvloom.errors import UnsupportedModel, first_line

TURNING = "kvloom_turning"

POSITIONS = (0, 1, 2, 7, 64, 1_000, 20_000, 100_000)

# Of a row's length. A float32 angle is off by up to 6e-8 of itself; 16-bit models keep cosines in 16 bits as well.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
TOLERANCE_A_TOKEN = 2e-7

Recorded = list[tuple[Tensor, Tensor]]


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, kvloom: Recorded, **_: Any
) -> tuple[Tensor, None]:
    """Note queries and keys, [tokens, heads, dim] in float32; every token attends to itself."""
    kvloom.append((query[0].transpose(0, 1).float(), key[0].transpose(0, 1).float()))
    output = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(TURNING, _record)


def prove_turns(
    model: nn.Module, forward: Callable[[Tensor, Recorded], Tensor], dtype: torch.dtype
) -> tuple[Turn | None, ...]:
    """How each attention layer turns its queries; None for layers that do not.

    Args:
        forward: runs a token at int64[tokens] positions under the attention above; returns float[tokens, vocab].

    Raises:
        UnsupportedModel: positions enter in another way, with what was seen.
    """
    recorded: Recorded = []
    candidates = list(_candidates(model))
    if not candidates:
        raise UnsupportedModel("it has no rotary embedding")
    # Parameters whose weights were given up for packed copies lie nowhere.
    positions = torch.tensor(POSITIONS, device=candidates[0][0].device)
    try:
        logits = forward(positions, recorded)
    except (IndexError, RuntimeError) as error:
        raise UnsupportedModel(f"it does not run at position {POSITIONS[-1]:,} ({first_line(error)})") from error
    tolerance = TOLERANCE[dtype] + TOLERANCE_A_TOKEN * positions.double()
    found = [_fitting(queries, keys, candidates, positions, tolerance) for queries, keys in recorded]
    if not bool((_distance(logits.float(), logits[:1].float()) <= tolerance).all()):
        raise UnsupportedModel("its output depends on positions elsewhere than in its rotary embedding")
    # What layers turn alike by is one object, so that what follows from it is computed once for all of them.
    alike = {own.key: own for own in found if own is not None}
    return tuple(None if own is None else alike[own.key] for own in found)


def _candidates(model: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """Frequencies of the model's rotary modules, float64[pairs], and whether pairs are neighbours."""
    seen: list[Tensor] = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            frequencies = buffer.double().flatten()
            if name.endswith("inv_freq") and not any(torch.equal(frequencies, other) for other in seen):
                seen.append(frequencies)
                yield from ((frequencies, interleaved) for interleaved in (False, True))


def _fitting(
    queries: Tensor, keys: Tensor, candidates: list[tuple[Tensor, bool]], positions: Tensor, tolerance: Tensor
) -> Turn | None:
    """The turn that takes queries and keys back to position 0; None if they are the same at all positions."""

    def fits(turn: Turn | None) -> bool:
        both = [own if turn is None else turn.back(own, positions) for own in (queries, keys)]
        return all(bool((_distance(own, own[:1]) <= tolerance).all()) for own in both)

    if fits(None):
        return None
    for frequencies, interleaved in candidates:
        for first in sorted({0, queries.shape[-1] - 2 * len(frequencies)}):
            if first >= 0 and 2 * len(frequencies) <= queries.shape[-1]:
                turn = Turn(frequencies, first, interleaved)
                if fits(turn):
                    return turn
    raise UnsupportedModel("its queries do not turn with their positions by the frequencies of its rotary embedding")


def _distance(rows: Tensor, reference: Tensor) -> Tensor:
    """float64[rows]: relative distance of each row from the reference, the largest over heads."""
    norm = reference.norm(dim=-1).clamp_min(1e-6)
    distance: Tensor = ((rows - reference).norm(dim=-1) / norm).double()
    return distance.flatten(1).amax(dim=1) if distance.dim() > 1 else distance
