"""What is planned: a batch of requests, as it was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvloom.cache import Codec, check_codec
from kvloom.cache.retention import Retention
from kvloom.engine.admission import check_length
from kvloom.engine.retaining import check_policy
from kvloom.errors import InvalidRequest, UnknownOption
from kvloom.models import Source
from kvloom.models.sources.source import SourceReader

DEFAULT_PROMPT_TOKENS = 4_096
DEFAULT_SOURCE_TOKENS = 512
DEFAULT_NEW_TOKENS = 256
MOST_SEQUENCES = 65_536

OPTIONS = (
    "prompt_tokens",
    "source_tokens",
    "max_new_tokens",
    "num_beams",
    "num_return_sequences",
    "batch",
    "dtype",
    "block_tokens",
    "budget_bytes",
    "retention",
    "codec",
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The options of a plan, checked; lengths that were left out are chosen when the model's context is known."""

    prompt_tokens: int | None
    source_tokens: int | None
    max_new_tokens: int | None
    num_beams: int
    num_return_sequences: int
    prompts: int
    block_tokens: int
    budget_bytes: int | None
    retention: Retention | None
    codec: Codec

    @classmethod
    def checked(cls, options: dict[str, Any]) -> Batch:
        """Raises `InvalidRequest`, or `UnknownOption`, for what makes no sense. None is as good as left out."""
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name not in OPTIONS:
                raise UnknownOption.named(name, OPTIONS)
        check_policy(retention := given.pop("retention", None))
        codec = check_codec(given.pop("codec", "native"))
        for name, value in given.items():
            least = 0 if name == "max_new_tokens" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidRequest(f"`{name}` must be a whole number of at least {least}; got {value!r}.")
        beams, returned = given.get("num_beams", 1), given.get("num_return_sequences", 1)
        sequences = max(beams, returned) * given.get("batch", 1)
        if sequences > MOST_SEQUENCES:
            raise InvalidRequest(
                f"a plan counts {MOST_SEQUENCES:,} sequences at most, and these are {sequences:,}. Lower `batch`, "
                "`num_beams` or `num_return_sequences`."
            )
        if 1 < beams < returned:
            raise InvalidRequest(f"`num_return_sequences={returned}` exceeds `num_beams={beams}`. Raise `num_beams`.")
        return cls(
            prompt_tokens=given.get("prompt_tokens"),
            source_tokens=given.get("source_tokens"),
            max_new_tokens=given.get("max_new_tokens"),
            num_beams=beams,
            num_return_sequences=returned,
            prompts=given.get("batch", 1),
            block_tokens=given.get("block_tokens", 16),
            budget_bytes=given.get("budget_bytes"),
            retention=retention,
            codec=codec,
        )

    @property
    def rows(self) -> int:
        """Sequences that each prompt fans out to."""
        return max(self.num_beams, self.num_return_sequences)

    def lengths(self, limit: int | None, encoder: SourceReader | None) -> tuple[int, int]:
        """Prompt and new tokens, within the model's context of `limit` tokens."""
        # The prompt of an encoder-decoder model is its start token, unless it is said to be more.
        prompt = 1 if encoder is not None and self.prompt_tokens is None else self.prompt_tokens
        new = self.max_new_tokens
        if new is None:
            # Half of a short context, or what the prompt leaves of it.
            taken = prompt if prompt is not None else (limit or 0) // 2
            new = DEFAULT_NEW_TOKENS if limit is None else max(0, min(DEFAULT_NEW_TOKENS, limit - taken))
        if prompt is None:
            prompt = DEFAULT_PROMPT_TOKENS if limit is None else max(0, min(DEFAULT_PROMPT_TOKENS, limit - new))
        # A prompt holds a token at least.
        check_length(limit, max(1, prompt), new)
        return prompt, new

    def source(self, encoder: SourceReader | None) -> Source | None:
        """A source as long as was asked for; features are as long as they must be."""
        if encoder is None:
            if self.source_tokens is not None:
                raise InvalidRequest(
                    "`source_tokens` is for encoder-decoder models, and this model has no encoder. Leave it out."
                )
            return None
        longest = encoder.max_tokens
        tokens = self.source_tokens
        if tokens is None:
            tokens = DEFAULT_SOURCE_TOKENS if longest is None else min(DEFAULT_SOURCE_TOKENS, longest)
        if encoder.fixed_length and self.source_tokens not in (None, longest):
            raise InvalidRequest(
                f"this model's sources are always {longest:,} positions long. Leave `source_tokens` out."
            )
        return encoder.random_source(torch.Generator().manual_seed(0), tokens=tokens)
