"""Streams turn tokens into text: each costs the same, whatever came before."""

from __future__ import annotations

import pytest

import kvloom
from kvloom.text import MOST_WAITING_TOKENS, Detokenizer, decode_new


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return kvloom.load(budget_bytes=1_000_000).tokenizer


def byte_tokens(tokenizer: object, text: bytes) -> list[int]:
    """The tokens of single bytes, as a byte-level vocabulary spells them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelled = bytes_to_unicode()
    return [tokenizer.convert_tokens_to_ids(spelled[byte]) for byte in text]


@pytest.mark.parametrize("bad", ["special", "half characters"])
def test_tokens_that_never_become_text_are_not_kept(tokenizer: object, bad: str) -> None:
    detokenizer = Detokenizer(tokenizer, [])
    token = tokenizer.all_special_ids[0] if bad == "special" else byte_tokens(tokenizer, b"\xff")[0]
    shown = "".join(detokenizer.push(token) for _ in range(500))
    assert len(detokenizer._token_ids) < 3 * MOST_WAITING_TOKENS
    text = shown + "".join(map(detokenizer.push, tokenizer(" a house").input_ids)) + detokenizer.finish()
    assert text.endswith("a house")
    assert text.count("\ufffd") == (0 if bad == "special" else 500)


def test_special_tokens_between_words_and_within_characters_change_no_text(tokenizer: object) -> None:
    words = [
        *tokenizer(" a house and").input_ids,
        *byte_tokens(tokenizer, "é€😀".encode()),
        *tokenizer(" more").input_ids,
    ]
    plain = decode_new(tokenizer, [], words)
    special = tokenizer.all_special_ids[0]
    assert "é€😀" in plain
    assert decode_new(tokenizer, [], [own for word in words for own in (word, special)]) == plain
