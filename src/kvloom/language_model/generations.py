"""From finished requests to results."""

from __future__ import annotations

from typing import Any

from kvloom.decoding import Hypothesis
from kvloom.engine import Engine, Request, Usage
from kvloom.language_model.context import Context
from kvloom.language_model.looking import inside
from kvloom.language_model.results import Generation, Hypotheses
from kvloom.text import decode_new, token_strings


def results_of(request: Request, engine: Engine, tokenizer: Any) -> Hypotheses:
    """The sequences of a request that is done. Its kept tables go over to them.

    Args:
        tokenizer: of their texts; None if there is none.
    """
    hypotheses = request.decoder.results()
    usage = request.usage(sum(len(own.token_ids) for own in hypotheses))
    generations = [_generation(request, own, usage, engine, tokenizer) for own in hypotheses]
    return Hypotheses(generations, request.decoder.sequences())


def _generation(request: Request, own: Hypothesis, usage: Usage, engine: Engine, tokenizer: Any) -> Generation:
    token_ids = [*request.prompt_ids, *own.token_ids]
    holding = request.kept.get(tuple(token_ids))
    steps = [request.views[step][row] for step, row in enumerate(own.rows)] if request.views else []
    result = Generation(
        text="" if tokenizer is None else decode_new(tokenizer, request.prompt_ids, own.token_ids),
        tokens=[] if tokenizer is None else token_strings(tokenizer, own.token_ids),
        token_ids=own.token_ids,
        logprobs=own.logprobs,
        top_logprobs=own.top_logprobs,
        logits=own.logits,
        scores=own.scores,
        attentions=inside(steps, "attentions"),
        cross_attentions=inside(steps, "cross_attentions"),
        hidden_states=inside(steps, "hidden_states"),
        finish_reason=own.finish_reason,
        score=own.score,
        usage=usage,
        _make_context=lambda: Context(
            engine, token_ids, holding, request.policy, source=request.source, media=request.media
        ),
    )
    if holding is not None:
        # A context that was asked for keeps the tables itself.
        result.when_dropped(engine.contexts.release_unclaimed, holding)
        del request.kept[tuple(token_ids)]
    return result
