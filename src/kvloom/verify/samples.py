"""What is decoded to verify a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from kvloom.models import Source
from kvloom.models.sources.source import SourceReader
from kvloom.text import encode_start

TEXTS = (
    "Once upon a time",
    "The old weaver sat down at her loom before the sun was up. She had one thread of blue left, and a whole "
    "winter of cloth to make from it.",
    "When the three brothers came to the river, they found no bridge and no boat, but only a stone with writing "
    'on it. "Whoever reads this aloud," said the stone, "will be carried across, and whoever reads it twice will '
    'be carried back." The eldest read it once, and was gone. The second read it once, and was gone too. But the '
    "youngest, who had never learned to read, sat down on the bank, took bread and cheese out of his bag, and "
    "began to think. Before he had finished the bread, a grey heron came walking through the reeds.",
)
"""A text shorter than a block, one of more than a block, one of several chunks; longer ones are made of these."""

SHORTEST = 5

CHARACTERS_PER_TOKEN = 12
"""More than any tokenizer's average, so that a text of that length has enough tokens."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How long prompts and outputs are.

    Attributes:
        new_tokens: of each run.
        longest_prompt: what the model's context leaves for a prompt; None for no limit.
        block_tokens: of the cache.
    """

    new_tokens: int
    longest_prompt: int | None
    block_tokens: int

    def chunk_tokens(self, prompt_tokens: int) -> int:
        """Prompt tokens a step, for prefill in at least three chunks whose borders are not those of blocks."""
        return max(1, min(self.block_tokens + self.block_tokens // 2, (prompt_tokens - 1) // 2))

    def prompt_lengths(self) -> list[int]:
        """Less than a block, more than a block, more than two chunks and two blocks; as the context allows."""
        block = self.block_tokens
        wanted = [min(SHORTEST, block), block + 3, 3 * block + 5]
        if self.longest_prompt is None:
            return wanted
        return sorted({min(length, self.longest_prompt) for length in wanted})


def choose_prompts(tokenizer: Any, *, vocab_size: int, shape: Shape, seed: int) -> list[list[int]]:
    """English with a tokenizer, else random token ids."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for text, tokens in zip(TEXTS, shape.prompt_lengths(), strict=False):
        known = [] if tokenizer is None else _english(tokenizer, text, tokens)
        # A tokenizer may know no English.
        rest = torch.randint(vocab_size, (tokens - len(known),), generator=generator).tolist()
        prompts.append(known + rest)
    return prompts


def choose_sources(tokenizer: Any, encoder: SourceReader, *, shape: Shape, seed: int) -> list[Source]:
    """English with a tokenizer, else random content; of the lengths of prompts, as far as the encoder allows."""
    longest = encoder.max_tokens
    if encoder.vocab_size is None:
        generator = torch.Generator().manual_seed(seed)
        return [encoder.random_source(generator, tokens=tokens) for tokens in shape.prompt_lengths()[:2]]
    own = replace(shape, longest_prompt=longest)
    token_ids = choose_prompts(tokenizer, vocab_size=encoder.vocab_size, shape=own, seed=seed)
    return [encoder.of_ids(ids) for ids in token_ids]


def _english(tokenizer: Any, text: str, tokens: int) -> list[int]:
    characters = CHARACTERS_PER_TOKEN * tokens
    story = " ".join([text, *TEXTS[1:] * (1 + characters // 400)])
    return encode_start(tokenizer, story[:characters])[:tokens]
