"""What `verify` returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Verdict = Literal["bit-identical", "equal", "near tie", "failed"]

COLUMNS = ("method", "compared", "tokens", "margin", "max |Δ|", "tolerance", "verdict")


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first place at which two runs chose other tokens.

    Attributes:
        prompt: index of the prompt.
        sequence: index of the sequence: the rank of a beam hypothesis, else 0.
        position: index among the new tokens.
        expected, found: the token of the reference and of the other run; None where a run had ended.
        margin: by how much the reference's logits prefer its own choice to the other one; see `Check.margin`.
        difference: largest difference between the scores from which the two runs chose.
        explained: whether differences of this size can turn a margin of this size. If so, it is a near tie.
    """

    prompt: int
    sequence: int
    position: int
    expected: int | None
    found: int | None
    margin: float
    difference: float
    explained: bool


@dataclass(frozen=True, kw_only=True)
class Check:
    """Two ways to compute the same thing, compared.

    Attributes:
        method: "greedy", "sampling" or "beam search".
        reference, other: the two ways, such as "uncached" and "cached".
        sequences: how many sequences were compared.
        tokens: new tokens of the reference, over all sequences.
        equal_tokens: of these, equal up to the first divergence of their sequence.
        divergence: the first one that is no near tie, else the first; None if all tokens are equal.
        divergences: how many sequences diverge.
        margin: how close the reference was to choosing otherwise: at the divergence, or the least of all steps.
            Greedy: the gap between the two best logits. Sampling: the distance, in log-odds, of the random
            number to the border of the chosen token's share. Beam search: the gap between scores of beams.
        max_difference: largest |difference| of logits (of beams: also of log-probabilities and scores) over all
            steps up to the first divergence, where both runs have the same history.
        same_bits: whether all of these are equal to the last bit.
        tolerance: what it may be: `relative_tolerance` of `scale`; 0 where only the same bits pass.
        scale: the largest |logit| of the reference.
        relative_tolerance: depends on the dtype.
        detail: what was run, in a few words.
    """

    method: str
    reference: str
    other: str
    sequences: int
    tokens: int
    equal_tokens: int
    divergence: Divergence | None
    divergences: int
    margin: float
    max_difference: float
    same_bits: bool
    tolerance: float
    scale: float
    relative_tolerance: float
    detail: str

    @property
    def verdict(self) -> Verdict:
        """ "bit-identical": same tokens, and every bit of the logits. "equal": same tokens, logits within tolerance.
        "near tie": logits within tolerance, and that small difference explains why another token won. "failed":
        anything else; where every operation is native, anything but the same bits."""
        if self.same_bits and self.max_difference == 0.0:
            return "bit-identical"
        if not self.relative_tolerance:
            return "failed"
        if not self.max_difference <= self.tolerance:
            return "failed"
        if self.divergence is None:
            return "equal"
        return "near tie" if self.divergence.explained else "failed"

    def cells(self) -> tuple[str, ...]:
        """The check as a row of a table; see `COLUMNS`."""
        return (
            self.method,
            f"{self.reference}, {self.other}",
            f"{self.equal_tokens}/{self.tokens}",
            f"{self.margin:.2g}" if math.isfinite(self.margin) else "-",
            f"{self.max_difference:.2g}",
            f"{self.tolerance:.2g}" if self.tolerance else "same bits",
            self.verdict,
        )

    def explain(self) -> str | None:
        """What went wrong, or nearly, in a sentence or two; None if all is equal."""
        title = f"{self.method}, {self.reference} against {self.other}"
        within = self.max_difference <= self.tolerance
        parts = []
        if (found := self.divergence) is not None:
            beam = f", hypothesis {found.sequence + 1}" if self.method == "beam search" else ""
            choice = f"{_token(found.expected)} {self.reference}, {_token(found.found)} {self.other}"
            more = f" ({self.divergences} of {self.sequences} sequences diverge)" if self.divergences > 1 else ""
            parts.append(f"prompt {found.prompt + 1}{beam}: new token {found.position + 1} is {choice}{more}")
            because = {True: "explained by", False: "too large for"}[found.explained]
            if within:
                parts.append(f"its margin of {found.margin:.2g} is {because} a difference of {found.difference:.2g}")
        if not self.relative_tolerance and self.verdict == "failed":
            parts.append(f"logits differ by {self.max_difference:.2g}, and not a bit may: every operation is native")
        elif not within:
            parts.append(f"logits differ by {self.max_difference:.2g}, tolerance {self.tolerance:.2g}")
        return f"{title}: {'; '.join(parts)}." if parts else None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a lossy codec costs: cached logits against those of the model's own forward, over the same tokens.

    Attributes:
        codec: how full blocks are kept.
        tokens: new tokens, over all prompts.
        same_choices: for how many of them the likeliest token is the same.
        mean_divergence, max_divergence: Kullback-Leibler divergence from the model's own distribution, in nats.
        max_difference: largest |difference| of logits.
        scale: the largest |logit| of the model.
    """

    codec: str
    tokens: int
    same_choices: int
    mean_divergence: float
    max_divergence: float
    max_difference: float
    scale: float

    def __str__(self) -> str:
        return (
            f"{self.codec} costs, against the uncached model: KL divergence {self.mean_divergence:.2g} nats on average "
            f"and {self.max_divergence:.2g} at most, the same likeliest token for {self.same_choices}/{self.tokens}, "
            f"logits within {self.max_difference:.2g} (the largest is {self.scale:.3g})."
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of `verify`. Its text is a table; `ok` says whether every check passed.

    Attributes:
        binding: how the model is attached.
        dtype, device: of weights and cache.
        codec: how the cache keeps full blocks.
        prompt_tokens: length of each prompt.
        source_tokens: of each source, of an encoder-decoder model.
        max_new_tokens, seed, num_beams: as they were used.
        bit_identical: whether every operation is native, so that neither the cache nor, under a lossy codec, chunks,
            batch mates and beams may change a bit.
        cost: of a lossy codec, which is measured and no failure; else None.
        checks: in the order in which they ran; empty if there is no cache to verify, and then `note` says why.
        retention: what the model's retention policy does to such output, in a sentence; None without one.
        movement: where a check failed, how far the model's own logits move when its embeddings change in their last
            bit; None where none failed, or where that cannot be tried.
        seconds: what it took.
    """

    binding: str
    dtype: str
    device: str
    codec: str
    prompt_tokens: tuple[int, ...]
    max_new_tokens: int
    seed: int
    num_beams: int
    bit_identical: bool
    cost: Cost | None
    checks: tuple[Check, ...]
    note: str
    seconds: float
    retention: str | None = None
    movement: float | None = None
    source_tokens: tuple[int, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no check failed. Near ties pass: they are reported, not hidden, and not counted as equal."""
        return not any(check.verdict == "failed" for check in self.checks)

    def heading(self) -> str:
        """What was verified."""
        prompts = _listed("prompt", self.prompt_tokens)
        if self.source_tokens:
            prompts = f"{_listed('source', self.source_tokens)}, {prompts}"
        codec = "" if self.codec == "native" else f", {self.codec} codec"
        return f"{self.dtype} on {self.device}{codec}, {prompts}, {self.max_new_tokens} new tokens, seed {self.seed}"

    def legend(self) -> str:
        """What the columns of the table mean."""
        share = max((check.relative_tolerance for check in self.checks), default=0.0)
        borders = any(check.tolerance > 1.001 * check.relative_tolerance * check.scale for check in self.checks)
        codes = f", and what a number on the border of two {self.codec} codes may make" if borders else ""
        native = ["same bits where every operation is native"] if self.bit_identical else []
        other = [f"{share:g} of the largest |logit|{codes}"] if share or not native else []
        return (
            "margin: how far the reference was from another choice. max |Δ|: largest difference of logits; tolerance: "
            f"{', else '.join(native + other)}. Near tie: a difference so small turned a margin as small."
        )

    def summary(self) -> str:
        """The outcome in one line."""
        if not self.checks:
            return f"nothing to compare: {self.note}"
        counted = {verdict: sum(c.verdict == verdict for c in self.checks) for verdict in get_args(Verdict)}
        parts = [f"{count} {verdict}" for verdict, count in counted.items() if count]
        outcome = "verified" if self.ok else "NOT verified"
        return f"{outcome}: {len(self.checks)} checks, {', '.join(parts)}, in {self.seconds:.1f} s"

    def advice(self) -> str | None:
        """What to do about a failure; None if there is nothing to say."""
        if self.ok:
            return None
        failed = [check for check in self.checks if check.verdict == "failed"]
        finer = "float64" if self.dtype in ("float32", "float64") else "float32"
        if self.movement is not None and self.movement > min(check.tolerance for check in failed):
            return (
                f"This model multiplies rounding: a change of its embeddings in their last bit moves its own logits by "
                f"{self.movement:.2g}, without any cache. So differences of that size tell nothing in {self.dtype}. "
                f"Verify in {finer}: rounding goes, a mistake stays."
            )
        if finer == "float64":
            return None
        return (
            f"{self.dtype} keeps few digits, and a mixture of experts may route a token elsewhere for the last of "
            "them. Verify in float32 to tell rounding from a mistake."
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all fields, with the verdict of each check and of the whole."""
        fields = asdict(self)
        fields["checks"] = [asdict(check) | {"verdict": check.verdict} for check in self.checks]
        return {"ok": self.ok, "summary": self.summary(), **fields}

    def __str__(self) -> str:
        if not self.checks:
            return self.summary()
        rows = [COLUMNS, *(check.cells() for check in self.checks)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        numeric = range(2, 6)
        table = [
            "  ".join(
                cell.rjust(width) if column in numeric else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        cost = None if self.cost is None else str(self.cost)
        notes = (*(check.explain() for check in self.checks), cost, self.advice(), self.retention)
        return "\n".join(
            [self.heading(), "", *table, "", self.legend(), *(own for own in notes if own), self.summary()]
        )


def _listed(noun: str, counts: Sequence[int]) -> str:
    """Some things and their lengths in tokens."""
    lengths = [f"{count:,}" for count in counts]
    if len(lengths) == 1:
        return f"a {noun} of {lengths[0]} tokens"
    return f"{noun}s of {', '.join(lengths[:-1])} and {lengths[-1]} tokens"


def _token(token_id: int | None) -> str:
    return "the end" if token_id is None else str(token_id)
