"""From what users pass to what a sequence begins with: text, token ids, chat messages, images, sources."""

from kvloom.prompts.reading import (
    Prompt,
    PromptReader,
    is_list_of_prompts,
    read_prompt,
    read_prompts,
    read_token_ids,
)
from kvloom.prompts.sources import Start, read_sourced, read_sources, target_side

__all__ = [
    "Prompt",
    "PromptReader",
    "Start",
    "is_list_of_prompts",
    "read_prompt",
    "read_prompts",
    "read_sourced",
    "read_sources",
    "read_token_ids",
    "target_side",
]
