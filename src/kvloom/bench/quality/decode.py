"""Known tokens decoded one by one, behind a context that was cut down before they were known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import LogitsProcessor

from kvloom.bench.quality.settings import Setting
from kvloom.bench.timing import step_ends
from kvloom.cache.retention import Retention
from kvloom.engine import Engine
from kvloom.language_model.context import Context
from kvloom.language_model.model import LanguageModel

UNCOUNTED = 2
"""Forced tokens without logits of their own: the first runs as a prompt, and the second is what that pass predicts."""


@dataclass(frozen=True)
class Decoded:
    """What came of a continuation.

    Attributes:
        logits: float32[steps, vocab]; `new_ids[i]` is what was forced or chosen by row i.
        new_ids: the tokens behind the first two.
        seconds: of each decode step.
        cache_bytes: keys and values held afterwards.
    """

    logits: Tensor
    new_ids: list[int]
    seconds: list[float]
    cache_bytes: int


class Subject:
    """A model under one setting.

    Args:
        seed: of policies that choose at random.
    """

    def __init__(self, lm: LanguageModel, setting: Setting, *, seed: int) -> None:
        self._lm = lm
        self._setting = setting
        self._seed = seed

    def decode(
        self, context_ids: list[int], forced: Sequence[list[int]], *, index: int, free: int = 0
    ) -> list[Decoded]:
        """Compute a context and cut it down; then, behind it, decode each of `forced`, and `free` tokens greedily.

        All but the first token run as decode steps, as in generation: some policies treat prompts otherwise.

        Args:
            forced: continuations of at least two tokens, each behind a fork of the context.
            index: the context's number, so that random choices differ from one to the next.
        """
        retention = self._setting.retention(len(context_ids), self._seed + index)
        with self._lm.prefill(context_ids, retention=retention) as context:
            return [self._decode(context, own, retention, free) for own in forced]

    def _decode(self, context: Context, forced_ids: list[int], retention: Retention | None, free: int) -> Decoded:
        with step_ends(self._lm.engine) as ends:
            result = self._lm.generate(
                forced_ids[:1],
                context=context,
                retention=retention,
                max_new_tokens=len(forced_ids) - 1 + free,
                logits_processor=[Forced(forced_ids[1:], start=context.tokens + 1)],
                do_sample=False,
                eos_token_id=None,
                output_logits=True,
            )
        with result.context as after:
            cache_bytes = held_bytes(self._lm.engine, after)
        seconds = [end - begin for begin, end in pairwise(ends)]
        return Decoded(result.logits[1:].float(), result.token_ids[1:], seconds, cache_bytes)


class Forced(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped for us
    """Leaves only the given tokens possible, one a step, and then any.

    Args:
        start: length of the sequence at which the first of them is due.
    """

    def __init__(self, token_ids: Sequence[int], *, start: int) -> None:
        self._token_ids = token_ids
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with all tokens but one at minus infinity."""
        index = input_ids.shape[1] - self._start
        if index >= len(self._token_ids):
            return scores
        only = torch.full_like(scores, -torch.inf)
        only[:, self._token_ids[index]] = 0.0
        return only


def held_bytes(engine: Engine, context: Context) -> int:
    """Bytes of the blocks that a context holds; 0 if it holds none."""
    holding = context.tables_for(engine)
    if engine.cache is None or holding is None or holding.cached is None:
        return 0
    return engine.cache.bytes_held([holding.cached])
