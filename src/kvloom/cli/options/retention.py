"""The options that choose a retention policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvloom.cli.options.params import decorated, option

if TYPE_CHECKING:
    from kvloom.cache.retention import Retention

    SpanType = click.ParamType[tuple[int, int]]
else:
    SpanType = click.ParamType  # generic since click 8.4 only

Function = TypeVar("Function", bound=Callable[..., Any])

POLICIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sink-window": ("SinkWindow", ("sink_tokens", "window_tokens", "pins", "reindex")),
    "heavy-hitters": ("HeavyHitters", ("budget_tokens", "recent_tokens")),
    "last-query": ("LastQuery", ("budget_tokens",)),
    "compressed-prompt": ("CompressedPrompt", ("budget_tokens", "observed_tokens", "pooled_tokens")),
    "top-blocks": ("TopBlocks", ("budget_tokens",)),
}
"""For each name of a policy the library's, and its settings."""

SETTINGS = tuple(dict.fromkeys(name for _, names in POLICIES.values() for name in names))
SECTION = "Retention"


class Span(SpanType):
    """FIRST:END, positions of tokens."""

    name = "span"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The two positions."""
        if isinstance(value, tuple):
            return value
        first, _, end = value.partition(":")
        if not (first.isdecimal() and end.isdecimal()):
            self.fail(f"{value!r} is not a span of positions such as 0:64.", param, ctx)
        return int(first), int(end)


def retention_options(function: Function) -> Function:
    """Which tokens stay in the cache."""
    count: dict[str, Any] = {"metavar": "N", "type": int, "section": SECTION}
    options = [
        option(
            "--retention",
            metavar="POLICY",
            type=click.Choice([*POLICIES]),
            section=SECTION,
            help=f"Keep a part of the cache: {', '.join(POLICIES)}. This changes the output.",
        ),
        option("--sink-tokens", **count, help="sink-window: how many of the first tokens stay.  [default: 4]"),
        option("--window-tokens", **count, help="sink-window: how many of the last tokens stay.  [default: 1024]"),
        option(
            "--pin",
            "pins",
            metavar="FIRST:END",
            type=Span(),
            multiple=True,
            section=SECTION,
            help="sink-window: a span of the prompt that stays, by token positions. May be repeated.",
        ),
        option(
            "--reindex/--no-reindex",
            default=None,
            section=SECTION,
            help="sink-window: distances within the cache.  [default: where the trained length may be outgrown]",
        ),
        option(
            "--budget-tokens",
            **count,
            help="The others: how many tokens stay; top-blocks: are read.  [default: 1024]",
        ),
        option("--recent-tokens", **count, help="heavy-hitters: of these, the last ones.  [default: half]"),
        option("--observed-tokens", **count, help="compressed-prompt: how many last queries vote.  [default: 32]"),
        option("--pooled-tokens", **count, help="compressed-prompt: neighbours that share a vote.  [default: 7]"),
    ]
    return decorated(function, options)


def read_retention(options: dict[str, Any]) -> Retention | None:
    """Take the options of a policy out of `options`; the policy, or None."""
    chosen = options.pop("retention")
    given = {name: options.pop(name) for name in SETTINGS}
    given = {name: value for name, value in given.items() if value is not None and value != ()}
    if chosen is None:
        if given:
            raise click.UsageError(
                f"`{_flag(next(iter(given)))}` is a setting of a policy. Name the policy with `--retention`."
            )
        return None
    name, known = POLICIES[chosen]
    for setting in given.keys() - set(known):
        raise click.UsageError(f"`{_flag(setting)}` is not a setting of `--retention {chosen}`. Leave it out.")
    from kvloom.cache import retention

    policy: Retention = getattr(retention, name)(**given)
    return policy


def _flag(setting: str) -> str:
    return "--pin" if setting == "pins" else f"--{setting.replace('_', '-')}"
