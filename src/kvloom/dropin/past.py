"""`past_key_values`: a cache of transformers that a call begins with, and that holds the new tokens afterwards."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

from kvloom.decoding import Options
from kvloom.dropin.padding import Batch
from kvloom.errors import UnsupportedOption
from kvloom.language_model.context import Context
from kvloom.language_model.model import LanguageModel


def begin_with(past: Any, lm: LanguageModel, batch: Batch, options: Options) -> Context | None:
    """A context of the batch's only prompt, of which `past` holds the first tokens; None if there is or it has nothing.

    Raises `UnsupportedOption` where transformers would fill the cache in a way that cannot be given back.
    """
    if past is None:
        return None
    first = batch.prompts[0]
    if first.source is not None or first.media is not None:
        _refuse("of decoder-only models, of text")
    if len(batch.prompts) > 1 or len(first.token_ids) < batch.width or options.num_return_sequences > 1:
        _refuse("of one prompt without padding, and one sequence")
    if options.num_beams > 1 or not options.use_cache:
        _refuse("without beams, and with `use_cache=True`")
    if any(not shape.reach.unlimited for shape in lm.binding.layers):
        _refuse("of models without sliding windows")
    if isinstance(past, DynamicCache) and past.get_seq_length() == 0:
        return None
    context = lm.import_cache(first.token_ids, past)
    if context.cached_tokens == len(first.token_ids):
        # transformers then runs the whole prompt again, behind itself.
        context.close()
        _refuse(f"of the first tokens of a prompt, and this one holds all {len(first.token_ids)}")
    return context


def carried_on(past: Any, context: Context) -> DynamicCache:
    """The cache after the call: `past` with the tokens that it lacked, if it is a `DynamicCache`, else a new one."""
    whole = context.export_cache()
    if not isinstance(past, DynamicCache):
        return whole
    held = past.get_seq_length()
    for index, layer in enumerate(whole.layers):
        past.update(layer.keys[:, :, held:], layer.values[:, :, held:], index)
    return past


def _refuse(need: str) -> None:
    raise UnsupportedOption(f"`past_key_values` is not supported for such a call: it continues the cache {need}.")
