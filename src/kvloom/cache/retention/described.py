"""Policies as plain data, which a file can hold."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kvloom.cache.retention.base import Retention
from kvloom.cache.retention.compressed_prompt import CompressedPrompt
from kvloom.cache.retention.heavy_hitters import HeavyHitters
from kvloom.cache.retention.last_query import LastQuery
from kvloom.cache.retention.sink_window import SinkWindow
from kvloom.cache.retention.top_blocks import TopBlocks
from kvloom.errors import InvalidRequest

KNOWN: dict[str, type[Retention]] = {
    own.__name__: own for own in (SinkWindow, HeavyHitters, LastQuery, CompressedPrompt, TopBlocks)
}


def described(policy: Retention) -> dict[str, Any]:
    """The name and the settings of a policy; raises `InvalidRequest` if another process would not know it."""
    name = type(policy).__name__
    if KNOWN.get(name) is not type(policy):
        raise InvalidRequest(
            f"a context under {name} cannot be saved: another process would not know this policy. Keep "
            f"the token ids, or prefill under a policy that it knows: {', '.join(KNOWN)}."
        )
    return {"policy": name, **asdict(policy)}


def policy_of(description: object) -> Retention:
    """The policy that `described` has described. Raises `ValueError` if this is no such description."""
    if not isinstance(description, dict) or not isinstance(name := description.get("policy"), str) or name not in KNOWN:
        raise ValueError(f"{description!r} describes no retention policy")
    settings = {field: value for field, value in description.items() if field != "policy"}
    try:
        return KNOWN[name](**settings)
    except (TypeError, InvalidRequest) as error:
        raise ValueError(f"{description!r} describes no retention policy") from error
