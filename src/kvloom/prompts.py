"""What users pass as a prompt: text, token ids, or a list of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from kvloom.errors import EmptyPrompt, InvalidRequest, InvalidTokens
from kvloom.text import encode_continuation, encode_start


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
            raise EmptyPrompt("the list of prompts is empty.")
        return Prompts(
            [read_prompt(own, tokenizer, vocab_size=vocab_size, continues=continues) for own in prompt], True
        )
    return Prompts([read_prompt(prompt, tokenizer, vocab_size=vocab_size, continues=continues)], False)


def read_prompt(prompt: Any, tokenizer: Any, *, vocab_size: int, continues: bool = False) -> list[int]:
    """Token ids of a single prompt; see `read_prompts`."""
    if isinstance(prompt, str):
        return _encode(prompt, tokenizer, vocab_size, continues)
    if isinstance(prompt, (Tensor, np.ndarray)):
        return read_token_ids(_flat(prompt), vocab_size)
    if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
        return read_token_ids(prompt, vocab_size)
    if isinstance(prompt, Mapping):
        raise InvalidRequest(
            f"a prompt is text or token ids; got {type(prompt).__name__}. Of a tokenizer's output pass `.input_ids`."
        )
    raise InvalidRequest(f"a prompt is text, a list of token ids, or a tensor of them; got {type(prompt).__name__}.")


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
    return bool(prompt) and not isinstance(prompt[0], (int, float, np.number))


def _encode(text: str, tokenizer: Any, vocab_size: int, continues: bool) -> list[int]:
    if tokenizer is None:
        raise InvalidRequest("the prompt is text, but no tokenizer was attached. Pass token ids, or a tokenizer.")
    if not text:
        raise EmptyPrompt("the prompt is empty. Pass some text, or the BOS token as `[bos_token_id]`.")
    token_ids = encode_continuation(tokenizer, text) if continues else encode_start(tokenizer, text)
    return read_token_ids(token_ids, vocab_size)


def _flat(prompt: Tensor | np.ndarray) -> list[Any]:
    if isinstance(prompt, Tensor) and (prompt.is_floating_point() or prompt.is_complex()):
        raise InvalidTokens(f"token ids are integers; got a tensor of {prompt.dtype}.")
    if prompt.ndim == 2 and prompt.shape[0] == 1:
        prompt = prompt[0]
    if prompt.ndim != 1:
        raise InvalidTokens(
            f"token ids have the shape [tokens] or [1, tokens]; got {list(prompt.shape)}. "
            "Pass several prompts as a list, without padding."
        )
    return list(prompt.tolist())
