"""What a request takes beside a context, where windows let go of what the context goes on to hold."""

from __future__ import annotations

from typing import Any

import pytest

import kvloom
from kvloom.cache import CacheLayout
from kvloom.engine import Engine
from kvloom.errors import CacheFull
from kvloom.models import AttentionInterfaceBinding
from tiny import random_ids, tiny_model

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 9}


def with_blocks(binding: AttentionInterfaceBinding, blocks: int, step_tokens: int) -> kvloom.LanguageModel:
    """A model whose layer groups have that many blocks of 4 tokens."""
    budget = CacheLayout(layers=binding.layers, dtype=binding.dtype, block_tokens=4).total_bytes(blocks)
    return kvloom.LanguageModel(
        Engine(binding, budget_bytes=budget, block_tokens=4, step_tokens=step_tokens), None, None
    )


def admitted(lm: kvloom.LanguageModel, context: kvloom.Context, new: list[int] | None) -> bool:
    """Whether a request behind the context is admitted, in which case it must come to its end."""
    try:
        stream = lm.stream(new, context=context, **GREEDY)
    except CacheFull:
        return False
    assert len(list(stream)) == 9, "an admitted request never meets a full pool"
    return True


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize(
    ("more", "step_tokens"), [(0, 512), (30, 8)], ids=["its last token again", "a longer prompt in chunks"]
)
def test_a_request_behind_a_context_is_refused_at_once_or_comes_to_its_end(
    family: str, more: int, step_tokens: int
) -> None:
    binding = AttentionInterfaceBinding(tiny_model(family))
    outcomes = []
    for blocks in range(4, 40, 1 if family == "mistral" else 5):
        lm = with_blocks(binding, blocks, step_tokens)
        try:
            # A window of 8 tokens has let go of what the context's last token saw.
            context = lm.prefill(random_ids(binding.model, tokens=43))
        except CacheFull:
            continue
        for group in lm.engine.cache.groups:
            group.index.reclaim(blocks)
        outcomes.append(admitted(lm, context, random_ids(binding.model, tokens=more, seed=1) if more else None))
        context.close()
    assert outcomes == sorted(outcomes) and outcomes[-1], "what is too much for a pool is too much for smaller ones"
