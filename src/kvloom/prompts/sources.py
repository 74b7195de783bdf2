"""What users pass to an encoder-decoder model: a source for the encoder, and how the decoder's sequence begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.errors import InvalidRequest
from kvloom.models import Binding, Source
from kvloom.models.sources.source import SourceReader
from kvloom.prompts.reading import Prompt, is_list_of_prompts, read_prompt, read_prompts


@dataclass(frozen=True)
class Start:
    """How the decoder's sequences begin.

    Attributes:
        decoder_input_ids: as a caller passed them; None for the start token alone.
        token_ids: the start token of the model, or one for each source; empty if it has none.
    """

    decoder_input_ids: Any
    token_ids: tuple[int, ...]

    def each(self, binding: Binding, count: int) -> list[list[int]]:
        """The decoder's first tokens for each of `count` sources.

        As in transformers, ids that do not begin with the start token are put behind it, except for Whisper.
        """
        starts = self._start_tokens(count)
        given = self.decoder_input_ids
        if given is None:
            if None in starts:
                raise InvalidRequest(
                    "the decoder's first token is not known: neither `decoder_start_token_id` nor `bos_token_id` is "
                    "set. Pass one of them, or `decoder_input_ids`."
                )
            return [[start] for start in starts if start is not None]
        if is_list_of_prompts(given):
            if len(given) != count:
                raise InvalidRequest(
                    f"`decoder_input_ids` has {len(given)} sequences for {count} sources. Pass one for each, or one "
                    "for all of them."
                )
            own = [read_prompt(ids, None, vocab_size=binding.vocab_size) for ids in given]
        else:
            own = [read_prompt(given, None, vocab_size=binding.vocab_size)] * count
        encoder = binding.encoder
        as_they_are = encoder is not None and encoder.reads_features
        return [
            list(ids) if as_they_are or start in (None, ids[0]) else [start, *ids]
            for ids, start in zip(own, starts, strict=True)
        ]

    def _start_tokens(self, count: int) -> list[int | None]:
        if len(self.token_ids) > 1 and len(self.token_ids) != count:
            raise InvalidRequest(
                f"`decoder_start_token_id` names {len(self.token_ids)} tokens for {count} sources. Name one, or one "
                "for each."
            )
        return list(self.token_ids or [None]) * (1 if len(self.token_ids) > 1 else count)


def read_sourced(prompt: Any, tokenizer: Any, binding: Binding, start: Start) -> tuple[list[Prompt], bool]:
    """A prompt for each source that a user passed, and whether several were.

    Args:
        prompt: text, token ids (a list, or a tensor of shape [tokens] or [1, tokens]), features (a float tensor of
            shape [bins, frames] or [1, bins, frames]), or a list of these; or a `Prompt`, which is ready.

    Raises:
        InvalidRequest: with what was wrong.
    """
    encoder = binding.encoder
    assert encoder is not None, "only encoder-decoder models read sources"
    if isinstance(prompt, Prompt):
        return [prompt], False
    if prompt is None:
        raise InvalidRequest(
            "there is nothing to decode from: the first argument of an encoder-decoder model is its source, "
            f"{encoder.description}."
        )
    sources, several = read_sources(prompt, tokenizer, encoder)
    begins = start.each(binding, len(sources))
    return [Prompt(ids, source) for ids, source in zip(begins, sources, strict=True)], several


def read_sources(prompt: Any, tokenizer: Any, encoder: SourceReader) -> tuple[list[Source], bool]:
    """Each source that a user passed, and whether several were."""
    if encoder.vocab_size is not None:
        read = read_prompts(prompt, tokenizer, vocab_size=encoder.vocab_size)
        return [encoder.of_ids(ids) for ids in read.token_ids], read.several
    several = isinstance(prompt, list | tuple)
    each = prompt if several else [prompt]
    wrong = next((own for own in each if not isinstance(own, Tensor) and not hasattr(own, "__array__")), None)
    if wrong is not None or not each:
        raise InvalidRequest(
            f"this model's source is {encoder.description}: a float tensor, or a list of them; got "
            f"{type(prompt if wrong is None else wrong).__name__}."
        )
    return [encoder.of_features(torch.as_tensor(own)) for own in each], several


class TargetSide:
    """A tokenizer as the decoder's side uses it: some tokenizers have another vocabulary for what they translate to."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **options: Any) -> Any:
        """Encode text that the decoder writes."""
        return self._tokenizer(text_target=text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def target_side(tokenizer: Any, binding: Binding) -> Any:
    """The tokenizer for text that a model's decoder reads and writes."""
    return tokenizer if tokenizer is None or binding.encoder is None else TargetSide(tokenizer)
