"""Keeping sinks, separators and a window, beside keeping everything: what it saves and what it costs.

SepLLM (Chen et al. 2025) keeps, of what lies before the window, the first tokens and the separators alone: the text
between two separators is said to be summed up in the second. Time and bytes are measured on a model of Qwen2.5-0.5B's
shape, quality on the demonstration model, which was trained with full attention, as the models were that the claim is
made about.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from rich.table import Table

import kvloom
from kvloom.bench.quality.decode import UNCOUNTED, Subject, held_bytes
from kvloom.bench.quality.texts import cut_passages, read_text
from kvloom.bench.timing import step_ends
from kvloom.cache.retention import Retention
from kvloom.engine import Engine

SEPARATORS = frozenset(".,?!;:")
"""And line breaks and other blanks that stand alone: those that SepLLM names."""
SINK_TOKENS, WINDOW_TOKENS = 4, 64
EVERYTHING, WINDOW, PINNED = "everything", "sinks and window", "sinks, separators and window"
CONTEXT_TOKENS, NEW_TOKENS, PASSAGES = 768, 32, 4
FINE_BLOCK_TOKENS = 1
"""Memory is freed by blocks, and in a block of 16 tokens there is nearly always a separator."""


@dataclass(frozen=True)
class Cost:
    """One way to keep less, or none.

    Attributes:
        kept: what stays, in words.
        kept_bytes: keys and values that are held.
        step_seconds: of a decode step.
    """

    kept: str
    block_tokens: int
    kept_bytes: int
    step_seconds: float


@dataclass(frozen=True)
class Quality:
    """The same on text: means over all positions that were compared.

    Attributes:
        kl: divergence from the full cache's distribution, in nats.
        nll: of the text's own next token, in nats.
        agreement: how often the likeliest token is the full cache's.
    """

    kept: str
    block_tokens: int
    kept_bytes: int
    kl: float
    nll: float
    agreement: float


def policies(separators: Sequence[int]) -> dict[str, Retention | None]:
    """Everything; sinks and window; these and the separators, which are given by position."""
    window = {"sink_tokens": SINK_TOKENS, "window_tokens": WINDOW_TOKENS}
    return {
        EVERYTHING: None,
        WINDOW: kvloom.SinkWindow(**window),
        PINNED: kvloom.SinkWindow(**window, pins=tuple((at, at + 1) for at in separators)),
    }


def with_blocks(lm: kvloom.LanguageModel, block_tokens: int) -> kvloom.LanguageModel:
    """The same model on a cold cache of the same size."""
    budget_bytes = lm.engine.cache.store.allocated_bytes
    engine = Engine(lm.binding, budget_bytes=budget_bytes, block_tokens=block_tokens)
    return kvloom.LanguageModel(engine, lm.tokenizer, None)


def measure_quality() -> tuple[list[Quality], float]:
    """On held-out text behind 768 tokens; and which share of its tokens are separators."""
    loaded = kvloom.load()
    passages = cut_passages(
        read_text(None),
        loaded.tokenizer,
        count=PASSAGES,
        context_tokens=CONTEXT_TOKENS,
        new_tokens=NEW_TOKENS + UNCOUNTED,
    )
    places = [_separators(loaded.tokenizer, own.context_ids) for own in passages]
    targets = torch.tensor([token for own in passages for token in own.continuation_ids[UNCOUNTED:]])
    found, full = [], None
    for block_tokens in (16, FINE_BLOCK_TOKENS):
        lm = with_blocks(loaded, block_tokens)
        for kept in policies([0]):
            decoded = [
                Subject(lm, _Fixed(policies(own)[kept]), seed=0).decode(
                    passage.context_ids, [passage.continuation_ids], index=0
                )[0]
                for passage, own in zip(passages, places, strict=True)
            ]
            logprobs = torch.cat([own.logits.log_softmax(-1) for own in decoded])
            full = logprobs if full is None else full
            found.append(
                Quality(
                    kept=kept,
                    block_tokens=block_tokens,
                    kept_bytes=round(statistics.mean(own.cache_bytes for own in decoded)),
                    kl=float((full.exp() * (full - logprobs)).sum(-1).mean()),
                    nll=-float(logprobs.gather(1, targets[:, None]).mean()),
                    agreement=float((logprobs.argmax(-1) == full.argmax(-1)).float().mean()),
                )
            )
    return found, sum(map(len, places)) / (len(passages) * CONTEXT_TOKENS)


def measure_cost(attached: kvloom.LanguageModel, tokens: int, share: float, *, steps: int = 16) -> list[Cost]:
    """Behind so many random tokens, of which a `share`, evenly spread, stand for separators."""
    token_ids = torch.randint(150_000, (tokens,), generator=torch.Generator().manual_seed(2)).tolist()
    separators = [int(index / share) for index in range(int(tokens * share))]
    found = []
    for block_tokens in (16, FINE_BLOCK_TOKENS):
        lm = with_blocks(attached, block_tokens)
        for kept, policy in policies(separators).items():
            if policy is None and block_tokens == FINE_BLOCK_TOKENS:
                continue
            with lm.prefill(token_ids, retention=policy) as context, step_ends(lm.engine) as ends:
                result = lm.generate(
                    [1],
                    context=context,
                    retention=policy,
                    max_new_tokens=steps,
                    do_sample=False,
                    eos_token_id=None,
                )
            with result.context as after:
                kept_bytes = held_bytes(lm.engine, after)
            seconds = statistics.median(after - before for before, after in pairwise(ends))
            found.append(Cost(kept, block_tokens, kept_bytes, seconds))
    return found


def render_costs(costs: Sequence[Cost], tokens: int) -> Table:
    """A line for each way to keep less."""
    table = Table("kept", "tokens a block", "MiB", "step, ms", title=f"behind {tokens:,} random tokens")
    for own in costs:
        mebibytes, milliseconds = own.kept_bytes / 2**20, own.step_seconds * 1e3
        table.add_row(own.kept, str(own.block_tokens), f"{mebibytes:.1f}", f"{milliseconds:.1f}")
    return table


def render_qualities(qualities: Sequence[Quality], share: float) -> Table:
    """The same for text."""
    title = f"behind {CONTEXT_TOKENS} tokens of text, of which {share:.0%} are separators; demonstration model"
    table = Table("kept", "tokens a block", "KiB", "KL, nats", "nats a token", "same likeliest", title=title)
    for own in qualities:
        size, numbers = f"{own.kept_bytes / 2**10:.0f}", (f"{own.kl:.4f}", f"{own.nll:.3f}", f"{own.agreement:.0%}")
        table.add_row(own.kept, str(own.block_tokens), size, *numbers)
    return table


def _separators(tokenizer: Any, token_ids: Sequence[int]) -> list[int]:
    """Positions of the tokens that are nothing but a separator."""
    pieces = (tokenizer.decode([token]) for token in token_ids)
    return [at for at, piece in enumerate(pieces) if not piece.strip() or piece.strip() in SEPARATORS]


@dataclass(frozen=True)
class _Fixed:
    """A setting as `Subject` asks it."""

    policy: Retention | None

    def retention(self, _context_tokens: int, _seed: int) -> Retention | None:
        return self.policy
