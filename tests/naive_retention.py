"""Retention on dense tensors: one sequence, one query at a time, no blocks of storage, no plan, no cache of ours.

transformers' modules run one token after the other, with an attention function of this file. It keeps every key and
value of every layer in a list by position, and a set of positions that are held. What is dropped leaves the set; blocks
are groups of positions. For StreamingLLM's positions tokens are run at position 0, where rotary embeddings do
nothing, and queries and keys are rotated here by their places in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

NAME = "naive_retention"

Chooser = Callable[[Tensor, dict[int, Tensor]], list[int]]


@dataclass
class Step:
    """One query of one sequence, and what the layers before it have seen."""

    state: Naive
    position: int
    mass: dict[int, float]


@dataclass
class Naive:
    """One sequence.

    Attributes:
        visible: (held positions, query) -> those that the query sees.
        choose: (queries [group, dim], {position: key}) -> positions that a KV head reads; None for all visible.
        in_cache: whether positions are those within the cache.
    """

    model: PreTrainedModel
    visible: Callable[[list[int], int], list[int]] = lambda held, query: held
    choose: Chooser | None = None
    in_cache: bool = False
    held: list[int] = field(default_factory=list)
    tokens: int = 0
    keys: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    values: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def run(self, token: int) -> tuple[Tensor, dict[int, float]]:
        """Logits, and the attention that each held position received, over all heads and layers."""
        position, self.tokens = self.tokens, self.tokens + 1
        self.held.append(position)
        step = Step(self, position, dict.fromkeys(self.held, 0.0))
        config = self.model.config
        saved, config._attn_implementation_internal = config._attn_implementation_internal, NAME
        try:
            logits = self.model(
                torch.tensor([[token]]),
                position_ids=torch.tensor([[0 if self.in_cache else position]]),
                use_cache=False,
                kvloom=step,
            ).logits[0, -1]
        finally:
            config._attn_implementation_internal = saved
        return logits, step.mass


def _attend(module, query, key, value, mask, scaling=None, kvloom: Step | None = None, **_):
    step, state, layer = kvloom, kvloom.state, module.layer_idx
    state.keys[layer, step.position], state.values[layer, step.position] = key[0, :, 0], value[0, :, 0]
    seen = state.visible(state.held, step.position)
    heads, kv_heads = query.shape[1], key.shape[1]
    output = torch.empty(1, 1, heads, value.shape[-1])
    for head in range(heads):
        kv_head = head * kv_heads // heads
        own = query[0, head, 0]
        keys = {position: state.keys[layer, position][kv_head] for position in seen}
        if state.choose is not None:
            group = query[0, kv_head * heads // kv_heads : (kv_head + 1) * heads // kv_heads, 0]
            keys = {position: keys[position] for position in state.choose(group, keys)}
        if state.in_cache:
            keys, own = _rotated(state.model, keys, own)
        weights = torch.softmax(torch.stack([own @ key for key in keys.values()]) * scaling, dim=0)
        output[0, 0, head] = weights @ torch.stack([state.values[layer, position][kv_head] for position in keys])
        for position, weight in zip(keys, weights.tolist(), strict=True):
            step.mass[position] += weight
    return output, None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)


def _rotated(model: PreTrainedModel, keys: dict[int, Tensor], query: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """Keys at their places in the cache, the query at the last one."""
    stacked = torch.stack(list(keys.values()))[None, None]
    queries = query.expand(1, 1, len(keys), -1)
    cos, sin = model.model.rotary_emb(stacked, torch.arange(len(keys))[None])
    queries, rotated = apply_rotary_pos_emb(queries, stacked, cos, sin)
    return dict(zip(keys, rotated[0, 0], strict=True)), queries[0, 0, -1]


# ---- the papers' algorithms --------------------------------------------------------------------------------------


def blocks_of(held: list[int], block_tokens: int) -> list[list[int]]:
    """Held positions by block."""
    blocks: dict[int, list[int]] = {}
    for position in held:
        blocks.setdefault(position // block_tokens, []).append(position)
    return list(blocks.values())


def drop(
    held: list[int], score: dict[int, float], budget: int, block_tokens: int, recent: int, tokens: int
) -> list[int]:
    """Let go of the block with the least mean score until the budget holds; recent blocks only after all others."""
    held = list(held)
    while len(held) > budget:
        *blocks, _last = blocks_of(held, block_tokens)
        if not blocks:
            break
        old = [block for block in blocks if block[-1] < tokens - recent]
        worst = min(old, key=lambda block: sum(score[p] for p in block) / len(block)) if old else blocks[0]
        held = [position for position in held if position not in worst]
    return held


def heavy_hitters(
    model: PreTrainedModel, token_ids: list[int], prompt: int, *, budget: int, block_tokens: int, recent: int
) -> list[Tensor]:
    """H2O: logits of each position."""
    naive, score, logits = Naive(model), dict[int, float](), []
    for token in token_ids:
        row, mass = naive.run(token)
        logits.append(row)
        score = {position: score.get(position, 0.0) + own for position, own in mass.items()}
        if naive.tokens >= prompt:
            naive.held = drop(naive.held, score, budget, block_tokens, recent, naive.tokens)
            score = {position: score[position] for position in naive.held}
    return logits


def last_query(
    model: PreTrainedModel, token_ids: list[int], prompt: int, *, budget: int, block_tokens: int
) -> list[Tensor]:
    """TOVA: logits of each position."""
    naive, logits = Naive(model), []
    for token in token_ids:
        row, mass = naive.run(token)
        logits.append(row)
        if naive.tokens >= prompt:
            naive.held = drop(naive.held, mass, budget, block_tokens, 0, naive.tokens)
    return logits


def compressed_prompt(
    model: PreTrainedModel,
    token_ids: list[int],
    prompt: int,
    *,
    budget: int,
    observed: int,
    pooled: int,
    block_tokens: int,
) -> list[Tensor]:
    """SnapKV: logits of each position."""
    naive, logits = Naive(model), []
    votes: dict[int, float] = {}
    for token in token_ids:
        row, mass = naive.run(token)
        logits.append(row)
        if prompt - observed < naive.tokens <= prompt:
            votes = {position: votes.get(position, 0.0) + own for position, own in mass.items()}
        if naive.tokens == prompt:
            half = pooled // 2
            best = {p: max(votes.get(q, -1.0) for q in range(p - half, p + half + 1)) for p in naive.held}
            naive.held = drop(naive.held, best, budget, block_tokens, observed, naive.tokens)
    return logits


def top_blocks(
    model: PreTrainedModel, token_ids: list[int], prompt: int, *, budget: int, block_tokens: int
) -> list[Tensor]:
    """Quest: logits of each position."""

    def choose(queries: Tensor, keys: dict[int, Tensor]) -> list[int]:
        positions = list(keys)
        if naive.tokens <= prompt or len(positions) <= budget:
            return positions
        full = [b for b in blocks_of(positions, block_tokens) if len(b) == block_tokens and b[-1] < naive.tokens - 1]
        others = [p for p in positions if not any(p in block for block in full)]

        def most(block: list[int]) -> float:
            own = torch.stack([keys[p] for p in block])
            low, high = own.amin(0), own.amax(0)
            return max(float(torch.maximum(query * low, query * high).sum()) for query in queries)

        take = max(0, budget // block_tokens - len(blocks_of(others, block_tokens)))
        best = sorted(full, key=most, reverse=True)[:take]
        return sorted([p for block in best for p in block] + others)

    naive = Naive(model, choose=choose)
    return [naive.run(token)[0] for token in token_ids]


def streaming(model: PreTrainedModel, token_ids: list[int], *, sinks: int, window: int) -> list[Tensor]:
    """StreamingLLM, positions within the cache: logits of each position."""

    def visible(held: list[int], query: int) -> list[int]:
        return [position for position in held if position < sinks or position > query - window]

    naive = Naive(model, visible=visible, in_cache=True)
    return [naive.run(token)[0] for token in token_ids]
