"""The options of one request, with the names and defaults of `transformers.GenerationConfig` 5.23, and its lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvloom.errors import InvalidRequest, PromptTooLong
from kvloom.notices import warn

DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True)
class Lengths:
    """How long a sequence may and must become, prompt included. All in tokens."""

    prompt: int
    maximum: int
    minimum: int

    @property
    def new_tokens(self) -> int:
        """The most tokens that can be generated."""
        return self.maximum - self.prompt


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decoding needs to know, checked and with every default filled in.

    Each default below is the neutral value of its option: an option that is passed as None takes it.
    The exception is `top_k`, which transformers sets to 50 if nobody sets it.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    max_time: float | None = None
    stop_strings: tuple[str, ...] = ()
    do_sample: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    early_stopping: bool | Literal["never"] = False
    length_penalty: float = 1.0
    use_cache: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] | None = None
    sequence_bias: dict[tuple[int, ...], float] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: tuple[int, ...] | None = None
    output_logits: bool = False
    output_scores: bool = False
    output_attentions: bool = False
    output_hidden_states: bool = False
    top_logprobs: int = 0
    seed: int | None = None
    max_position_embeddings: int | None = None

    def lengths(self, prompt_tokens: int) -> Lengths:
        """The lengths that this request means for a prompt of `prompt_tokens` tokens.

        `max_new_tokens` wins over `max_length`, `min_new_tokens` over `min_length`. With neither maximum the
        default is 20 new tokens, cut at the model's context.

        Raises:
            InvalidRequest: `max_length` (which counts the prompt) leaves no room for a token.
            PromptTooLong: the prompt fills the model's context.
        """
        maximum = self._maximum(prompt_tokens)
        minimum = self.min_length if self.min_new_tokens is None else prompt_tokens + self.min_new_tokens
        if minimum > maximum:
            warn(f"the minimum length of {minimum} tokens exceeds the maximum of {maximum}, which wins.")
        return Lengths(prompt_tokens, maximum, minimum)

    def _maximum(self, prompt_tokens: int) -> int:
        if self.max_new_tokens is not None:
            return prompt_tokens + self.max_new_tokens
        if self.max_length is not None:
            if prompt_tokens >= self.max_length:
                raise InvalidRequest(
                    f"`max_length` of {self.max_length} tokens counts the prompt, which has {prompt_tokens}. "
                    "Raise it, or set `max_new_tokens` instead."
                )
            return self.max_length
        context = self.max_position_embeddings
        if context is not None and prompt_tokens >= context:
            raise PromptTooLong(
                f"a prompt of {prompt_tokens} tokens leaves no room for a new one in the model's context "
                f"of {context}. Shorten the prompt."
            )
        maximum = prompt_tokens + DEFAULT_NEW_TOKENS
        return maximum if context is None else min(maximum, context)
