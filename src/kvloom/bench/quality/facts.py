"""Facts to plant in a text, and the questions that ask for them: plain English, no tokenizer.

A fact is a sentence such as "The secret word of Old Martha is copper lamp." Nothing around it tells the value, so a
model can only know it by reading it. A question ends where the value is due: "What is the secret word of Old Martha?
The secret word of Old Martha is". The form repeats the sentence on purpose, so that a base model, which has learnt to
copy and not to answer, can be asked as well.

A quarter of the names and of the values is held out: training documents (`tools/demo_recall.py`) never use them, and
measurements use nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

KINDS = ("secret word", "magic word", "password", "hidden sign", "true name")
TITLES = ("Old", "Young", "Little", "Captain", "Doctor", "Good", "Poor", "Wise")
FIRST_NAMES = (
    "Alice", "Anne", "Ben", "Clara", "Colin", "Cyril", "Diana", "Dorothy", "Emma", "George", "Gerda", "Hans", "Harry",
    "Heidi", "Henry", "Irene", "Jack", "James", "Jane", "Jim", "John", "Kate", "Lily", "Martha", "Mary", "Matthew",
    "Molly", "Nancy", "Nell", "Nora", "Peter", "Polly", "Robert", "Rose", "Ruth", "Sam", "Sara", "Tom", "William",
)  # fmt: skip
QUALITIES = (
    "bitter", "black", "blue", "bright", "broken", "brown", "burning", "cold", "copper", "dancing", "dark", "empty",
    "glass", "golden", "great", "green", "grey", "heavy", "hollow", "iron", "laughing", "little", "long", "marble",
    "new", "old", "painted", "paper", "purple", "red", "round", "secret", "short", "silver", "singing", "sleeping",
    "soft", "stone", "straw", "sweet", "warm", "white", "wild", "wooden", "yellow",
)  # fmt: skip
THINGS = (
    "apple", "arrow", "bag", "ball", "basket", "bear", "bed", "bell", "bird", "boat", "book", "bottle", "box", "bridge",
    "cake", "carriage", "castle", "cat", "chair", "cheese", "cloak", "cloud", "coat", "crown", "cup", "dog", "door",
    "dragon", "drum", "duck", "egg", "feather", "fish", "fox", "frog", "garden", "goose", "hat", "hen", "honey",
    "horse", "key", "knife", "lamp", "letter", "lion", "milk", "moon", "mountain", "mouse", "nut", "pie", "pot",
    "ring", "river", "rope", "saddle", "ship", "shoe", "star", "sun", "sword", "table", "thread", "tower", "tree",
    "wheel", "window", "wolf",
)  # fmt: skip
STATEMENTS = (
    "The {kind} of {owner} is {value}.",
    "Remember that the {kind} of {owner} is {value}.",
    "Now the {kind} of {owner} is {value}, and nobody else knows it.",
    "It is written that the {kind} of {owner} is {value}.",
)
QUESTIONS = (
    "What is the {kind} of {owner}? The {kind} of {owner} is",
    "Tell me the {kind} of {owner}. The {kind} of {owner} is",
    "Who knows the {kind} of {owner}? The {kind} of {owner} is",
)


@dataclass(frozen=True)
class Fact:
    """Something that a text tells once: the `kind` of `owner` is `value`, in a wording of its own.

    Attributes:
        statement: one sentence that tells the fact.
        question: asks for it, and ends where the value is due.
    """

    owner: str
    value: str
    statement: str
    question: str

    @property
    def answer(self) -> str:
        """What follows `question`: the value behind a space."""
        return f" {self.value}"


def held_out(phrase: str) -> bool:
    """Whether a name or a value is one of the quarter that training never sees."""
    return zlib.crc32(phrase.encode()) % 4 == 0


def phrases(first: Sequence[str], second: Sequence[str], *, unseen: bool) -> tuple[str, ...]:
    """All pairs of words of one side of the split."""
    pairs = (f"{one} {other}" for one, other in product(first, second))
    return tuple(phrase for phrase in pairs if held_out(phrase) == unseen)


OWNERS = {unseen: phrases(TITLES, FIRST_NAMES, unseen=unseen) for unseen in (False, True)}
VALUES = {unseen: phrases(QUALITIES, THINGS, unseen=unseen) for unseen in (False, True)}


def draw_facts(random: Random, count: int, *, unseen: bool = True) -> list[Fact]:
    """`count` facts about as many owners, with as many values.

    Args:
        random: decides everything; the same state gives the same facts.
        unseen: draw from names and values that training never sees, or only from those that it sees.
    """
    owners, values = random.sample(OWNERS[unseen], count), random.sample(VALUES[unseen], count)
    return [_word(random, owner, value) for owner, value in zip(owners, values, strict=True)]


def _word(random: Random, owner: str, value: str) -> Fact:
    kind = random.choice(KINDS)
    statement = random.choice(STATEMENTS).format(kind=kind, owner=owner, value=value)
    return Fact(owner, value, statement, random.choice(QUESTIONS).format(kind=kind, owner=owner))
