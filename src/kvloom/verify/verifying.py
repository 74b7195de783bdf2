"""`verify`: prompts are chosen or read, all checks are run, and a report is made."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

from kvloom.cache.retention import Retention
from kvloom.engine import Engine
from kvloom.errors import InvalidRequest
from kvloom.models import Binding
from kvloom.prompts import Prompt, PromptReader, read_sources
from kvloom.units import dtype_name
from kvloom.verify.checks import Checks
from kvloom.verify.report import Check, Cost, Report
from kvloom.verify.runs import NUM_BEAMS, Decodes, Progress, Runs
from kvloom.verify.samples import Shape, choose_prompts, choose_sources

DEFAULT_NEW_TOKENS = 24
"""More than a block of 16, so that every sequence begins a block of its own."""

MIN_PROMPT_TOKENS = 4


def verify(
    make: Callable[[Engine], Decodes],
    engine: Engine,
    tokenizer: Any,
    reader: PromptReader,
    *,
    prompts: Any = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    retention: Retention | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Compare cached with uncached decoding; see `LanguageModel.verify`, which calls this.

    Args:
        make: gives a language model for an engine, with no generation config.
        engine: the user's: its binding, and how its cache is laid out.
        retention: what the user's calls are under. The checks are not; what it does is told beside them.
    """
    began = time.perf_counter()
    binding = engine.binding
    shape = _shape(engine, max_new_tokens)
    read = _read(prompts, tokenizer, reader, binding, shape, seed)
    checks: tuple[Check, ...] = ()
    told: str | None = None
    cost: Cost | None = None
    movement: float | None = None
    bit_identical = False
    if engine.cache is not None:
        compared = Checks(runs := Runs(make, engine, read, shape, seed, on_progress))
        bit_identical = runs.bit_identical
        checks, cost = compared.all(), compared.cost
        if any(check.verdict == "failed" for check in checks):
            movement = compared.movement()
        told = None if retention is None else compared.retained(retention)
    return Report(
        binding=binding.name,
        dtype=dtype_name(binding.dtype),
        device=str(binding.device),
        codec="native" if engine.cache is None else engine.cache.layout.codec,
        prompt_tokens=tuple(len(own.token_ids) for own in read),
        source_tokens=tuple(own.source.tokens for own in read if own.source is not None),
        max_new_tokens=shape.new_tokens,
        seed=seed,
        num_beams=NUM_BEAMS,
        bit_identical=bit_identical,
        cost=cost,
        checks=checks,
        retention=told,
        movement=movement,
        note="" if checks else "a callable has no cache, and is always run uncached.",
        seconds=time.perf_counter() - began,
    )


def _shape(engine: Engine, max_new_tokens: int | None) -> Shape:
    """How long prompts and outputs may be: inside of the model's context, however short that is."""
    if max_new_tokens is not None and (isinstance(max_new_tokens, bool) or max_new_tokens < 1):
        raise InvalidRequest(f"`max_new_tokens` must be an integer of at least 1, but is {max_new_tokens!r}.")
    context = engine.binding.max_tokens
    new_tokens = max_new_tokens or DEFAULT_NEW_TOKENS
    if context is not None and max_new_tokens is None:
        new_tokens = max(1, min(new_tokens, context // 3))
    if context is not None and new_tokens > context - MIN_PROMPT_TOKENS:
        raise InvalidRequest(
            f"`max_new_tokens={new_tokens}` leaves fewer than {MIN_PROMPT_TOKENS} tokens of the model's context of "
            f"{context} for a prompt. Lower it to {max(1, context - MIN_PROMPT_TOKENS)} or less."
        )
    block_tokens = 16 if engine.cache is None else engine.cache.layout.block_tokens
    longest = None if context is None else context - new_tokens
    return Shape(new_tokens=new_tokens, longest_prompt=longest, block_tokens=block_tokens)


def _read(
    prompts: Any, tokenizer: Any, reader: PromptReader, binding: Binding, shape: Shape, seed: int
) -> list[Prompt]:
    """The prompts to be decoded. Of an encoder-decoder model they are sources, each behind some random tokens."""
    if binding.encoder is None:
        if prompts is not None:
            return reader.read_all(prompts)[0]
        return [Prompt(own) for own in choose_prompts(tokenizer, vocab_size=binding.vocab_size, shape=shape, seed=seed)]
    begun = choose_prompts(None, vocab_size=binding.vocab_size, shape=shape, seed=seed)
    if prompts is None:
        sources = choose_sources(tokenizer, binding.encoder, shape=shape, seed=seed)
    else:
        sources, _ = read_sources(prompts, tokenizer, binding.encoder)
    return [Prompt(own, source) for own, source in zip(cycle(begun), sources, strict=False)]
