"""What is compared where the cache is lossy.

A codec changes numbers, so cached output is not that of the model's own forward, and need not be. What must hold is
that nothing else changes them: the tokens that a run has chosen, computed again in one chunk on a cache of the same
codec, give the logits from which they were chosen. That recomputation takes the place of the uncached run, and how
far it is from the uncached run is what the codec costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvloom.engine import Engine
from kvloom.models import Binding
from kvloom.prompts import Prompt
from kvloom.verify.compare import Comparison, Decoded, compare_sequences
from kvloom.verify.passes import passes_over
from kvloom.verify.report import Cost

# A number that lies on the border of two codes takes either, as rounding before it will have it. Of float32's 24 bits
# the codes keep 8, so few numbers do: together they move the logits by a small share of what the codec does. Measured
# on the demonstration model a sixteenth; in float64 none do, and 16 bits have tolerances that cover it.
SHARE_OF_COST = {torch.float32: 0.25}


def recompute(engine: Engine, prompt: Prompt, decoded: Decoded) -> Tensor:
    """float32[new tokens, vocab]: the logits behind each new token of a run, from one pass over all of them.

    Where their rotary factors differ, each token has a pass of its own.
    """
    if not decoded.token_ids:
        return decoded.logits  # of a run that gave no numbers
    whole = [*prompt.token_ids, *decoded.token_ids[:-1]]
    rows = []
    for tokens, last in _passes_over(engine.binding, prompt, decoded):
        logits, holding = engine.contexts.compute(
            whole[:tokens], logits_of=last, source=prompt.source, media=prompt.media
        )
        engine.contexts.release(holding)
        rows.append(logits)
    return torch.cat(rows).float().cpu()


def _passes_over(binding: Binding, prompt: Prompt, decoded: Decoded) -> list[tuple[int, int]]:
    return passes_over(binding, prompt_tokens=len(prompt.token_ids), new_tokens=len(decoded.token_ids))


def chosen_from(logits: Tensor, decoded: Decoded, *, greedily: bool) -> Decoded:
    """The same run with recomputed logits, and the tokens that greedy decoding would have chosen from these."""
    token_ids = logits.argmax(dim=-1).tolist() if greedily else decoded.token_ids
    return replace(decoded, logits=logits, token_ids=token_ids)


def compare_hypotheses(recomputed: Sequence[Tensor], found: Sequence[Decoded], *, prompt: int) -> list[Comparison]:
    """The logits along each hypothesis of a beam search."""
    return [
        replace(compare_sequences(chosen_from(logits, own, greedily=False), own, prompt=prompt), margin=math.inf)
        for logits, own in zip(recomputed, found, strict=True)
    ]


def cost_of(binding: Binding, codec: str, prompt: Prompt, decoded: Decoded, recomputed: Tensor) -> Cost:
    """How far the logits of one run are from those of the model's own forward over the same tokens."""
    whole = torch.tensor([[*prompt.token_ids, *decoded.token_ids[:-1]]], device=binding.device)
    rows = [
        binding.forward_uncached(whole[:, :tokens], last=last, source=prompt.source, media=prompt.media)[0]
        for tokens, last in _passes_over(binding, prompt, decoded)
    ]
    own = torch.cat(rows).float().cpu()
    expected, found = own.double().log_softmax(-1), recomputed.double().log_softmax(-1)
    divergences = (expected.exp() * (expected - found)).sum(-1)
    return Cost(
        codec=codec,
        tokens=len(own),
        same_choices=int((own.argmax(-1) == recomputed.argmax(-1)).sum()),
        mean_divergence=float(divergences.mean()),
        max_divergence=float(divergences.max()),
        max_difference=float((own - recomputed).abs().max()),
        scale=float(own.abs().max()),
    )


def cost_of_all(costs: Sequence[Cost]) -> Cost:
    """The costs of several runs as one."""
    tokens = sum(own.tokens for own in costs)
    return Cost(
        codec=costs[0].codec,
        tokens=tokens,
        same_choices=sum(own.same_choices for own in costs),
        mean_divergence=sum(own.mean_divergence * own.tokens for own in costs) / tokens,
        max_divergence=max(own.max_divergence for own in costs),
        max_difference=max(own.max_difference for own in costs),
        scale=max(own.scale for own in costs),
    )
