"""Floor 5: logits in, decisions out. Knows neither the cache nor the model.

::

    options = resolve(model.generation_config, None, {"num_beams": 4}, vocab_size=32_000)
    decoder = make_decoder(options, prompt_ids, vocab_size=32_000, device=torch.device("cpu"))
    while not decoder.done:
        step = decoder.decide(logits)                       # logits: float[decoder.rows, vocab]
        decoder.advance(step, to_host([step])[0])
    decoder.results()
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from kvloom.decoding.base import (
    Decoder,
    FinishReason,
    HostStep,
    Hypothesis,
    Step,
    TopLogprobs,
    to_host,
)
from kvloom.decoding.beam import BeamSearch
from kvloom.decoding.beam_state import BeamRules
from kvloom.decoding.logits import Allowed, PresencePenalty, Processor, make_processors
from kvloom.decoding.options import Lengths, Options, resolve
from kvloom.decoding.randomness import fresh_seed, sample_seed
from kvloom.decoding.sampling import GreedyOrSampling
from kvloom.decoding.shared import Shared
from kvloom.decoding.stopping import Criterion, make_stopping
from kvloom.decoding.trace import Observer
from kvloom.errors import EmptyPrompt, InvalidRequest
from kvloom.native import native

__all__ = [
    "Allowed",
    "BeamSearch",
    "Decoder",
    "FinishReason",
    "GreedyOrSampling",
    "HostStep",
    "Hypothesis",
    "Lengths",
    "Options",
    "PresencePenalty",
    "Step",
    "TopLogprobs",
    "make_decoder",
    "resolve",
    "sample_seed",
    "to_host",
]


def make_decoder(
    options: Options,
    prompt_ids: list[int],
    *,
    vocab_size: int,
    device: torch.device | str,
    tokenizer: Any = None,
    logits_processor: Iterable[Processor] | None = None,
    stopping_criteria: Iterable[Criterion] | None = None,
    encoder_ids: list[int] | None = None,
    allowed: Allowed | None = None,
) -> GreedyOrSampling | BeamSearch:
    """The decoder of one request: greedy, sampling, beam search or beam sampling, as `options` say.

    Args:
        prompt_ids: what the (decoder's) sequence starts with.
        tokenizer: needed for stop strings only.
        logits_processor, stopping_criteria: the caller's own, merged as transformers merges them.
        encoder_ids: an encoder-decoder model's encoder input, for the two `encoder_*` options.
        allowed: of a sequence so far, the tokens that may come next.

    Raises:
        InvalidRequest: the options do not fit this prompt, vocabulary or tokenizer.
    """
    if not prompt_ids:
        raise EmptyPrompt("the prompt holds no tokens. A prompt of the BOS token alone is enough.")
    device = torch.device(device)
    processors = make_processors(
        options, prompt_ids=prompt_ids, device=device, custom=logits_processor, encoder_ids=encoder_ids, allowed=allowed
    )
    stopping = make_stopping(
        options, prompt_tokens=len(prompt_ids), device=device, tokenizer=tokenizer, custom=stopping_criteria
    )
    shared = Shared(
        processors=processors,
        stopping=stopping,
        observer=_observer(options, vocab_size, device),
        device=device,
        fill=_fill(options),
        seed=_seed(options),
    )
    if options.num_beams == 1:
        return GreedyOrSampling(prompt_ids, shared, samples=options.num_return_sequences)
    return BeamSearch(prompt_ids, shared, rules=_beam_rules(options, len(prompt_ids), vocab_size))


def _observer(options: Options, vocab_size: int, device: torch.device) -> Observer:
    if options.top_logprobs > vocab_size:
        raise InvalidRequest(
            f"`top_logprobs={options.top_logprobs}` exceeds the vocabulary of {vocab_size} tokens. Lower it."
        )
    return Observer(
        options.top_logprobs,
        options.output_logits,
        options.remove_invalid_values,
        options.output_scores,
        native() if device.type == "cpu" else None,  # once for all steps
    )


def _seed(options: Options) -> int | None:
    """The seed of this request; None for methods that draw no numbers."""
    if not options.do_sample:
        return None
    return fresh_seed() if options.seed is None else options.seed


def _fill(options: Options) -> int:
    """What short sequences are filled with; -1 if neither PAD nor EOS is known."""
    first_eos = options.eos_token_id[0] if options.eos_token_id else -1
    if options.num_beams == 1:
        return first_eos if options.pad_token_id is None else options.pad_token_id
    # transformers' beam search takes a PAD id of 0 for unset, and without EOS fills with -1 whatever PAD is.
    return (options.pad_token_id or first_eos) if options.eos_token_id else -1


def _beam_rules(options: Options, prompt_tokens: int, vocab_size: int) -> BeamRules:
    # With every EOS among a beam's best tokens, one more leaves it a way to go on.
    per_beam = max(2, 1 + len(options.eos_token_id))
    if per_beam > vocab_size:
        raise InvalidRequest(
            f"beam search looks at {per_beam} tokens a beam, but the vocabulary has {vocab_size}. "
            "Name fewer EOS tokens, or decode with `num_beams=1`."
        )
    return BeamRules(
        num_beams=options.num_beams,
        num_return_sequences=options.num_return_sequences,
        length_penalty=options.length_penalty,
        early_stopping=options.early_stopping,
        candidates=per_beam * options.num_beams,
        max_new_tokens=options.lengths(prompt_tokens).new_tokens,
    )
