"""Which logits processors a request runs, and in which order: exactly those of transformers 5.23.

The classes are transformers' own. The order is that of `GenerationMixin._get_logits_processor`, because
processors do not commute. `presence_penalty`, which transformers lacks, stands next to `repetition_penalty`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from kvloom.decoding.options import Options
from kvloom.errors import InvalidRequest
from kvloom.native.draw import Limits

Processor = Callable[[Tensor, Tensor], Tensor]

Allowed = Callable[[Tensor], list[int]]
"""Of a sequence, int64[tokens], the token ids that may follow it."""


class PresencePenalty:
    """Subtracts `penalty` once from each token that was already generated; the prompt does not count.

    Source: the definition of OpenAI's API, as vLLM implements it. Negative values encourage repetition.
    """

    def __init__(self, penalty: float, prompt_tokens: int) -> None:
        self.penalty = penalty
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Penalise `scores`, float[rows, vocab], by `input_ids`, int64[rows, prompt + generated]."""
        seen = torch.zeros_like(scores)
        seen.scatter_(1, input_ids[:, self.prompt_tokens :], 1.0)
        return scores - self.penalty * seen


def make_processors(
    options: Options,
    *,
    prompt_ids: list[int],
    device: torch.device,
    custom: Iterable[Processor] | None = None,
    encoder_ids: list[int] | None = None,
    allowed: Allowed | None = None,
) -> hf.LogitsProcessorList:
    """The processors of one request, ready to be called with `(int64[rows, length], float[rows, vocab])`.

    Args:
        prompt_ids: the prompt, whose length several processors count from.
        custom: the caller's processors. One of a type that the options also ask for takes its place;
            the others run after it and before temperature and its like, as in transformers.
        encoder_ids: what an encoder read; a decoder-only model's encoder input is its prompt.
        allowed: the tokens that may come next. What the options force comes even where it is not among them.
    """
    _require_processors(custom)
    built = [
        *_penalties(options, prompt_ids, encoder_ids or prompt_ids, device),
        *_length_rules(options, len(prompt_ids), device),
        *([] if allowed is None else [_only(allowed)]),
        *_forcing(options, len(prompt_ids), device),
    ]
    merged = [*merge(built, custom or ()), *(_warpers(options, device) if options.do_sample else ())]
    if options.renormalize_logits:
        merged.append(hf.LogitNormalization())
    return hf.LogitsProcessorList(merged)


def merge(defaults: Iterable[Any], custom: Iterable[Any]) -> list[Any]:
    """`defaults`, each replaced by the first of `custom` of its very type, then the rest of `custom`."""
    custom = list(custom)
    merged = [next((mine for mine in custom if type(mine) is type(ours)), ours) for ours in defaults]
    for mine in custom:
        if not any(mine is present for present in merged):
            merged.append(mine)
    return merged


def split_off_limits(processors: Iterable[Processor]) -> tuple[hf.LogitsProcessorList, Limits]:
    """The processors without the temperature, top-k and top-p that stand at their end, and these."""
    rest: list[Any] = list(processors)
    found: dict[str, Any] = {}
    if rest and type(rest[-1]) is hf.TopPLogitsWarper and rest[-1].min_tokens_to_keep == 1:
        found["top_p"] = rest.pop().top_p
    if rest and type(rest[-1]) is hf.TopKLogitsWarper:
        found["top_k"] = rest.pop().top_k
    if rest and type(rest[-1]) is hf.TemperatureLogitsWarper:
        found["temperature"] = rest.pop().temperature
    return hf.LogitsProcessorList(rest), Limits(**found)


def eos_tensor(options: Options, device: torch.device) -> Tensor | None:
    """int64[n] with the ids that end a sequence; None if there are none."""
    if not options.eos_token_id:
        return None
    return torch.tensor(options.eos_token_id, dtype=torch.int64, device=device)


def _require_processors(custom: Iterable[Processor] | None) -> None:
    if custom is None:
        return
    if not isinstance(custom, list | tuple) or not all(callable(processor) for processor in custom):
        raise InvalidRequest(
            f"`logits_processor` must be a list of callables, but is {custom!r}. Put a single one into a list."
        )


def _penalties(
    options: Options, prompt_ids: list[int], encoder_ids: list[int], device: torch.device
) -> Iterator[Processor]:
    encoder_input = torch.tensor([encoder_ids], dtype=torch.int64, device=device)
    if options.sequence_bias is not None:
        yield hf.SequenceBiasLogitsProcessor(sequence_bias=options.sequence_bias)
    if options.encoder_repetition_penalty != 1.0:
        yield hf.EncoderRepetitionPenaltyLogitsProcessor(options.encoder_repetition_penalty, encoder_input)
    if options.repetition_penalty != 1.0:
        yield hf.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)
    if options.presence_penalty != 0.0:
        yield PresencePenalty(options.presence_penalty, len(prompt_ids))
    if options.no_repeat_ngram_size > 0:
        yield hf.NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size)
    if options.encoder_no_repeat_ngram_size > 0:
        yield hf.EncoderNoRepeatNGramLogitsProcessor(options.encoder_no_repeat_ngram_size, encoder_input)
    if options.bad_words_ids is not None:
        yield hf.NoBadWordsLogitsProcessor(options.bad_words_ids, eos_tensor(options, device))


def _length_rules(options: Options, prompt_tokens: int, device: torch.device) -> Iterator[Processor]:
    eos = eos_tensor(options, device)
    if eos is None:
        return
    minimum = options.lengths(prompt_tokens).minimum
    if minimum > 0:
        yield hf.MinLengthLogitsProcessor(minimum, eos, device=str(device))
    if options.min_new_tokens:
        yield hf.MinNewTokensLengthLogitsProcessor(prompt_tokens, options.min_new_tokens, eos, device=str(device))


def _only(allowed: Allowed) -> Processor:
    constraint: Processor = hf.PrefixConstrainedLogitsProcessor(lambda _, token_ids: allowed(token_ids), num_beams=1)
    return constraint


def _forcing(options: Options, prompt_tokens: int, device: torch.device) -> Iterator[Processor]:
    if options.forced_bos_token_id is not None:
        yield hf.ForcedBOSTokenLogitsProcessor(options.forced_bos_token_id)
    if options.forced_eos_token_id is not None:
        maximum = options.lengths(prompt_tokens).maximum
        forced = list(options.forced_eos_token_id)
        yield hf.ForcedEOSTokenLogitsProcessor(maximum, forced, device=str(device))
    if options.remove_invalid_values:
        yield hf.InfNanRemoveLogitsProcessor()
    if options.exponential_decay_length_penalty is not None:
        eos = eos_tensor(options, device)
        yield hf.ExponentialDecayLengthPenalty(options.exponential_decay_length_penalty, eos, prompt_tokens)
    if options.suppress_tokens is not None:
        yield hf.SuppressTokensLogitsProcessor(list(options.suppress_tokens), device=str(device))
    if options.begin_suppress_tokens is not None:
        # After a lone start token the first generated token is the forced one, so the beginning is one later.
        later = prompt_tokens == 1 and options.forced_bos_token_id is not None
        yield hf.SuppressTokensAtBeginLogitsProcessor(
            list(options.begin_suppress_tokens), prompt_tokens + later, device=str(device)
        )


def _warpers(options: Options, device: torch.device) -> Iterator[Processor]:
    # Beams need a token that does not end the sequence, even if every EOS token survives the filters.
    keep = 1 if options.num_beams == 1 else max(1, len(options.eos_token_id)) + 1
    if options.temperature != 1.0:
        yield hf.TemperatureLogitsWarper(options.temperature)
    if options.top_h is not None:
        yield hf.TopHLogitsWarper(top_h=options.top_h)
    if options.top_k > 0:
        yield hf.TopKLogitsWarper(top_k=options.top_k, min_tokens_to_keep=keep)
    if options.top_p < 1.0:
        yield hf.TopPLogitsWarper(top_p=options.top_p, min_tokens_to_keep=keep)
    if options.min_p is not None:
        yield hf.MinPLogitsWarper(min_p=options.min_p, min_tokens_to_keep=keep)
    if options.typical_p < 1.0:
        yield hf.TypicalLogitsWarper(mass=options.typical_p, min_tokens_to_keep=keep)
    if options.epsilon_cutoff > 0.0:
        yield hf.EpsilonLogitsWarper(epsilon=options.epsilon_cutoff, min_tokens_to_keep=keep)
    if options.eta_cutoff > 0.0:
        yield hf.EtaLogitsWarper(epsilon=options.eta_cutoff, min_tokens_to_keep=keep, device=str(device))
