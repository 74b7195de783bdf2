"""What is measured on: passages to be continued as they go on, and texts with facts planted in them.

Both are cut from one text that the model was not trained on. The bundled one was written for this purpose.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

from kvloom.bench.quality.facts import Fact, draw_facts
from kvloom.errors import InvalidRequest
from kvloom.text import encode_continuation

FACTS_A_TEXT = 2
"""So that a policy cannot keep the one thing that will be asked for."""

CHARACTERS_PER_TOKEN = 12
"""More than any tokenizer's average."""

# Between sentences; where a text has too few of them, between words; and else anywhere.
BORDERS = (r"(?<=[.!?。！？])[\"'”’]?\s*(?=\S)", r"(?<=\S)\s+(?=\S)", r"(?<=.)(?=.)")


@dataclass(frozen=True)
class Passage:
    """Tokens to hold, and the tokens that follow them in the text."""

    context_ids: list[int]
    continuation_ids: list[int]


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        depth: where in the text the fact stands, from 0 at its beginning to 1 at its end.
        token_ids: the question, to follow the text.
        answer_ids: the answer, to follow the question.
    """

    fact: Fact
    depth: float
    token_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True)
class RecallText:
    """A text with facts planted in it, and a question for each that is not part of the text."""

    context_ids: list[int]
    questions: tuple[Question, ...]


def read_text(path: str | Path | None) -> str:
    """A text file in UTF-8; by default the bundled sample, a tale written for KVLoom that no model was trained on.

    Raises `InvalidRequest` if it is missing, empty or not text.
    """
    if path is None:
        return files(__package__).joinpath("sample", "held_out.txt").read_text(encoding="utf-8")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"`text={path}` cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"`text={path}` is not text in UTF-8. Convert it.") from error
    if not text.strip():
        raise InvalidRequest(f"`text={path}` is empty. Pass another file.")
    return text


def cut_passages(text: str, tokenizer: Any, *, count: int, context_tokens: int, new_tokens: int) -> list[Passage]:
    """At most `count` passages that do not overlap, each of exactly as many tokens; fewer if the text ends.

    Raises `InvalidRequest` if the text is too short for one.
    """
    tokens = context_tokens + new_tokens
    passages: list[Passage] = []
    borders, start = find_borders(text), 0
    while len(passages) < count:
        ids = _encode(tokenizer, text[start : start + CHARACTERS_PER_TOKEN * tokens])
        if len(ids) < tokens:
            break
        passages.append(Passage(ids[:context_tokens], ids[context_tokens:tokens]))
        end = start + len(tokenizer.decode(ids[:tokens], skip_special_tokens=True))
        start = next((border for border in borders if border >= end), len(text))
    if not passages:
        raise _too_short(text, tokenizer, tokens)
    return passages


def plant_facts(text: str, tokenizer: Any, *, count: int, context_tokens: int, seed: int) -> list[RecallText]:
    """Texts of at most `context_tokens` tokens, with two facts in each.

    The facts' depths are spread evenly over all texts, each at random within its stretch.

    Raises `InvalidRequest` if the text or the context is too short.
    """
    random = Random(seed)
    borders = [0, *find_borders(text), len(text)]
    depths = [_spread(random, count) for _ in range(FACTS_A_TEXT)]
    planted = []
    for own in zip(*depths, strict=True):
        facts = draw_facts(random, FACTS_A_TEXT)
        # Two tokens a fact for what tokenizers merge or split at the seams.
        room = context_tokens - sum(_count(tokenizer, f" {fact.statement}") + 2 for fact in facts)
        story = _piece(text, borders, tokenizer, random, room)
        planted.append(_plant(story, tokenizer, list(zip(facts, own, strict=True))))
    return planted


def find_borders(text: str) -> list[int]:
    """Where something can be put into `text`: behind sentences, or behind words or characters if there are none."""
    for pattern in BORDERS:
        borders = [match.start() + len(match[0].rstrip()) for match in re.finditer(pattern, text)]
        if len(borders) >= FACTS_A_TEXT:
            return borders
    return [0, len(text)]


def _spread(random: Random, count: int) -> list[float]:
    """One number from each of `count` equal stretches from 0 to 1, in random order."""
    return random.sample([(index + random.random()) / count for index in range(count)], count)


def _piece(text: str, borders: list[int], tokenizer: Any, random: Random, tokens: int) -> str:
    """As much of `text` between two borders, from a random one on, as `tokens` tokens can say."""
    if tokens < 1:
        raise InvalidRequest("`prompt_tokens` leaves no room for text beside the facts. Raise it.")
    tail = text[-CHARACTERS_PER_TOKEN * tokens :]
    tail_tokens = _count(tokenizer, tail)
    if tail_tokens < tokens:
        raise _too_short(text, tokenizer, tokens)
    # A tenth more than the text's average, since pieces differ.
    characters = min(len(tail), int(1.1 * tokens * len(tail) / tail_tokens))
    start = random.choice(borders[: bisect_right(borders, len(text) - characters)])
    ends = [border for border in borders if start < border <= start + CHARACTERS_PER_TOKEN * tokens]
    fitting = bisect_right(ends, tokens, key=lambda end: _count(tokenizer, text[start:end].lstrip()))
    return text[start : ends[max(0, fitting - 1)]].lstrip()


def _encode(tokenizer: Any, text: str) -> list[int]:
    # Quiet: that the text is longer than the model's context means nothing here.
    return list(tokenizer(text, verbose=False).input_ids)


def _count(tokenizer: Any, text: str) -> int:
    return len(_encode(tokenizer, text))


def _plant(story: str, tokenizer: Any, facts: list[tuple[Fact, float]]) -> RecallText:
    """The story with each fact behind the sentence at its depth."""
    borders = find_borders(story)
    places = [(borders[min(int(depth * len(borders)), len(borders) - 1)], fact) for fact, depth in facts]
    for place, fact in sorted(places, key=lambda own: own[0], reverse=True):
        story = f"{story[:place]} {fact.statement}{story[place:]}"
    questions = [_question(story, tokenizer, fact) for fact, _ in facts]
    return RecallText(_encode(tokenizer, story), tuple(questions))


def _question(story: str, tokenizer: Any, fact: Fact) -> Question:
    asked = encode_continuation(tokenizer, f"\n\n{fact.question}")
    answered = encode_continuation(tokenizer, f"\n\n{fact.question}{fact.answer}")
    # Words begin with tokens of their own in every tokenizer that splits at spaces; the others merge a little more.
    common = next(_unlike(asked, answered), len(asked))
    return Question(fact, story.index(fact.statement) / len(story), answered[:common], answered[common:])


def _unlike(one: list[int], other: list[int]) -> Iterator[int]:
    return (index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])


def _too_short(text: str, tokenizer: Any, tokens: int) -> InvalidRequest:
    return InvalidRequest(
        f"the text has {_count(tokenizer, text):,} tokens, but {tokens:,} are needed. "
        "Pass a longer text, or lower prompt_tokens."
    )
