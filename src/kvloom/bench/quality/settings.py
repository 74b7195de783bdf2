"""What is compared: policies by name, how much each may keep, and how keys and values are kept."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from kvloom.bench.quality.controls import EveryKth, Random, Recent
from kvloom.cache.codec import Codec, check_codec
from kvloom.cache.retention import (
    CompressedPrompt,
    HeavyHitters,
    LastQuery,
    Retention,
    SinkWindow,
    TopBlocks,
)
from kvloom.errors import InvalidRequest, UnknownOption

FULL = "full"
"""Everything is kept: what the others are compared with."""

SINK_TOKENS = 4
OBSERVED_TOKENS = 32

POLICIES: dict[str, Callable[[int, int], Retention]] = {
    "sink-window": lambda tokens, _: SinkWindow(sink_tokens=SINK_TOKENS, window_tokens=max(1, tokens - SINK_TOKENS)),
    "heavy-hitters": lambda tokens, _: HeavyHitters(budget_tokens=tokens),
    "last-query": lambda tokens, _: LastQuery(budget_tokens=tokens),
    "compressed-prompt": lambda tokens, _: CompressedPrompt(
        budget_tokens=tokens, observed_tokens=min(OBSERVED_TOKENS, tokens)
    ),
    "top-blocks": lambda tokens, _: TopBlocks(budget_tokens=tokens),
    "random": lambda tokens, seed: Random(budget_tokens=tokens, seed=seed),
    "recent": lambda tokens, _: Recent(budget_tokens=tokens),
    "every-kth": lambda tokens, _: EveryKth(budget_tokens=tokens),
}
"""From a budget in tokens and a seed to a policy. The last three are controls."""

CONTROLS = ("random", "recent", "every-kth")


@dataclass(frozen=True)
class Setting:
    """One way to keep less.

    Attributes:
        policy: "full" or one of `POLICIES`.
        keep: the share of a context's tokens that may stay.
        codec: how keys and values are kept.
    """

    policy: str
    keep: float
    codec: Codec

    def __str__(self) -> str:
        kept = "" if self.policy == FULL else f" {self.keep:.3g}"
        return f"{self.policy}{kept}, {self.codec}"

    @property
    def reads_by_bounds(self) -> bool:
        """Whether blocks must keep the bounds of their keys."""
        return self.policy == "top-blocks"

    def retention(self, context_tokens: int, seed: int) -> Retention | None:
        """The policy for a context of that many tokens; None to keep everything."""
        if self.policy == FULL:
            return None
        return POLICIES[self.policy](max(1, round(self.keep * context_tokens)), seed)


REFERENCE = Setting(FULL, 1.0, "native")


def all_settings(policies: Iterable[str], keeps: Sequence[float], codecs: Iterable[str]) -> tuple[Setting, ...]:
    """The reference, and every policy at every share under every codec.

    Raises `InvalidRequest` for names that do not exist and shares that are not between 0 and 1.
    """
    for policy in (policies := tuple(dict.fromkeys(policies))):
        _check_policy(policy)
    for keep in keeps:
        if not 0 < keep < 1:
            raise InvalidRequest(
                f"`keeps={keep:g}` must be between 0 and 1, the share of the tokens that may stay. Pass a number such "
                "as 0.5."
            )
    settings = [REFERENCE]
    # By codec, the reference's first: each has a cache of its own.
    for codec in sorted(dict.fromkeys(codecs), key=lambda name: name != REFERENCE.codec):
        kept = check_codec(codec)
        settings.append(Setting(FULL, 1.0, kept))
        settings += [Setting(policy, keep, kept) for policy, keep in product(policies, dict.fromkeys(keeps))]
    return tuple(dict.fromkeys(settings))


def _check_policy(name: str) -> None:
    if name not in POLICIES:
        close = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f"Did you mean `{close[0]}`?" if close else f"There are {', '.join(POLICIES)}."
        raise UnknownOption(f"`policies={name}` does not exist. {hint}")
