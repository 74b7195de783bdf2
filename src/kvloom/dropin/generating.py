"""`generate`: arguments in, requests through the engine, outputs out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from kvloom.decoding import Options
from kvloom.decoding.options import CHECKS, REFUSED
from kvloom.dropin.inputs import input_names, read_inputs, take_inputs
from kvloom.dropin.inside import shown_by
from kvloom.dropin.outputs import Output, output_of, sequences_of
from kvloom.dropin.padding import Batch
from kvloom.dropin.past import begin_with, carried_on
from kvloom.dropin.processors import seeing_padding
from kvloom.dropin.remembering import language_model
from kvloom.dropin.transcribing import transcribe, transcribes
from kvloom.engine import Request
from kvloom.errors import InvalidRequest, UnsupportedOption
from kvloom.language_model.calls import Asked
from kvloom.language_model.model import LanguageModel
from kvloom.language_model.results import Generation
from kvloom.language_model.stream import Stream

AllowedTokens = Callable[[int, Tensor], list[int]]

KVLOOM_ONLY = ("context", "retention", "seed", "top_logprobs", "decoder_input_ids")
"""Options of `LanguageModel.generate` for which `model.generate` has no place, or only that of another model."""


def generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Iterable[LogitsProcessor] | None = None,
    stopping_criteria: Iterable[StoppingCriteria] | None = None,
    prefix_allowed_tokens_fn: AllowedTokens | None = None,
    *,
    streamer: Any = None,
    **kwargs: Any,
) -> Tensor | Output:
    """`model.generate(inputs, ...)` on the paged cache: the same arguments, and what transformers returns.

    Each row of a batch is decoded without its padding, by a request of its own. `docs/dropin.md` lists every argument
    and its state; what is not supported is refused by name.

    Args:
        model: a language model of transformers, causal or encoder-decoder, attached at the first call and remembered
            for as long as it lives; or a `LanguageModel`, whose budget and retention then hold.
        inputs: int64[batch, width], padded on the left; `input_ids=` is the same. Of an encoder-decoder model it is the
            source, padded on the right, or `input_features`. Of an image-text model pass what its processor returns,
            `**inputs`.
        generation_config, logits_processor, stopping_criteria, kwargs: those of `model.generate`. Processors and
            criteria see the rows of one prompt at a time, without padding.
        prefix_allowed_tokens_fn: called with the index of the prompt and its tokens so far; returns the ids allowed
            next.
        streamer: gets the prompt, each token and the end; for a single sequence.

    Whisper transcribes recordings of any length: its own `generate` runs, with its arguments (`language`, `task`,
    `return_timestamps`, ...), and each of its passes is decoded on the cache.

    Samples follow `torch.manual_seed`: each prompt's seed is drawn from PyTorch's global generator. The numbers are not
    those that transformers would draw.

    Returns:
        int64[batch * num_return_sequences, width + longest], where the width of an encoder-decoder model is that of its
        decoder's start; or with `return_dict_in_generate=True` transformers' `GenerateDecoderOnlyOutput` and its
        siblings. Of `scores` and `logits`, rows that do not run any more are zeros, where transformers has what it
        computes for padding.

    Raises:
        InvalidRequest: before anything is computed; `UnsupportedOption` and `UnknownOption` name the argument.
        UnsupportedModel, CacheFull: as `attach` and `LanguageModel.generate` raise them.

    Example::

        outputs = model.generate(**inputs, max_new_tokens=64, num_beams=8)
        outputs = kvloom.generate(model, **inputs, max_new_tokens=64, num_beams=8)
    """
    tokenizer = kwargs.pop("tokenizer", None)
    lm = language_model(model, tokenizer)
    asked = Asked(None, generation_config, logits_processor, stopping_criteria, kwargs)
    decode = partial(_decode, lm, allowed=prefix_allowed_tokens_fn, streamer=streamer)
    return transcribe(lm, inputs, asked, decode) if transcribes(lm) else decode(inputs, asked)


def _decode(
    lm: LanguageModel, inputs: Tensor | None, asked: Asked, *, allowed: AllowedTokens | None, streamer: Any
) -> Tensor | Output:
    """One batch through the engine."""
    arguments = dict(asked.options)
    given, past = take_inputs(lm.binding, inputs, arguments), arguments.pop("past_key_values", None)
    asked = replace(asked, options=_without_model_inputs(arguments, lm))
    options = lm.calls.options(asked)
    batch = read_inputs(given, options, lm)
    as_dict = _flag("return_dict_in_generate", arguments, asked.generation_config, lm.generation_config)
    options = _counted(options, batch, as_dict)
    _refuse_looking_inside(options, lm)
    # Without a cache transformers runs, and shows, whole sequences at each step.
    asked = replace(asked, context=begin_with(past, lm, batch, options), every_row=not options.use_cache)
    requests = _requests(lm, batch, asked, options, allowed)
    generations = _run(lm, batch, requests, streamer)
    past = None if past is None else carried_on(past, generations[0].context)
    decoders = [request.decoder for request in requests]
    if not as_dict:
        return sequences_of(batch, decoders)
    return output_of(batch, decoders, options, shown_by(batch, requests, lm), past)


def _without_model_inputs(arguments: dict[str, Any], lm: LanguageModel) -> dict[str, Any]:
    """The options of a call: what transformers would pass on to the model's forward is refused, and None left out."""
    for name in KVLOOM_ONLY:
        if name in arguments:
            raise UnsupportedOption(
                f"`{name}` is not supported: this model's `generate` has no such argument. Attach the model, and "
                "pass it to LanguageModel.generate."
            )
    forward = getattr(getattr(lm.binding, "model", None), "forward", None)
    inputs = {} if forward is None else inspect.signature(forward).parameters
    for name in inputs.keys() & arguments.keys() - CHECKS.keys() - REFUSED.keys():
        if arguments.pop(name) is not None:
            taken = ", ".join(f"`{own}`" for own in input_names(lm.binding))
            raise UnsupportedOption(
                f"`{name}` is not supported: of the model's inputs {taken} are taken. Leave it out."
            )
    return arguments


def _refuse_looking_inside(options: Options, lm: LanguageModel) -> None:
    """transformers returns the encoder's attentions and hidden states, too, of which nothing is kept here."""
    for name in ("output_attentions", "output_hidden_states"):
        if lm.binding.encoder is not None and getattr(options, name):
            raise UnsupportedOption(
                f"`{name}` is not supported for encoder-decoder models. Attach the model: LanguageModel.generate "
                "shows the decoder's."
            )


def _flag(name: str, arguments: dict[str, Any], *configs: GenerationConfig | None) -> bool:
    values = [arguments.get(name), *(getattr(config, name, None) for config in configs)]
    value = next((value for value in values if value is not None), False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"`{name}` must be True or False, but is {value!r}.")
    return value


def _counted(options: Options, batch: Batch, as_dict: bool) -> Options:
    """The options with lengths in new tokens, as transformers counts `max_length` and `min_length` with the padding."""
    lengths = options.lengths(batch.width)
    least = min(lengths.minimum - batch.width, lengths.new_tokens)
    return replace(
        options,
        max_length=None,
        max_new_tokens=lengths.new_tokens,
        min_length=0,
        min_new_tokens=least if least > 0 else None,
        output_scores=options.output_scores and as_dict,
        output_logits=options.output_logits and as_dict,
        output_attentions=options.output_attentions and as_dict,
        output_hidden_states=options.output_hidden_states and as_dict,
    )


def _requests(
    lm: LanguageModel, batch: Batch, asked: Asked, options: Options, allowed: AllowedTokens | None
) -> list[Request]:
    """A request for each prompt of the batch."""
    requests = []
    for index, prompt in enumerate(batch.prompts):
        processors = list(asked.logits_processor or ())
        padding = batch.padded[index, : batch.width - len(prompt.token_ids)]
        if prompt.source is not None and len(padding):
            # What a decoder's processors count, such as Whisper's, they count from the start of the padded row.
            processors = [seeing_padding(own, padding) for own in processors]
        seed = int(torch.randint(2**32, ())) if options.do_sample else None
        # A context that the call begins with holds the whole prompt.
        new = prompt if asked.context is None else None
        own = replace(asked, logits_processor=processors, allowed=None if allowed is None else partial(allowed, index))
        requests += lm.calls.requests(new, own, replace(options, seed=seed))[0]
    return requests


def _run(lm: LanguageModel, batch: Batch, requests: list[Request], streamer: Any) -> list[Generation]:
    """Every sequence of every request. What they hold is freed with them; the prefix index knows the tokens."""
    if streamer is None:
        lm.calls.submit(requests)
        lm.engine.run(requests)
        return [own for request in requests for own in lm.calls.results(request)]
    if len(requests) > 1 or requests[0].max_rows > 1:
        raise UnsupportedOption(
            "`streamer` is not supported for beams or several sequences: it takes a single one. Leave it out."
        )
    with Stream(lm.engine, None, lm.calls, requests[0]) as pieces:
        streamer.put(batch.padded.cpu())
        for piece in pieces:
            streamer.put(torch.tensor([piece.token_id]))
        streamer.end()
    assert pieces.result is not None, "an exhausted stream has a result"
    return [pieces.result]
