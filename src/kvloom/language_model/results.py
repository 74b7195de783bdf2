"""What calls return."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from kvloom.decoding import FinishReason, TopLogprobs
from kvloom.engine import Usage
from kvloom.errors import ContextClosed
from kvloom.units import counted

if TYPE_CHECKING:
    from kvloom.language_model.context import Context

Inside: TypeAlias = tuple[tuple[Tensor, ...], ...]
"""A tensor for each new token and each layer."""


SHOWN = 120
"""So many characters of a text are shown by `repr`."""

SHOWN_TOKENS = 16


@dataclass(eq=False, repr=False, kw_only=True)
class Generation:
    """One generated sequence.

    Attributes:
        text: what the new tokens say, special tokens left out; "" without a tokenizer.
        tokens: the new tokens as strings; empty without a tokenizer.
        token_ids: the new tokens, the EOS token included where it was chosen.
        logprobs: raw log-softmax of each new token, before temperature, penalties and filters.
        top_logprobs: with `top_logprobs=k`, the k likeliest tokens of each step.
        logits: with `output_logits=True`, float32[new_tokens, vocab], before any processing.
        scores: with `output_scores=True`, float32[new_tokens, vocab], what processors made of the logits (in a beam
            search, of their log-softmax): what each token was chosen by.
        attentions: with `output_attentions=True`, for each new token, for each layer, float[heads, rows, columns]: what
            the model looked at when it chose the token. The first token's rows are those of the prompt's tokens that
            had to be computed (all, but for what a `context` holds), every later token has one row, of the token
            before it. Column j is the token at position j of the sequence; what a window hides weighs zero.
        cross_attentions: the same of an encoder-decoder model's source, float[heads, rows, source_tokens].
        hidden_states: with `output_hidden_states=True`, for each new token float[rows, hidden] of the same rows: what
            went into the first layer, then what came out of each, the last one behind the last norm.
        finish_reason: "eos", "length" or "stop".
        score: of a beam hypothesis: the sum of its log-probabilities / length ** length_penalty.
        usage: what the request cost, over all its sequences.
    """

    text: str
    tokens: list[str]
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs] | None
    logits: Tensor | None
    scores: Tensor | None
    attentions: Inside | None
    cross_attentions: Inside | None
    hidden_states: Inside | None
    finish_reason: FinishReason
    score: float | None
    usage: Usage
    _make_context: Callable[[], Context]
    _context: Context | None = None

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= SHOWN else f"{self.text[:SHOWN]}..."
        shown = [repr(text) if self.tokens else repr(self.token_ids[:SHOWN_TOKENS])]
        shown += [counted(len(self.token_ids), "new token"), f"finish_reason={self.finish_reason!r}"]
        shown += [] if self.score is None else [f"score={self.score:.4f}"]
        return f"Generation({', '.join(shown)})"

    def __getstate__(self) -> dict[str, Any]:
        # A context is blocks of this process's cache, held by this object: it does not go where copies go.
        return {**vars(self), "_make_context": _left_behind, "_context": None}

    @property
    def context(self) -> Context:
        """A context of the prompt and the new tokens: pass it on to continue.

        Until it is first asked for, the engine may give up the tables behind it when blocks run short; they
        are then computed anew when the context is used.
        """
        if self._context is None:
            self._context = self._make_context()
        return self._context

    def when_dropped(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call back once nobody holds this result any more."""
        weakref.finalize(self, callback, *arguments)


def _left_behind() -> Context:
    raise ContextClosed(
        "the result was copied or pickled, and its context stayed with the original. Prefill its tokens, or keep the "
        "context with `context.save(path)` and `lm.restore(path)`."
    )


class Hypotheses(list[Generation]):
    """The sequences of one prompt: samples in order, or beam hypotheses best first.

    Attributes:
        sequences: int64[n, prompt + longest], prompt and new tokens of each as `transformers.generate` returns
            them: short rows are filled with what the installed transformers fills them with.
    """

    def __init__(self, generations: Iterable[Generation], sequences: Tensor) -> None:
        super().__init__(generations)
        self.sequences = sequences


@dataclass(frozen=True)
class Piece:
    """What one step of `stream` adds.

    Attributes:
        text: new text; may be empty while a character spans tokens, or for a special token.
        token_id: the token that was chosen.
        logprob: its raw log-softmax.
        finish_reason: None until the last piece.
    """

    text: str
    token_id: int
    logprob: float
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Extended:
    """What `LanguageModel.extend` returns.

    Attributes:
        logits: float[new_tokens, vocab]: a row for each of the tokens just passed, none for earlier ones.
        context: the context with these tokens appended; the one that was passed is unchanged.
        attentions: with `output_attentions=True`, for each layer float[heads, new_tokens, tokens]: what the new tokens
            look at; column j is the token at position j of the whole sequence.
        cross_attentions: the same of an encoder-decoder model's source, float[heads, new_tokens, source_tokens].
        hidden_states: with `output_hidden_states=True`, float[new_tokens, hidden]: what goes into the first layer, then
            what comes out of each, the last one behind the last norm.
    """

    logits: Tensor
    context: Context
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
