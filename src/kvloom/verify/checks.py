"""The six checks, and a seventh where the uncached runs are ours, too."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.cache.retention import Retention
from kvloom.errors import InvalidRequest
from kvloom.verify.beams import compare_beams
from kvloom.verify.compare import Comparison, Decoded, compare_sequences
from kvloom.verify.differences import equal_prefix, worst
from kvloom.verify.lossy import chosen_from, compare_hypotheses, cost_of_all
from kvloom.verify.report import Check, Cost
from kvloom.verify.rounding import movement_of
from kvloom.verify.runs import NUM_BEAMS, Runs


class Checks:
    """Compares the runs. The greedy check comes first: the others compare with what it keeps."""

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
