"""The options of one request: names, defaults and precedence of `transformers.GenerationConfig` 5.23.

`resolve` merges what the caller passes, the `generation_config=` object, the model's own generation config
and the library defaults, in that order of precedence, and checks the outcome. Token counts that depend on
the prompt are left to `Options.lengths`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from transformers import GenerationConfig

from kvloom.decoding.option_checks import BEAMS_ONLY, CHECKS, SAMPLING_ONLY, token_ids_in
from kvloom.decoding.refusals import ALREADY_SO, REFUSED, refuse_unsupported
from kvloom.errors import InvalidRequest, PromptTooLong, UnknownOption
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


_LIBRARY_DEFAULTS = {"top_k": 50}
_NEUTRAL = {f.name: f.default for f in fields(Options) if f.name in CHECKS and f.default is not MISSING}


def resolve(
    model_config: GenerationConfig | None,
    generation_config: GenerationConfig | None,
    options: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    max_position_embeddings: int | None = None,
    known: Iterable[str] = (),
) -> Options:
    """The options of a request.

    Args:
        model_config: the model's own generation config.
        generation_config: the one the caller passes; what it leaves at None comes from the model's.
        options: the caller's keyword arguments, which win. None switches an option off
            (`eos_token_id=None`: no EOS), except `max_length=None`, which means not given.
        vocab_size: if given, token ids that the caller passes must lie below it.
        max_position_embeddings: the model's context in tokens; bounds the default of 20 new tokens.
        known: names that the caller handles itself: suggested for typos, skipped in `options`.

    Raises:
        UnknownOption: a name that neither transformers nor KVLoom has.
        UnsupportedOption: a transformers option that is refused here and would change the output.
        InvalidRequest: a value, or a combination of values, that cannot work.
    """
    own = _entries("the model's generation config", model_config)
    passed = _entries("`generation_config`", generation_config)
    # A copy of the model's own config carries the model's entries; only the changes are the caller's.
    asked = {name: value for name, value in passed.items() if not _same(value, own.get(name))} | dict(options)
    known = frozenset(known)
    asked = {name: value for name, value in asked.items() if name not in known - CHECKS.keys()}
    _refuse(asked, own, known)
    values = _checked(asked, own)
    _check_vocabulary(values, asked, vocab_size)
    resolved = Options(**values, max_position_embeddings=max_position_embeddings)
    _check_together(resolved)
    _warn_unused(asked, resolved)
    return resolved


def _entries(what: str, config: GenerationConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise InvalidRequest(f"{what} must be a transformers.GenerationConfig, but is {config!r}.")
    entries = {name: value for name, value in vars(config).items() if value is not None}
    return {name: value for name, value in entries.items() if not name.startswith("_")}


def _same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and bool(left == right)


def _refuse(asked: Mapping[str, Any], own: Mapping[str, Any], known: Iterable[str]) -> None:
    names = {*CHECKS, *known}
    for name, value in asked.items():
        if name in REFUSED:
            refuse_unsupported(name, value, from_checkpoint=False)
        elif name not in names and name not in ALREADY_SO:
            raise UnknownOption.named(name, names)
    # Other unknown entries of a checkpoint ("chat_format", ...) mean nothing to transformers either.
    for name in (own.keys() & REFUSED.keys()) - asked.keys():
        refuse_unsupported(name, own[name], from_checkpoint=True)


def _checked(asked: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = dict(_LIBRARY_DEFAULTS)
    candidates = {**own, **{n: v for n, v in asked.items() if (n, v) != ("max_length", None)}}
    sampling = candidates.get("do_sample") is True
    for name in CHECKS.keys() & candidates.keys():
        value = candidates[name]
        if value is None:
            values[name] = _NEUTRAL[name]
        elif name in asked or not _irrelevant(name, sampling):
            values[name] = CHECKS[name](name, value)
    return values


def _irrelevant(name: str, sampling: bool) -> bool:
    """Whether a checkpoint's odd value is better skipped than refused: it has no effect."""
    return name in SAMPLING_ONLY and not sampling


def _check_vocabulary(values: Mapping[str, Any], asked: Mapping[str, Any], vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    for name in asked.keys() & values.keys():
        for token in token_ids_in(name, values[name]):
            if not 0 <= token < vocab_size:
                last = vocab_size - 1
                raise InvalidRequest(f"`{name}` names token {token}; the vocabulary has ids 0 to {last}.")


def _check_together(options: Options) -> None:
    returned, beams = options.num_return_sequences, options.num_beams
    if beams == 1 and returned > 1 and not options.do_sample:
        raise InvalidRequest(
            f"`num_return_sequences={returned}` needs several sequences, but greedy decoding has one. "
            "Set `do_sample=True` or `num_beams`."
        )
    if 1 < beams < returned:
        raise InvalidRequest(f"`num_return_sequences={returned}` exceeds `num_beams={beams}`. Raise `num_beams`.")
    if options.exponential_decay_length_penalty and not options.eos_token_id:
        raise InvalidRequest("`exponential_decay_length_penalty` works on the EOS score: set `eos_token_id`.")
    suppressed = set(options.suppress_tokens or ())
    bos = () if options.forced_bos_token_id is None else (options.forced_bos_token_id,)
    for forced in (bos, options.forced_eos_token_id or ()):
        if forced and suppressed.issuperset(forced):
            raise InvalidRequest(f"`suppress_tokens` forbids {list(forced)}, which another option forces. Change one.")


def _warn_unused(asked: Mapping[str, Any], options: Options) -> None:
    """Say so, as transformers does, when an option is set that the chosen method does not look at."""
    unused = [] if options.do_sample else [(name, "do_sample=True") for name in SAMPLING_ONLY]
    unused += [] if options.num_beams > 1 else [(name, "num_beams above 1") for name in BEAMS_ONLY]
    for name, need in unused:
        default = _LIBRARY_DEFAULTS.get(name, _NEUTRAL[name])
        if asked.get(name) is not None and asked[name] != default:
            warn(f"`{name}={asked[name]!r}` has no effect: it needs {need}.")
