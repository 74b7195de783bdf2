"""Contexts that grow: the tokens behind one are run, and a longer context holds them all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvloom.attention import View
from kvloom.cache.retention import Retention
from kvloom.engine import Engine
from kvloom.engine.looking import Look, check_look
from kvloom.errors import CacheMismatch, InvalidRequest, PromptTooLong
from kvloom.exclusive import uninterrupted
from kvloom.language_model.calls import UNSET, Calls
from kvloom.language_model.context import Context, check_context
from kvloom.language_model.looking import wanted_of
from kvloom.language_model.results import Extended
from kvloom.prompts import Prompt, read_prompt

REPEATED_CONTEXT_TOKENS = 4
"""From this length on, new tokens that begin with the whole context are taken for the classic mistake."""


def extend(
    engine: Engine,
    calls: Calls,
    context: Context | None,
    token_ids: Any,
    *,
    start: int | None,
    output_attentions: bool,
    output_hidden_states: bool,
) -> Extended:
    """Run the new tokens of a sequence, and only these; see `LanguageModel.extend`, which calls this."""
    check_context(context)
    if isinstance(token_ids, str):
        raise InvalidRequest("`extend` takes token ids, and got text. Tokenize it, or use `prefill` or `generate`.")
    new_ids = read_prompt(token_ids, None, vocab_size=engine.binding.vocab_size)
    _check_continuation(context, new_ids, start)
    policy = calls.policy(UNSET, context)
    if engine.binding.encoder is not None and context is None:
        raise InvalidRequest(
            "an encoder-decoder model decodes from a source: begin with `context = lm.prefill(source)`, and extend "
            "that."
        )
    whole = calls.prompt(new_ids, context)
    wanted = wanted_of(output_attentions=output_attentions, output_hidden_states=output_hidden_states)
    check_look(wanted, engine.binding, policy)
    look = None if wanted is None else Look(wanted, 0 if context is None else context.tokens)
    logits, extended = run_behind(context, whole, engine, calls, policy=policy, all_logits=True, look=look)
    view = View() if look is None else look.view(extended.tokens)
    return Extended(logits, extended, view.attentions, view.cross_attentions, view.hidden_states)


def run_behind(
    context: Context | None,
    whole: Prompt,
    engine: Engine,
    calls: Calls,
    *,
    policy: Retention | None,
    all_logits: bool = False,
    look: Look | None = None,
) -> tuple[Tensor, Context]:
    """Run the tokens of a sequence that a context does not hold.

    Args:
        context: unchanged; None if there is none.
        whole: the sequence, which begins with the context's tokens.
        policy: that the longer context is under.
        all_logits: whether the logits of all new tokens are wanted.
        look: what is to be seen of the pass, and where it is kept.

    Returns:
        logits, float[new_tokens, vocab] with `all_logits`, else of no use; and a context of the whole sequence.
    """
    holding = None if context is None else context.tables_for(engine)
    token_ids, max_tokens = whole.token_ids, engine.binding.max_tokens
    new = len(token_ids) - (0 if context is None else context.tokens)
    if policy is None and max_tokens is not None and len(token_ids) > max_tokens:
        raise PromptTooLong(f"{len(token_ids):,} tokens exceed the model's context of {max_tokens:,}. Shorten them.")
    settled = calls.settled(policy, prompt_tokens=len(token_ids), new_tokens=0, media=whole.media)
    if engine.cache is None:
        logits = _uncached_logits(engine, token_ids, new) if all_logits else torch.empty(0)
        return logits, Context(engine, token_ids, None)
    with uninterrupted():  # between what is held and its holder
        logits, held = engine.contexts.compute(
            token_ids,
            context=holding,
            logits_of=new if all_logits else 1,
            source=whole.source,
            media=whole.media,
            retention=settled,
            look=look,
        )
        return logits, Context(engine, token_ids, held, policy, source=whole.source, media=whole.media)


def _check_continuation(context: Context | None, new_ids: list[int], start: int | None) -> None:
    """Raise `CacheMismatch` unless new tokens are what follows a context, as far as that can be seen.

    Args:
        start: the position that the caller takes the first of them for; None if it was left open.
    """
    held = 0 if context is None else context.tokens
    if start is not None and (isinstance(start, bool) or start != held):
        raise CacheMismatch(
            f"the new tokens must start at position {held}, the end of the context; start={start!r} was passed. "
            f"Pass only the tokens that the context does not hold: token_ids[{held}:], start={held}."
        )
    longest = 1 if start is None else REPEATED_CONTEXT_TOKENS
    if context is not None and held >= longest and tuple(new_ids[:held]) == context.token_ids:
        raise CacheMismatch(
            f"the {len(new_ids)} new tokens begin with all {held} tokens that the context already holds, which would "
            f"store them twice. Pass token_ids[{held}:]; if the repetition is meant, extend in two calls."
        )


def _uncached_logits(engine: Engine, token_ids: list[int], last: int) -> Tensor:
    whole = torch.tensor([token_ids], device=engine.binding.device)
    return engine.binding.forward_uncached(whole, last=last)[0]
