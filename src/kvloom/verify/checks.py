"""The six checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

from kvloom.cache.retention import Retention
from kvloom.engine import Engine
from kvloom.errors import InvalidRequest
from kvloom.models import Binding
from kvloom.prompts import Prompt, PromptReader, read_sources
from kvloom.units import dtype_name
from kvloom.verify.beams import compare_beams
from kvloom.verify.compare import Comparison, Decoded, compare_sequences
from kvloom.verify.differences import equal_prefix, worst
from kvloom.verify.lossy import chosen_from, compare_hypotheses, cost_of_all
from kvloom.verify.report import Check, Cost, Report
from kvloom.verify.rounding import movement_of
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
        compared = _Checks(runs := Runs(make, engine, read, shape, seed, on_progress))
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


class _Checks:
    """Compares the runs."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._cold: list[Decoded] = []
        self._warm: list[Decoded] = []
        self._reference_name = "recomputed" if runs.lossy else "uncached"
        self.cost: Cost | None = None

    def all(self) -> tuple[Check, ...]:
        return (
            self.greedy(),
            self.sampling(),
            self.beams(),
            self.warm_prefix(),
            self.chunks(),
            self.batch(),
            *([self.own()] if self._runs.binding.bit_identical and not self._runs.lossy else []),
        )

    def greedy(self) -> Check:
        """Also keeps what the later checks compare with: cold, in one chunk, alone."""
        runs, references, costs = self._runs, [], []
        for prompt in runs.prompts:
            runs.tell("greedy, cached")
            lm = runs.cached(prompt)
            self._cold.append(cold := runs.decode(lm, prompt, do_sample=False))
            runs.tell("greedy, warm prefix")
            self._warm.append(runs.decode(lm, prompt, do_sample=False))
            runs.tell(f"greedy, {self._reference_name}")
            if runs.lossy:
                logits = runs.recomputed(prompt, cold)
                references.append(chosen_from(logits, cold, greedily=True))
                costs += [runs.cost(prompt, cold, logits)] if cold.token_ids else []
            else:
                references.append(runs.decode(runs.uncached(), prompt, do_sample=False, use_cache=False))
        self.cost = cost_of_all(costs) if costs else None
        names = (self._reference_name, "cached")
        return self._compare("greedy", names, references, self._cold, f"{len(references)} prompts")

    def own(self) -> Check:
        """Where the uncached runs go through our kernels too, these are compared with the model's own forward."""
        runs = self._runs
        pairs = zip(runs.prompts, self._cold, strict=True)
        references = [runs.own_forward(prompt, follows) for prompt, follows in pairs]
        detail = "transformers' modules against native kernels"
        names = ("own forward", "ours")
        return self._compare("greedy", names, references, self._cold, detail, tolerance=runs.relative_tolerance)

    def sampling(self) -> Check:
        """The same random numbers on both sides."""
        runs = self._runs
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": runs.seed}
        references, others = [], []
        for prompt in runs.prompts:
            runs.tell("sampling, cached")
            others.append(drawn := runs.decode(runs.cached(prompt), prompt, **options))
            runs.tell(f"sampling, {self._reference_name}")
            if runs.lossy:
                references.append(chosen_from(runs.recomputed(prompt, drawn), drawn, greedily=False))
            else:
                references.append(runs.decode(runs.uncached(), prompt, use_cache=False, **options))
        detail = f"temperature 1, seed {runs.seed}"
        names = (self._reference_name, "cached")
        return self._compare("sampling", names, references, others, detail, seed=runs.seed)

    def beams(self) -> Check:
        """All hypotheses of a search, and the beams of every step."""
        runs = self._runs
        comparisons: list[Comparison] = []
        for index, prompt in enumerate(runs.prompts):
            runs.tell("beam search, cached")
            others, seen_cached = runs.search(runs.cached(prompt, rows=NUM_BEAMS), prompt)
            runs.tell(f"beam search, {self._reference_name}")
            if runs.lossy:
                recomputed = [runs.recomputed(prompt, own) for own in others]
                comparisons += compare_hypotheses(recomputed, others, prompt=index)
            else:
                references, seen = runs.search(runs.uncached(), prompt, use_cache=False)
                comparisons.append(compare_beams(references, others, (seen, seen_cached), prompt=index))
        return self._check("beam search", (self._reference_name, "cached"), comparisons, f"{NUM_BEAMS} beams")

    def warm_prefix(self) -> Check:
        """The same prompt again, on the cache that holds it."""
        found = sum(own.cached_prompt_tokens for own in self._warm)
        total = sum(len(prompt.token_ids) for prompt in self._runs.prompts)
        detail = f"{found} of {total} prompt tokens found in the cache"
        return self._compare("greedy", ("cold", "warm prefix"), self._cold, self._warm, detail)

    def chunks(self) -> Check:
        """Prefill in three chunks or more, whose borders are not those of blocks."""
        runs, others = self._runs, []
        for prompt in runs.prompts:
            runs.tell("greedy, in chunks")
            step_tokens = runs.shape.chunk_tokens(len(prompt.token_ids))
            others.append(runs.decode(runs.cached(prompt, step_tokens=step_tokens), prompt, do_sample=False))
        longest = max(len(prompt.token_ids) for prompt in runs.prompts)
        detail = f"chunks of up to {runs.shape.chunk_tokens(longest)} tokens"
        return self._compare("greedy", ("one chunk", "many"), self._cold, others, detail)

    def batch(self) -> Check:
        """All prompts at once, as long as they are."""
        runs = self._runs
        runs.tell("greedy, in a batch")
        others = runs.decode_batch(runs.cached(*runs.prompts))
        return self._compare("greedy", ("alone", "in a batch"), self._cold, others, f"batch of {len(others)}")

    def movement(self) -> float | None:
        """How far the model's own logits move for a change in the last bit; see `rounding`."""
        pairs = zip(self._runs.prompts, self._cold, strict=True)
        return movement_of(self._runs.binding, [(prompt, own.token_ids) for prompt, own in pairs])

    def retained(self, policy: Retention) -> str:
        """What a policy does to the greedy output, in a sentence. It is no check: its output is meant to be another."""
        equal = new = dropped = 0
        for prompt, cold in zip(self._runs.prompts, self._cold, strict=True):
            try:
                kept = self._runs.decode(self._runs.cached(prompt), prompt, do_sample=False, retention=policy)
            except InvalidRequest as reason:
                return f"{policy!r} was not run on these prompts: {reason}"
            equal += equal_prefix(cold.token_ids, kept.token_ids)
            new, dropped = new + len(cold.token_ids), max(dropped, kept.dropped_tokens)
        return (
            f"{policy!r} was left out above. Under it greedy decoding of these prompts drops up to {dropped:,} tokens "
            f"of a sequence, and {equal} of {new} new tokens are those of the full cache, up to the first other one."
        )

    def _compare(
        self,
        method: str,
        names: tuple[str, str],
        references: Sequence[Decoded],
        others: Sequence[Decoded],
        detail: str,
        *,
        seed: int | None = None,
        tolerance: float | None = None,
    ) -> Check:
        pairs = enumerate(zip(references, others, strict=True))
        comparisons = [compare_sequences(own, other, prompt=index, seed=seed) for index, (own, other) in pairs]
        return self._check(method, names, comparisons, detail, tolerance)

    def _codes_on_a_border(self) -> float:
        """By how much logits may differ because a number lies on the border of two codes."""
        if self.cost is None or self._runs.bit_identical:
            return 0.0
        return self._runs.share_of_cost * self.cost.max_difference

    def _check(
        self,
        method: str,
        names: tuple[str, str],
        parts: Sequence[Comparison],
        detail: str,
        tolerance: float | None = None,
    ) -> Check:
        if tolerance is None:
            tolerance = 0.0 if self._runs.bit_identical else self._runs.relative_tolerance
        divergences = [found for part in parts for found in part.divergences]
        first = next((found for found in divergences if not found.explained), next(iter(divergences), None))
        scale = max(part.scale for part in parts)
        return Check(
            method=method,
            reference=names[0],
            other=names[1],
            sequences=sum(part.sequences for part in parts),
            tokens=sum(part.tokens for part in parts),
            equal_tokens=sum(part.equal_tokens for part in parts),
            divergence=first,
            divergences=len(divergences),
            margin=min(part.margin for part in parts) if first is None else first.margin,
            max_difference=worst([part.max_difference for part in parts]),
            same_bits=all(part.same_bits for part in parts),
            tolerance=tolerance * scale + self._codes_on_a_border(),
            scale=scale,
            relative_tolerance=tolerance,
            detail=detail,
        )
