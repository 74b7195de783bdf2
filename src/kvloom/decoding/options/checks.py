"""What each supported generation option may be.

A check returns the value in one canonical form: token ids as tuples of int, integers as int, all other
numbers as float (transformers' own classes refuse `temperature=2`). Anything else is an `InvalidRequest`
that names the option, what it must be, and what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

from kvloom.errors import InvalidRequest


@dataclass(frozen=True)
class Check:
    """How one option is validated: `accept` returns the canonical value, `expected` says what it wants."""

    expected: str
    accept: Callable[[Any], Any]
    remedy: str = ""

    def __call__(self, name: str, value: Any) -> Any:
        try:
            return self.accept(value)
        except (TypeError, ValueError):
            message = f"`{name}` must be {self.expected}, but is {value!r}.{self.remedy}"
            raise InvalidRequest(message) from None


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError


def _bool(value: Any) -> bool:
    _require(isinstance(value, bool))
    return bool(value)


def _int(value: Any) -> int:
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        value = value.item()
    _require(isinstance(value, Integral) and not isinstance(value, bool))
    return int(value)


def _integer(minimum: int) -> Check:
    def accept(value: Any) -> int:
        number = _int(value)
        _require(number >= minimum)
        return number

    return Check(f"an integer of at least {minimum}", accept)


def _or_off(value: Any) -> int:
    # transformers runs what belongs to these options only where they are above 0.
    return max(0, _int(value))


def _number(expected: str, holds: Callable[[float], bool], remedy: str = "") -> Check:
    def accept(value: Any) -> float:
        _require(isinstance(value, Real) and not isinstance(value, bool))
        _require(math.isfinite(value) and holds(float(value)))
        return float(value)

    return Check(expected, accept, remedy)


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, Integral):
        value = [value]
    _require(not isinstance(value, str | bytes | Mapping))
    return tuple(_int(token) for token in value)


def _ends(value: Any) -> tuple[int, ...]:
    ids = _ids(value)
    return () if ids == (-1,) else ids


def _pad(value: Any) -> int | None:
    token = _int(value)
    _require(token >= -1)
    return None if token == -1 else token


def _words(value: Any) -> list[list[int]]:
    _require(all(isinstance(word, Sequence) for word in value))
    words = [list(_ids(word)) for word in value]
    _require(bool(words) and all(words))
    return words


def _bias(value: Any) -> dict[tuple[int, ...], float]:
    pairs = value.items() if isinstance(value, Mapping) else value
    bias = {_ids(word): float(amount) for word, amount in pairs}
    _require(bool(bias) and all(bias))
    return bias


def _strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value)
    _require(bool(strings) and all(isinstance(s, str) and s for s in strings))
    return strings


def _decay(value: Any) -> tuple[int, float]:
    start, factor = value
    return _int(start), float(factor)


def _seed(value: Any) -> int:
    seed = _int(value)
    _require(0 <= seed < 2**64)
    return seed


def _early_stopping(value: Any) -> bool | str:
    _require(isinstance(value, bool) or value == "never")
    return value if isinstance(value, bool) else "never"


_GREEDY = " For greedy decoding set `do_sample=False`."
_FLAG = Check("True or False", _bool)
_IDS = Check("a token id or a list of token ids", _ids)
_PROBABILITY = _number("a number above 0 and at most 1", lambda p: 0 < p <= 1, _GREEDY)
_CUTOFF = _number("a number below 1, where 0 and below mean off", lambda p: p < 1)
_COUNT = Check("an integer, where 0 and below mean off", _or_off)
_FACTOR = _number("a number above 0", lambda x: x > 0)
_TOKEN = Check("a token id", _integer(0).accept)

CHECKS: dict[str, Check] = {
    "max_length": _integer(1),
    "max_new_tokens": _integer(1),
    "min_length": _COUNT,
    "min_new_tokens": _COUNT,
    "max_time": _FACTOR,
    "stop_strings": Check("a non-empty string or a list of non-empty strings", _strings),
    "do_sample": _FLAG,
    "num_beams": _integer(1),
    "num_return_sequences": _integer(1),
    "early_stopping": Check('True, False or "never"', _early_stopping),
    "length_penalty": _number("a finite number", lambda x: True),
    "use_cache": _FLAG,
    "temperature": _number("a number above 0", lambda t: t > 0, _GREEDY),
    "top_k": Check("an integer of at least 0, where 0 keeps every token", _integer(0).accept),
    "top_p": _PROBABILITY,
    "min_p": _number("a number from 0 to 1", lambda p: 0 <= p <= 1),
    "top_h": _PROBABILITY,
    "typical_p": _PROBABILITY,
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "repetition_penalty": _FACTOR,
    "encoder_repetition_penalty": _FACTOR,
    "presence_penalty": _number("a finite number", lambda x: True),
    "no_repeat_ngram_size": _COUNT,
    "encoder_no_repeat_ngram_size": _COUNT,
    "bad_words_ids": Check("a non-empty list of non-empty lists of token ids", _words),
    "sequence_bias": Check("a dict from tuples of token ids to a bias, or a list of such pairs", _bias),
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "forced_bos_token_id": _TOKEN,
    "forced_eos_token_id": _IDS,
    "exponential_decay_length_penalty": Check("a pair of an integer start and a factor", _decay),
    "remove_invalid_values": _FLAG,
    "renormalize_logits": _FLAG,
    "eos_token_id": Check("a token id, a list of token ids, or -1 for none", _ends),
    "pad_token_id": Check("a token id, or -1 for none", _pad),
    "bos_token_id": _TOKEN,
    "decoder_start_token_id": _IDS,
    "output_logits": _FLAG,
    "output_scores": _FLAG,
    "output_attentions": _FLAG,
    "output_hidden_states": _FLAG,
    "top_logprobs": _integer(0),
    "seed": Check("an integer from 0 up to but below 2**64", _seed),
}

FILTERS = ("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
SAMPLING_ONLY = ("temperature", *FILTERS)
BEAMS_ONLY = ("early_stopping", "length_penalty")

# Options that name tokens: single ids or lists of them, and lists of words.
TOKEN_OPTIONS = (
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
)
WORD_OPTIONS = ("bad_words_ids", "sequence_bias")


def token_ids_in(name: str, value: Any) -> Iterator[int]:
    """Every token id that `value`, the canonical value of option `name`, mentions."""
    if value is None:
        return
    if name in WORD_OPTIONS:
        yield from (token for word in value for token in word)
    elif name in TOKEN_OPTIONS:
        yield from (value,) if isinstance(value, int) else value
