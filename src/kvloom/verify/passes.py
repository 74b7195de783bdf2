"""Which passes recompute a run."""

from __future__ import annotations

from kvloom.models import Binding


def passes_over(binding: Binding, *, prompt_tokens: int, new_tokens: int) -> list[tuple[int, int]]:
    """(tokens, last) of each pass that gives the logits behind a run's new tokens: how many tokens of the run it takes,
    and how many of its last rows count.

    One pass serves all tokens if none of them would have had other rotary factors; otherwise each has one of its own.
    """
    whole = prompt_tokens + new_tokens - 1
    alike = all(binding.regime(tokens) == binding.regime(whole) for tokens in range(prompt_tokens, whole))
    return [(whole, new_tokens)] if alike else [(prompt_tokens + step, 1) for step in range(new_tokens)]
