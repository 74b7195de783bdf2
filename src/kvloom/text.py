"""Between text and token ids: prompts in, pieces of text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvloom.errors import InvalidRequest

INCOMPLETE = "\ufffd"
"""What a tokenizer decodes to while the bytes of a character are not complete."""

PROMPT_TAIL_TOKENS = 8
"""Enough of the prompt for a tokenizer to see whether the first new word follows a space."""


CHARACTER_TOKENS = 4
"""A character has at most four bytes, and so many tokens."""

MOST_WAITING_TOKENS = 16
"""How many tokens are held back at most in the hope that they become characters."""

SEAM_TOKENS = 32
"""How much of a prompt is looked at to see whether a continuation merges with its end."""


def encode_start(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text at the start of a sequence, with the special tokens that the tokenizer adds."""
    refuse_half_characters(text)
    # Not verbose: whether the text is too long is for us to say.
    return list(tokenizer(text, verbose=False).input_ids)


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text in the middle of a sequence: no special tokens, no space that is not in the text.

    Some tokenizers put a space before whatever they encode. Then the text is encoded behind an anchor, whose
    own tokens are cut off again.
    """
    refuse_half_characters(text)
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    anchor = "\n"
    before = list(tokenizer(anchor, add_special_tokens=False, verbose=False).input_ids)
    anchored = list(tokenizer(anchor + text, add_special_tokens=False, verbose=False).input_ids)
    if before and anchored[: len(before)] == before and anchored[len(before) :] != plain:
        return anchored[len(before) :]
    return plain


def refuse_half_characters(text: str) -> None:
    """Raise `InvalidRequest` for lone surrogates, as undecodable bytes become in Python: no tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text holds {text[error.start]!a}, half of a surrogate pair and not a character by itself; most "
            "likely it was read from bytes that are not UTF-8. Decode them by their own encoding."
        ) from error


@dataclass(frozen=True)
class Seam:
    """The end of a prompt, as text that the tokenizer turns into exactly the prompt's last tokens.

    Behind it a continuation can be tokenized as it stands in the whole text, and merges across the seam show.
    """

    tokenizer: Any
    text: str
    token_ids: list[int]
    encode: Callable[[Any, str], list[int]]

    @classmethod
    def behind(cls, tokenizer: Any, token_ids: Sequence[int]) -> Seam | None:
        """The longest such end of at most 32 tokens; None if there is none, as with prompts no tokenizer writes."""
        known = list(token_ids[-SEAM_TOKENS:])
        if len(known) == len(token_ids) and known[-1] not in tokenizer.all_special_ids:
            text = _decode(tokenizer, known, skip_special_tokens=True)
            if encode_start(tokenizer, text) == known:
                return cls(tokenizer, text, known, encode_start)
        for start in range(1, len(known)):
            # With the token before it, since a first word may lose its space.
            before, whole = (_decode(tokenizer, known[start - 1 : end]) for end in (start, None))
            text, tail = whole.removeprefix(before), known[start:]
            if whole.startswith(before) and encode_continuation(tokenizer, text) == tail:
                return cls(tokenizer, text, tail, encode_continuation)
        return None

    def encode_behind(self, text: str) -> list[int] | None:
        """Token ids of `text` behind the prompt; None if the tokenizer merges it with the prompt's last tokens."""
        whole = self.encode(self.tokenizer, self.text + text)
        length = len(self.token_ids)
        return whole[length:] if whole[:length] == self.token_ids else None


def _decode(tokenizer: Any, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))


class Detokenizer:
    """Turns tokens into text as they come; holds back what is not a whole character yet.

    The pieces of a sequence, joined, are its text. Tokens are decoded behind some of the tokens before them,
    because many tokenizers drop a leading space at the start of what they decode.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # What was shown last, and what came since.
        self._token_ids = list(prompt_ids[-PROMPT_TAIL_TOKENS:])
        self._shown = len(self._token_ids)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        self._token_ids.append(token_id)
        shown, text = self._texts()
        if text == shown:
            self._token_ids.pop()  # a special token: it says nothing, and nothing behind it will change that
            return ""
        if text.endswith(INCOMPLETE):
            return self._give_up_waiting(shown)
        return self._take(shown, text) if len(text) > len(shown) else ""

    def finish(self) -> str:
        """What was held back, complete or not."""
        shown, text = self._texts()
        return self._take(shown, text) if len(text) > len(shown) else ""

    def _give_up_waiting(self, shown: str) -> str:
        """Text that no character to come can change any more; mostly empty. Else invalid bytes would wait for ever."""
        if len(self._token_ids) - self._shown <= MOST_WAITING_TOKENS:
            return ""
        settled = self._decode(self._token_ids[:-CHARACTER_TOKENS])
        self._token_ids = self._token_ids[self._shown :]
        self._shown = len(self._token_ids) - CHARACTER_TOKENS
        return settled[len(shown) :]

    def _take(self, shown: str, text: str) -> str:
        self._token_ids = self._token_ids[self._shown :]
        self._shown = len(self._token_ids)
        return text[len(shown) :]

    def _texts(self) -> tuple[str, str]:
        """The text of the tokens shown last, and of these and all that came since."""
        return self._decode(self._token_ids[: self._shown]), self._decode(self._token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def decode_new(tokenizer: Any, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """The text of the new tokens of a sequence, exactly as a stream would show it."""
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    return "".join([*map(detokenizer.push, new_ids), detokenizer.finish()])


def token_strings(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The tokens as the vocabulary spells them; "" for ids that it has no word for."""
    return [token or "" for token in tokenizer.convert_ids_to_tokens(list(token_ids))]
