"""How much a model multiplies what rounding changes.

Weights that make attention all or nothing, as wide random ones do, turn a change in the last bit into another choice,
which the next layer turns into more. The logits of two correct passes then differ by far more than rounding does in
a trained model, in any implementation. So where a check fails, the model's own forward is run a second time with its
embeddings changed in their last bit: what moves there is not the cache's doing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kvloom.exclusive import uninterrupted
from kvloom.models import Binding, HostedModel
from kvloom.prompts import Prompt


def movement_of(binding: Binding, runs: Sequence[tuple[Prompt, list[int]]]) -> float | None:
    """The largest |difference| of the model's own logits with and without the change; None if it cannot be made.

    Args:
        runs: prompts and the tokens that were chosen behind them.
    """
    if not isinstance(binding, HostedModel):
        return None
    return max((_movement(binding, prompt, token_ids) for prompt, token_ids in runs if token_ids), default=None)


def _movement(binding: HostedModel, prompt: Prompt, token_ids: list[int]) -> float:
    whole = torch.tensor([[*prompt.token_ids, *token_ids[:-1]]], device=binding.device)
    plain, moved = (_logits(binding, whole, len(token_ids), prompt, change) for change in (False, True))
    return float((plain - moved).abs().max())


def _logits(binding: HostedModel, whole: Tensor, last: int, prompt: Prompt, change: bool) -> Tensor:
    with uninterrupted(), _changed_embeddings(binding.model, change):
        return binding.forward_own(whole, last=last, source=prompt.source, media=prompt.media)[0].double().cpu()


@contextmanager
def _changed_embeddings(model: nn.Module, change: bool) -> Iterator[None]:
    """Within the block each number that an embedding gives is a neighbour of itself, above and below in turns."""

    def to_neighbours(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        signs = torch.arange(output.numel(), device=output.device).view_as(output) % 2 * 2 - 1
        return output * (1 + signs * torch.finfo(output.dtype).eps).to(output.dtype)

    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)] if change else []
    handles = [module.register_forward_hook(to_neighbours) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
