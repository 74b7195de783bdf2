"""What users pass as a prompt: text, token ids, messages, a processor's output, or a list of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.errors import EmptyPrompt, InvalidRequest, InvalidTokens
from kvloom.models import Binding, Media, Source
from kvloom.models.images.media import join
from kvloom.models.images.vision import MEDIA_INPUTS, together
from kvloom.prompts.messages import Chat, is_conversation
from kvloom.text import encode_continuation, encode_start

NO_VISION = (
    "the model takes no images: it is a text model, or one whose attention is its own. Leave them out, or load an "
    "image-text model."
)


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a sequence begins with, or goes on with behind a context.

    Attributes:
        token_ids: placeholders of images and videos included.
        source: what it is decoded from, where there is an encoder.
        media: its images and videos, as if a sequence began with it; None if it is text.
    """

    token_ids: list[int]
    source: Source | None = None
    media: Media | None = None

    def behind(self, token_ids: Sequence[int], media: Media | None = None) -> Prompt:
        """The whole sequence whose beginning is given."""
        return Prompt([*token_ids, *self.token_ids], self.source, join(media, self.media, at=len(token_ids)))


class PromptReader:
    """Reads prompts of causal models, and what continues a context.

    Args:
        tokenizer: None if there is none; then prompts are token ids.
        processor: of an image-text model; None if there is none, and then there are no messages with images.
    """

    def __init__(self, binding: Binding, tokenizer: Any, processor: Any = None) -> None:
        self._tokenizer = tokenizer
        self._binding = binding
        refusals = {"image": NO_VISION, "video": NO_VISION} if binding.vision is None else binding.vision.refusals
        self._chat = Chat(tokenizer, processor, refusals=refusals)

    def read_all(
        self, prompt: Any, *, before: Sequence[int] | None = None, cue: bool = True
    ) -> tuple[list[Prompt], bool]:
        """A prompt, or each of a list of prompts, see `read`; and whether it was a list."""
        if is_list_of_prompts(prompt):
            return [self.read(own, before=before, cue=cue) for own in prompt], True
        return [self.read(prompt, before=before, cue=cue)], False

    def read(self, prompt: Any, *, before: Sequence[int] | None = None, cue: bool = True) -> Prompt:
        """A single prompt.

        Args:
            prompt: text; token ids as a list, or as a tensor or array of shape [tokens] or [1, tokens]; a list of
                messages; what the processor of an image-text model returns for one prompt.
            before: the tokens of the context that it continues; text then gets no special tokens, and messages close
                an answer that the context ends with.
            cue: whether messages end with the cue for an answer.

        Raises:
            EmptyPrompt, InvalidTokens, InvalidRequest: with what was wrong.
        """
        if isinstance(prompt, Prompt):
            return prompt
        if is_conversation(prompt):
            return self._with_media(self._chat.read(prompt, before=before, cue=cue))
        if isinstance(prompt, Mapping) and self._takes(prompt):
            _refuse_padding(prompt)
            return self._with_media({**prompt, "input_ids": _flat(prompt["input_ids"])})
        vocab_size = self._binding.vocab_size
        return Prompt(read_prompt(prompt, self._tokenizer, vocab_size=vocab_size, continues=before is not None))

    def check_takes(self, kind: str) -> None:
        """Raise `InvalidRequest` if messages cannot show this kind of media to the model."""
        self._chat.check_takes(kind)

    def rest(self, prompt: Prompt, first: int) -> Prompt:
        """What a prompt adds to its first `first` tokens, which cut through no image: to be passed behind these."""
        token_ids = prompt.token_ids[first:]
        items = [] if prompt.media is None else [own for own in prompt.media.items if own.places[0] >= first]
        if not items:
            return Prompt(token_ids)
        assert self._binding.vision is not None, "only a model with vision has a prompt with images"
        return Prompt(token_ids, media=self._binding.vision.read(token_ids, together(items)))

    def _takes(self, inputs: Mapping[str, Any]) -> bool:
        """Whether this is a processor's output, for a model that takes such."""
        if self._binding.vision is None and MEDIA_INPUTS & set(inputs):
            raise InvalidRequest(NO_VISION)
        return self._binding.vision is not None and isinstance(inputs.get("input_ids"), (Tensor, np.ndarray))

    def _with_media(self, inputs: Mapping[str, Any]) -> Prompt:
        token_ids = read_token_ids(inputs["input_ids"], self._binding.vocab_size)
        if not MEDIA_INPUTS & set(inputs):
            return Prompt(token_ids)
        assert self._binding.vision is not None, "refused before"
        return Prompt(token_ids, media=self._binding.vision.read(token_ids, inputs))


@dataclass(frozen=True)
class Prompts:
    """Token ids of each prompt, and whether the caller passed a list of prompts."""

    token_ids: list[list[int]]
    several: bool


def read_prompts(prompt: Any, tokenizer: Any, *, vocab_size: int, continues: bool = False) -> Prompts:
    """Token ids of what a user passed.

    Args:
        prompt: text; token ids as a list, or as a tensor or array of shape [tokens] or [1, tokens]; or a list
            of these.
        continues: whether the prompt follows a context, so that text gets no special tokens.

    Raises:
        EmptyPrompt, InvalidTokens, InvalidRequest: with what was wrong, and in which prompt.
    """
    if is_list_of_prompts(prompt):
        if not prompt:
            raise EmptyPrompt("the list of prompts is empty. Pass at least one.")
        return Prompts(
            [read_prompt(own, tokenizer, vocab_size=vocab_size, continues=continues) for own in prompt], True
        )
    return Prompts([read_prompt(prompt, tokenizer, vocab_size=vocab_size, continues=continues)], False)


def read_prompt(prompt: Any, tokenizer: Any, *, vocab_size: int, continues: bool = False) -> list[int]:
    """Token ids of a single prompt that is text or token ids; see `read_prompts`."""
    if isinstance(prompt, str):
        return _encode(prompt, tokenizer, vocab_size, continues)
    if isinstance(prompt, (Tensor, np.ndarray)):
        return read_token_ids(_flat(prompt), vocab_size)
    if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
        return read_token_ids(prompt, vocab_size)
    if prompt is None:
        raise InvalidRequest("there is no prompt. Pass text or token ids, or `context` to go on from one.")
    kind = type(prompt).__name__
    raise InvalidRequest(f"a prompt is text, a list of token ids, or a tensor of them; got {kind}. {_remedy(prompt)}")


def _remedy(prompt: Any) -> str:
    """What to pass in place of what is no prompt."""
    if isinstance(prompt, Mapping) and "role" in prompt:
        return "Put the message into a list."
    if isinstance(prompt, Mapping):
        return "Of a tokenizer's output pass `.input_ids`, or all of it to `kvloom.generate(lm, **inputs)`."
    if hasattr(prompt, "cached_tokens"):
        return "Pass a context as `context`."
    if hasattr(prompt, "context"):
        return "To go on from a result pass its `.context` as `context`."
    return "Pass one of these."


def read_token_ids(token_ids: Sequence[Any], vocab_size: int) -> list[int]:
    """Check ids one by one."""
    if not len(token_ids):
        raise EmptyPrompt("the prompt holds no tokens. A prompt of the BOS token alone is enough.")
    for token in token_ids:
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            raise InvalidTokens(f"token ids are integers; got {type(token).__name__} {token!r}.")
        if not 0 <= token < vocab_size:
            raise InvalidTokens(f"token id {token} is outside the vocabulary; valid ids are 0 to {vocab_size - 1}.")
    return [int(token) for token in token_ids]


def is_list_of_prompts(prompt: Any) -> bool:
    """Whether what was passed is several prompts."""
    if isinstance(prompt, (str, bytes, bytearray, Tensor, np.ndarray)) or not isinstance(prompt, Sequence):
        return False
    # An empty list is an empty prompt: read_prompt says so.
    return bool(prompt) and not isinstance(prompt[0], (int, float, np.number)) and not is_conversation(prompt)


def _encode(text: str, tokenizer: Any, vocab_size: int, continues: bool) -> list[int]:
    if tokenizer is None:
        raise InvalidRequest("the prompt is text, but no tokenizer was attached. Pass token ids, or a tokenizer.")
    if not text:
        raise EmptyPrompt("the prompt is empty. Pass some text, or the BOS token as `[bos_token_id]`.")
    token_ids = encode_continuation(tokenizer, text) if continues else encode_start(tokenizer, text)
    return read_token_ids(token_ids, vocab_size)


def _flat(prompt: Tensor | np.ndarray) -> list[Any]:
    if isinstance(prompt, Tensor) and (prompt.is_floating_point() or prompt.is_complex()):
        raise InvalidTokens(f"token ids are integers; got a tensor of {prompt.dtype}. Pass an integer tensor.")
    if isinstance(prompt, Tensor) and (prompt.is_meta or prompt.layout != torch.strided):
        where = "on the meta device" if prompt.is_meta else f"of layout {prompt.layout}"
        raise InvalidTokens(f"token ids are read one by one; got a tensor {where}. Pass a dense tensor with values.")
    if prompt.ndim == 2 and prompt.shape[0] == 1:
        prompt = prompt[0]
    if prompt.ndim != 1:
        raise InvalidTokens(
            f"token ids have the shape [tokens] or [1, tokens]; got {list(prompt.shape)}. "
            "Pass several prompts as a list, without padding, or a padded batch to `kvloom.generate(lm, **inputs)`."
        )
    return list(prompt.tolist())


def _refuse_padding(inputs: Mapping[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    rows = inputs["input_ids"].shape[0] if inputs["input_ids"].ndim == 2 else 1
    if rows > 1 or (mask is not None and not bool((mask == 1).all())):
        raise InvalidRequest(
            f"a processor's output is one prompt without padding; this one has {rows} rows. Process the prompts one by "
            "one, and pass them as a list."
        )
