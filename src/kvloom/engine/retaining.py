"""Retention in the engine: which policy a request may have, and what it lets go of after each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvloom.attention import Plan
from kvloom.cache import CachedSequence, CacheLayout, KVCache
from kvloom.cache.retention import Held, Retained, Retention, SinkWindow, TopBlocks
from kvloom.errors import InvalidRequest, PromptTooLong, UnsupportedModel
from kvloom.models import Binding

# ---- before a request --------------------------------------------------------------------------------------------


def settle(
    policy: Retention, binding: Binding, layout: CacheLayout | None, *, prompt_tokens: int, new_tokens: int
) -> Retention:
    """The policy as a request of this length applies it.

    Raises:
        InvalidRequest: the model cannot honour it, or it makes no sense for the prompt.
        PromptTooLong: the sequence outgrows the trained length, and cannot be re-indexed.
    """
    name = type(policy).__name__
    if layout is None:
        raise InvalidRequest(
            f"{name} cannot be honoured: the model does not show its attention and keeps no cache. Leave it out."
        )
    if not binding.shows_attention:
        why = "decodes from a source" if binding.encoder is not None else "computes its attention itself"
        raise InvalidRequest(f"{name} cannot be honoured: the model {why}, so it is handed every token. Leave it out.")
    if not any(group.reach.unlimited for group in layout.groups):
        reaches = " and ".join(str(group.reach) for group in layout.groups)
        raise InvalidRequest(f"{name} has nothing to do: every layer has a {reaches} of its own. Leave it out.")
    if isinstance(policy, TopBlocks) and not layout.block_bounds:
        raise InvalidRequest(
            "TopBlocks needs the bounds of every block's keys, which are planned for when a model is loaded or "
            "attached. Pass a TopBlocks as `retention` there."
        )
    policy.check(prompt_tokens=prompt_tokens, block_tokens=layout.block_tokens)
    total = prompt_tokens + new_tokens
    if binding.regime(prompt_tokens) != binding.regime(total):
        raise InvalidRequest(
            f"{name} cannot be honoured: between {prompt_tokens:,} and {total:,} tokens the model's rotary factors "
            "change, and then all tokens are computed again. Stay within one regime."
        )
    outgrows = binding.max_tokens is not None and total > binding.max_tokens
    settled = policy.settled(outgrows=outgrows)
    if isinstance(settled, SinkWindow) and settled.reindex:
        _check_reindexing(settled, binding)
    elif outgrows:
        _refuse_to_outgrow(policy, binding, prompt_tokens, new_tokens)
    return settled


def check_policy(policy: object) -> None:
    """Refuse what is no policy."""
    if policy is not None and not isinstance(policy, Retention):
        raise InvalidRequest(f"`retention` must be a policy such as kvloom.SinkWindow(), or None; got {policy!r}.")


def _check_reindexing(policy: SinkWindow, binding: Binding) -> None:
    try:
        binding.turns()
    except UnsupportedModel as reason:
        raise InvalidRequest(
            f"SinkWindow cannot be re-indexed on this model: {reason}. Stay within its trained length"
            f"{'' if binding.max_tokens is None else f' of {binding.max_tokens:,} tokens'}, with `reindex=False`."
        ) from reason
    if binding.max_tokens is not None:
        policy.check_trained(binding.max_tokens)


def _refuse_to_outgrow(policy: Retention, binding: Binding, prompt_tokens: int, new_tokens: int) -> None:
    remedy = (
        "Leave `reindex` at None." if isinstance(policy, SinkWindow) else "Lower max_new_tokens, or use a SinkWindow."
    )
    raise PromptTooLong(
        f"{prompt_tokens:,} prompt tokens and {new_tokens:,} new ones exceed the model's trained length of "
        f"{binding.max_tokens:,}, and {type(policy).__name__} keeps positions as they are. {remedy}"
    )


# ---- a sequence begins -------------------------------------------------------------------------------------------


def begin(
    cached: CachedSequence, policy: Retention | None, *, prompt_tokens: int, trained_tokens: int | None
) -> CachedSequence:
    """Put a sequence under a policy, or let it go on under its own; `cached` holds the beginning of the prompt."""
    if policy is None:
        return cached
    if cached.retained is None:
        cached.retained = Retained.begin(
            policy, cached.tables, prompt_tokens=prompt_tokens, trained_tokens=trained_tokens
        )
    else:
        cached.retained = cached.retained.going_on(
            policy, computed=cached.tokens, prompt_tokens=prompt_tokens, trained_tokens=trained_tokens
        )
    return cached


# ---- after a step ------------------------------------------------------------------------------------------------


def retain(cache: KVCache, sequences: Sequence[CachedSequence], plan: Plan) -> None:
    """Score what the step observed, and let go of what each sequence's policy does not keep."""
    masses = [None if group.observation is None else group.observation.masses() for group in plan.groups]
    for index, sequence in enumerate(sequences):
        if sequence.retained is not None:
            _retain(cache, sequence, [None if own is None else own[index] for own in masses])


def _retain(cache: KVCache, sequence: CachedSequence, masses: Sequence[npt.NDArray[np.float32] | None]) -> None:
    retained = sequence.retained
    assert retained is not None, "only a sequence under a policy lets go of tokens"
    policy, tokens = retained.policy, sequence.tokens
    scores, dropped = list(retained.scores), False
    for index, group in enumerate(cache.groups):
        if not group.group.reach.unlimited:
            continue
        table = sequence.tables[index]
        if policy.scored:
            before = np.pad(scores[index], (0, table.held - len(scores[index])))
            scores[index] = policy.score(before, masses[index])
        held = Held.of(table, scores[index], retained.prompt)
        keep = policy.keep(held)
        if not keep.all():
            dropped = True
            scores[index] = scores[index][np.repeat(keep, held.counts)] if policy.scored else scores[index]
            table.keep(keep)
    exact = retained.exact_tokens
    sequence.retained = replace(
        retained, scores=tuple(scores), exact_tokens=tokens if dropped and exact is None else exact
    )


def dropped_tokens(cache: KVCache, sequence: CachedSequence) -> int:
    """Tokens that the last query could not see any more, in layers with full attention."""
    if sequence.retained is None or not sequence.tokens:
        return 0
    if sequence.retained.sight is not None:
        return sequence.retained.sight.hidden(sequence.tokens - 1)
    full = (table for table, group in zip(sequence.tables, cache.groups, strict=True) if group.group.reach.unlimited)
    return max(sequence.tokens - table.held for table in full)
