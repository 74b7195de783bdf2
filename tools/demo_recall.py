"""Recall documents: story text with facts planted in it, and questions at its end that only they answer.

The facts and their wording are those of `kvloom.bench.quality.facts`, which also measures by them; a quarter of the
names and values is held out here and met there only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import Qwen2ForCausalLM

from demo_corpus import END_OF_TEXT, held_out_books, split_documents
from kvloom.bench.quality.facts import Fact, draw_facts

MOST_FACTS = 8  # more in a document are a list, not a story
LEAST_STORY_TOKENS = 24


@dataclass(frozen=True)
class Windows:
    """Token ids, and which of them are answers to questions: int64 and bool[windows, tokens], or one window's row."""

    ids: np.ndarray
    is_answer: np.ndarray

    @classmethod
    def stack(cls, parts: Sequence["Windows"]) -> "Windows":
        """Rows of one length, one below the other."""
        return cls(
            np.concatenate([np.atleast_2d(part.ids) for part in parts]),
            np.concatenate([np.atleast_2d(part.is_answer) for part in parts]),
        )


class RecallWriter:
    """Writes recall documents of an exact length around text of the books."""

    def __init__(self, tokenizer: Tokenizer, text: np.ndarray, *, unseen: bool = False) -> None:
        """`text` is a row of token ids to take story text from; `unseen` chooses held-out names and values."""
        self.tokenizer = tokenizer
        self.text = text
        self.unseen = unseen
        self.sentence_ends = np.flatnonzero(text == tokenizer.token_to_id("."))

    def write(self, random: Random, tokens: int, facts: int | None = None) -> Windows:
        """A document of `tokens` ids: facts behind random sentences of one piece of text, then a question for each.

        Args:
            facts: how many; by default two to eight, as far as they leave room for text.
        """
        drawn = draw_facts(random, facts or random.randint(2, MOST_FACTS), unseen=self.unseen)
        statements = [self._ids(f" {fact.statement}") for fact in drawn]
        questions = [self._question(fact) for fact in drawn]
        while tokens - sum(map(len, statements)) - sum(len(ids) for ids, _ in questions) < LEAST_STORY_TOKENS:
            statements.pop(), questions.pop()
        random.shuffle(questions)
        story = self._story(random, statements, tokens - sum(len(ids) for ids, _ in questions))
        return Windows(
            np.concatenate([story, *(ids for ids, _ in questions)]),
            np.concatenate([np.zeros(len(story), dtype=bool), *(answer for _, answer in questions)]),
        )

    def echo(self, random: Random, tokens: int) -> Windows:
        """Random ids, and the same again: what comes next the second time can be looked up, and known in no other way.

        Few distinct ids make single ones ambiguous, so that two or more have to be matched.
        """
        length = random.randint(tokens // 4, tokens // 2)
        ids = random.choices(
            random.sample(range(2, self.tokenizer.get_vocab_size()), random.randint(12, 200)), k=length
        )
        repeated = np.array((ids * (tokens // length + 1))[:tokens])
        return Windows(repeated, np.arange(tokens) >= length + 2)

    def _story(self, random: Random, statements: list[np.ndarray], tokens: int) -> np.ndarray:
        """`tokens` ids: text that ends with a sentence, and the statements behind some of its sentences."""
        length = tokens - sum(map(len, statements))
        ends = self.sentence_ends
        last = ends[random.randrange(int(np.searchsorted(ends, length)), len(ends))]
        piece = self.text[last + 1 - length : last + 1]
        places = np.flatnonzero(piece == self.text[last]) + 1
        chosen = sorted(random.choice(places.tolist()) for _ in statements)
        parts = np.split(piece, chosen)
        mixed = [part for pair in zip(parts, statements, strict=False) for part in pair]
        return np.concatenate([*mixed, parts[-1]]).astype(np.int64)

    def _question(self, fact: Fact) -> tuple[np.ndarray, np.ndarray]:
        question, answer, stop = (self._ids(text) for text in (f"\n\n{fact.question}", fact.answer, "."))
        is_answer = np.repeat([False, True, False], [len(question), len(answer), len(stop)])
        return np.concatenate([question, answer, stop]), is_answer

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text).ids, dtype=np.int64)


@torch.inference_mode()
def measure_recall(
    model: Qwen2ForCausalLM, writer: RecallWriter, *, documents: int, tokens: int, facts: int = 2, seed: int = 0
) -> float:
    """Share of questions whose whole answer is what the model would write greedily.

    One forward pass a document: an answer counts if each of its tokens is the likeliest behind the true ones before it.
    """
    random = Random(seed)
    right: list[bool] = []
    for _ in range(documents):
        document = writer.write(random, tokens, facts=facts)
        ids = torch.from_numpy(document.ids)[None].to(model.device)
        best = model(ids[:, :-1], use_cache=False).logits[0].argmax(-1).cpu().numpy()
        hit = best == document.ids[1:]
        right += [bool(hit[answer].all()) for answer in runs_of_true(document.is_answer[1:])]
    return sum(right) / len(right)


def runs_of_true(mask: np.ndarray) -> list[np.ndarray]:
    """The places of each run."""
    places = np.flatnonzero(mask)
    return np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)


def examiner(tokenizer: Tokenizer, corpus: Path) -> RecallWriter:
    """Writes documents around text of the held-out books, with names and values that training never uses."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    books = [story for book in held_out_books(corpus) for story in split_documents(book.read_text("utf-8"))]
    text = np.concatenate([np.array([*encoding.ids, end]) for encoding in tokenizer.encode_batch(books)])
    return RecallWriter(tokenizer, text, unseen=True)
