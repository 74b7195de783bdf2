"""How many blocks a request can come to hold, and how many the pool should have."""

from __future__ import annotations

import torch

from kvloom.cache import CacheLayout, Reach
from kvloom.cache.retention import Retention
from kvloom.engine.memory import available_memory_bytes
from kvloom.models import Binding

DEFAULT_SEQUENCES = 8
DEFAULT_CONTEXT = 4_096
DEFAULT_SHARE_OF_MEMORY = 0.25


def worst_case_blocks(
    layout: CacheLayout,
    *,
    prompt_tokens: int,
    new_tokens: int,
    rows: int,
    step_tokens: int,
    source_tokens: int = 0,
    shares_prompt: bool = True,
    retention: Retention | None = None,
) -> tuple[int, ...]:
    """For each layer group, the most distinct blocks that a request can hold at once.

    One row holds its tokens. Several rows hold the prompt once and each its own new tokens, and each may have
    copied the block in which the prompt ends: ceil(prompt / block) + rows x (ceil(new / block) + 1). They never hold
    more than if they shared nothing, which is less where windows are short and generations long.

    Args:
        step_tokens: the longest chunk of a prompt; a window keeps its width and one chunk.
        source_tokens: of an encoder-decoder model's source, which all rows share in any case.
        shares_prompt: False if the rows may have to compute the prompt apart (rotary factors that change).
        retention: the policy that bounds what a row holds of full attention.
    """

    def blocks(tokens: int, reach: Reach) -> int:
        limit = reach.window_tokens or reach.chunk_tokens
        kept = tokens if limit is None else min(tokens, limit + step_tokens + layout.block_tokens)
        return layout.blocks_of(kept)

    def group(reach: Reach) -> int:
        if reach.cross:
            return layout.blocks_of(source_tokens)
        alone = blocks(prompt_tokens + new_tokens, reach)
        if retention is not None and reach.unlimited:
            alone = retention.most_blocks(
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                step_tokens=step_tokens,
                block_tokens=layout.block_tokens,
            )
        if rows == 1 or not shares_prompt:
            return rows * alone
        return min(blocks(prompt_tokens, reach) + rows * (layout.blocks_of(new_tokens) + 1), rows * alone)

    return tuple(group(layer_group.reach) for layer_group in layout.groups)


def request_blocks(
    binding: Binding,
    layout: CacheLayout,
    *,
    prompt_tokens: int,
    new_tokens: int,
    rows: int,
    step_tokens: int,
    source_tokens: int = 0,
    retention: Retention | None = None,
) -> tuple[int, ...]:
    """`worst_case_blocks` of a request on `binding`, which says whether its rows can share the prompt."""
    return worst_case_blocks(
        layout,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rows=rows,
        step_tokens=step_tokens,
        source_tokens=source_tokens,
        shares_prompt=shares_prompt(binding, prompt_tokens=prompt_tokens, new_tokens=new_tokens),
        retention=retention,
    )


def shares_prompt(binding: Binding, *, prompt_tokens: int, new_tokens: int) -> bool:
    """Whether a prompt that is computed once serves to the end.

    Rows whose rotary factors change on the way compute it anew, each for itself.
    """
    return binding.regime(prompt_tokens) == binding.regime(prompt_tokens + new_tokens)


def longest_kept(binding: Binding) -> int | None:
    """The longest that a sequence or a source of the model can be; None if it states no limit of one of them."""
    if binding.encoder is None or binding.max_tokens is None or binding.encoder.max_tokens is None:
        return binding.max_tokens
    return max(binding.max_tokens, binding.encoder.max_tokens)


def default_budget_bytes(
    layout: CacheLayout, *, max_tokens: int | None, device: torch.device, taken_bytes: int = 0
) -> int:
    """Eight sequences of the model's whole context, but at most a quarter of the memory that is available.

    Two blocks more for each: one that is rounded up, and one that a candidate of a shared prompt may copy.

    On a CPU the operating system hands out the pages of the store as they are first written, so a budget that
    is not used costs nothing.

    Args:
        max_tokens: the longest sequence, or source; see `longest_kept`.
        taken_bytes: what will have been taken from the available memory by then, such as weights not yet loaded.
    """
    wanted = layout.budget_for(DEFAULT_SEQUENCES * (layout.blocks_of(max_tokens or DEFAULT_CONTEXT) + 2))
    available = int(DEFAULT_SHARE_OF_MEMORY * max(available_memory_bytes(device) - taken_bytes, 0))
    return max(min(wanted, available), layout.total_bytes(1))
