"""Looking inside: from a call's options to what is wanted, and from what steps have shown to results."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.attention import View, Wanted
from kvloom.decoding.options import CHECKS
from kvloom.language_model.context import Context
from kvloom.language_model.results import Inside


def wanted_of(*, output_attentions: bool, output_hidden_states: bool, every_row: bool = False) -> Wanted | None:
    """What is to be seen of the model's inside; None if nothing is. Raises `InvalidRequest` for what is no flag."""
    for name, value in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
        CHECKS[name](name, value)
    if not (output_attentions or output_hidden_states):
        return None
    return Wanted(output_attentions, output_hidden_states, every_row)


def first_seen(context: Context | None, prompt_tokens: int) -> int:
    """Position of the first prompt token whose rows are kept: what a context holds was computed before.

    The last token of a prompt always runs, since its logits choose the first new one.
    """
    return 0 if context is None else min(context.cached_tokens, prompt_tokens - 1)


def inside(steps: Sequence[View], name: str) -> Inside | None:
    """One field of what the steps of a sequence have shown; None where it was not asked for."""
    layers = [getattr(step, name) for step in steps]
    return None if not layers or layers[0] is None else tuple(layers)
