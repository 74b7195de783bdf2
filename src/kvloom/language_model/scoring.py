"""Scoring: how likely a model finds given continuations of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from kvloom.engine import Engine, Usage
from kvloom.errors import EmptyPrompt, InvalidRequest, PromptTooLong
from kvloom.language_model.calls import UNSET, Calls
from kvloom.language_model.context import Context
from kvloom.prompts import Prompt, read_prompt, read_token_ids, target_side
from kvloom.text import Seam, decode_new, encode_continuation

Normalize = Literal["none", "tokens", "bytes"]
"""By what the log-probability of a continuation is divided."""


@dataclass(frozen=True, repr=False, kw_only=True)
class Score:
    """How likely a continuation is behind its prompt.

    Attributes:
        text: the continuation as it was passed; of token ids, what they say; None without a tokenizer.
        token_ids: its tokens.
        token_logprobs: the raw log-softmax of each, given the prompt and the tokens before it.
        bytes: length of the text in UTF-8, spaces included; None without a tokenizer.
        normalize: what `score` is.
    """

    text: str | None
    token_ids: list[int]
    token_logprobs: list[float]
    bytes: int | None
    normalize: Normalize = "none"

    def __repr__(self) -> str:
        by = "" if self.normalize == "none" else f", score={self.score:.4f} by {self.normalize}"
        return f"Score({self.text!r}, logprob={self.logprob:.4f}, token_ids={self.token_ids}{by})"

    @property
    def logprob(self) -> float:
        """Log-probability of the whole continuation: the sum over its tokens."""
        return sum(self.token_logprobs)

    @property
    def mean_logprob(self) -> float:
        """Log-probability a token."""
        return self.logprob / len(self.token_ids)

    @property
    def score(self) -> float:
        """What to rank by: the log-probability, divided as the call's `normalize` says."""
        if self.normalize == "tokens":
            return self.mean_logprob
        if self.normalize == "bytes":
            assert self.bytes, "refused before it was scored"
            return self.logprob / self.bytes
        return self.logprob


class Scores(list[Score]):
    """A score for each continuation, in the order in which they were passed.

    Attributes:
        usage: what the call cost; `new_tokens` are those of the continuations.
    """

    def __init__(self, scores: Iterable[Score], usage: Usage) -> None:
        super().__init__(scores)
        self.usage = usage


def score(
    engine: Engine,
    tokenizer: Any,
    continuations: Any,
    *,
    calls: Calls,
    read: Callable[[], Prompt],
    context: Context | None,
    normalize: Normalize,
    use_cache: bool,
) -> Scores:
    """See `LanguageModel.score`. `read` gives the prompt, the context's tokens included."""
    if normalize not in get_args(Normalize):
        raise InvalidRequest(f"`normalize={normalize}` is not known. Pass {', '.join(get_args(Normalize))}.")
    prompt = read()
    prompt_ids = prompt.token_ids
    policy = calls.policy(UNSET, context, use_cache=use_cache)
    limit = None if policy is not None and policy.reindexes else engine.binding.max_tokens
    reader = _Reader(engine, target_side(tokenizer, engine.binding), prompt_ids, max_tokens=limit)
    token_ids = reader.read_all(continuations)
    longest = max(map(len, token_ids))
    texts = [
        own if isinstance(own, str) else None if tokenizer is None else decode_new(tokenizer, prompt_ids, ids)
        for own, ids in zip(continuations, token_ids, strict=True)
    ]
    if normalize == "bytes":
        _check_bytes(texts)
    scored = engine.contexts.score(
        prompt_ids,
        token_ids,
        context=None if context is None else context.tables_for(engine),
        source=prompt.source,
        media=prompt.media,
        use_cache=use_cache,
        retention=policy
        and calls.settled(policy, prompt_tokens=len(prompt_ids), new_tokens=longest, media=prompt.media),
    )
    return Scores(
        (
            Score(
                text=text,
                token_ids=ids,
                token_logprobs=logprobs,
                bytes=None if text is None else len(text.encode()),
                normalize=normalize,
            )
            for text, ids, logprobs in zip(texts, token_ids, scored.logprobs, strict=True)
        ),
        scored.usage,
    )


class _Reader:
    """Turns continuations of one prompt into token ids."""

    def __init__(self, engine: Engine, tokenizer: Any, prompt_ids: list[int], *, max_tokens: int | None) -> None:
        self._vocab_size, self._max_tokens = engine.binding.vocab_size, max_tokens
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._seam = None if tokenizer is None else Seam.behind(tokenizer, prompt_ids)

    def read_all(self, continuations: Any) -> list[list[int]]:
        """Token ids of each. The error names the continuation that is wrong."""
        if isinstance(continuations, (str, bytes, Tensor)) or not isinstance(continuations, Sequence):
            raise InvalidRequest(
                f"continuations must be a list of texts or of lists of token ids; got {_kind(continuations)}. "
                "Put a single one into a list."
            )
        if not continuations:
            raise InvalidRequest("there are no continuations to score. Pass at least one.")
        return [self._read(own, f"continuation {number}") for number, own in enumerate(continuations, start=1)]

    def _read(self, continuation: Any, name: str) -> list[int]:
        if isinstance(continuation, str):
            token_ids = self._encode(continuation, name)
        elif isinstance(continuation, (Tensor, Sequence)) or hasattr(continuation, "ndim"):
            if not len(continuation):
                raise EmptyPrompt(f"{name} holds no tokens. Pass at least one.")
            try:
                token_ids = read_prompt(continuation, None, vocab_size=self._vocab_size)
            except InvalidRequest as error:
                raise type(error)(f"{name}: {error}") from error
        else:
            raise InvalidRequest(f"{name} is {_kind(continuation)}; a continuation is text or a list of token ids.")
        self._check_length(token_ids, name)
        return token_ids

    def _encode(self, text: str, name: str) -> list[int]:
        """As the text is tokenized behind the prompt, as far as the prompt's end shows that."""
        if self._tokenizer is None:
            raise InvalidRequest(f"{name} is text, but no tokenizer was attached. Pass token ids, or a tokenizer.")
        if not text:
            raise EmptyPrompt(f"{name} is empty. Pass some text; to score the end of the text, pass `[eos_token_id]`.")
        if self._seam is None:
            token_ids = encode_continuation(self._tokenizer, text)
        elif (behind := self._seam.encode_behind(text)) is not None:
            token_ids = behind
        else:
            raise InvalidRequest(_merges(self._seam, text, name))
        if not token_ids:
            raise EmptyPrompt(f"{name}, {text!r}, holds no tokens: the tokenizer drops all of it.")
        return read_token_ids(token_ids, self._vocab_size)

    def _check_length(self, token_ids: list[int], name: str) -> None:
        limit, tokens = self._max_tokens, len(self._prompt_ids) + len(token_ids)
        if limit is not None and tokens > limit:
            raise PromptTooLong(
                f"the prompt of {len(self._prompt_ids):,} tokens and {name} of {len(token_ids):,} exceed the model's "
                f"context of {limit:,}. Shorten them."
            )


def _merges(seam: Seam, text: str, name: str) -> str:
    remedy = "Let prompt and continuation part where a word begins"
    if seam.text[-1:].isspace():
        remedy = "Take the space from the end of the prompt and put it before the continuation"
    return (
        f"{name}, {text!r}, merges with the end of the prompt, {seam.text[-12:]!r}: the tokenizer puts no boundary "
        f"between them. {remedy}, or pass the continuation as token ids."
    )


def _check_bytes(texts: Sequence[str | None]) -> None:
    for number, text in enumerate(texts, start=1):
        if text is None:
            raise InvalidRequest(
                "`normalize='bytes'` needs a tokenizer, to turn token ids into text. Use normalize='tokens'."
            )
        if not text:
            raise InvalidRequest(
                f"continuation {number} has no text, only special tokens, so `normalize='bytes'` cannot divide by its "
                "length. Use normalize='tokens'."
            )


def _kind(value: object) -> str:
    if isinstance(value, str):
        return f"the text {value[:20]!r}"
    return f"a value of type {type(value).__name__}" if value is not None else "None"
