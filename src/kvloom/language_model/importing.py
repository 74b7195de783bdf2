"""Contexts that transformers has computed."""

from __future__ import annotations

from typing import Any

from kvloom.engine import Engine
from kvloom.engine.foreign import read_pairs
from kvloom.errors import InvalidRequest
from kvloom.exclusive import uninterrupted
from kvloom.language_model.context import Context
from kvloom.prompts import read_prompt


def import_cache(engine: Engine, token_ids: Any, past_key_values: Any) -> Context:
    """A context of another cache's keys and values; see `LanguageModel.import_cache`, which calls this."""
    cache, binding = engine.cache, engine.binding
    if cache is None or binding.encoder is not None or binding.regime(1):
        why = "keeps no keys and values" if cache is None else "turns its keys by factors that depend on length"
        why = why if binding.encoder is None else "is an encoder-decoder model"
        raise InvalidRequest(f"this model {why}, so no cache can be imported. Prefill the token ids.")
    ids = read_prompt(token_ids, None, vocab_size=binding.vocab_size)
    pairs = read_pairs(past_key_values, cache.layout)
    if pairs[0][0].shape[1] > len(ids):
        raise InvalidRequest(
            f"the cache holds {pairs[0][0].shape[1]} tokens, and {len(ids)} token ids were passed. Pass the ids of all "
            "tokens that it holds, and of any that follow."
        )
    with uninterrupted():  # between what is held and its holder
        return Context(engine, ids, engine.contexts.adopt(ids, pairs))
