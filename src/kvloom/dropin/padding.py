"""Padded batches, as transformers' `generate` takes and returns them, and the prompts that are in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.decoding import Options
from kvloom.errors import InvalidRequest, InvalidTokens
from kvloom.models import Binding
from kvloom.prompts import Prompt, read_token_ids


@dataclass(frozen=True)
class Batch:
    """What a call continues.

    Attributes:
        padded: int64[batch, width], as it was passed; of an encoder-decoder model what its decoder begins with.
        prompts: each row, without padding, with what it shows or is decoded from.
    """

    padded: Tensor
    prompts: list[Prompt]

    @property
    def width(self) -> int:
        """Tokens of a row, padding included: what lengths are counted from."""
        return self.padded.shape[1]

    def followed_by(self, generated: list[list[int]], fill: int) -> Tensor:
        """int64[n, width + longest], for n sequences, equally many a row; short ones are filled up."""
        longest = max(map(len, generated))
        new = torch.tensor([own + [fill] * (longest - len(own)) for own in generated], dtype=torch.int64)
        rows = self.padded.repeat_interleave(len(generated) // len(self.prompts), dim=0)
        return torch.cat([rows, new.to(rows.device)], dim=1)


def read_batch(given: Mapping[str, Any], options: Options, binding: Binding) -> Batch:
    """The prompts of a padded batch of a causal model.

    Args:
        given: `input_ids`, int[batch, width], without which the BOS token stands alone; `attention_mask`, [batch,
            width], 0 for padding, by default inferred as transformers does: where a PAD token is known that ends no
            sequence, each PAD in the inputs is padding; and what a processor has made of the images of all rows.

    Raises:
        InvalidRequest, InvalidTokens: another rank or type, padding elsewhere than on the left, or images that are not
            those of the placeholders.
    """
    padded = _or_bos(given.get("input_ids"), options, binding.device)
    mask = given.get("attention_mask")
    hidden = ~(_inferred(padded, options) if mask is None else read_mask("attention_mask", mask, padded))
    counts = hidden.sum(dim=1)
    if not torch.equal(hidden, torch.arange(padded.shape[1], device=hidden.device) < counts[:, None]):
        raise InvalidRequest(
            "padding must stand on the left of a prompt, and the mask hides tokens on the right of one or within it. "
            "Tokenize with padding_side='left'; if the hidden tokens are meant, pass an `attention_mask` of ones."
        )
    rows = [
        read_token_ids(row[count:], binding.vocab_size)
        for row, count in zip(padded.tolist(), counts.tolist(), strict=True)
    ]
    if binding.vision is None:
        return Batch(padded, [Prompt(row) for row in rows])
    shown = binding.vision.read_rows(rows, {name: own for name, own in given.items() if name != "input_ids"})
    return Batch(padded, [Prompt(row, media=media) for row, media in zip(rows, shown, strict=True)])


def read_ids(name: str, inputs: Any) -> Tensor:
    """int64[batch, tokens] of an argument that must hold token ids."""
    if not isinstance(inputs, Tensor):
        raise InvalidTokens(f"`{name}` must be a tensor of token ids [batch, tokens]; got {type(inputs).__name__}.")
    if inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool:
        raise InvalidTokens(f"token ids are integers; `{name}` is a tensor of {inputs.dtype}.")
    if inputs.ndim != 2 or not inputs.numel():
        raise InvalidTokens(f"`{name}` must have the shape [batch, tokens], neither 0; got {list(inputs.shape)}.")
    return inputs.long()


def read_mask(name: str, given: Any, padded: Tensor) -> Tensor:
    """bool[batch, tokens] of an argument that must hold a mask of `padded`, True for tokens."""
    if not isinstance(given, Tensor) or given.shape != padded.shape:
        got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise InvalidRequest(f"`{name}` must be a tensor of shape {list(padded.shape)}, as its token ids; got {got}.")
    mask = given.to(padded.device)
    if not ((mask == 0) | (mask == 1)).all():
        raise InvalidRequest(f"`{name}` must hold 0 for padding and 1 for tokens, and nothing else.")
    return mask != 0


def _or_bos(inputs: Any, options: Options, device: torch.device) -> Tensor:
    if inputs is not None:
        return read_ids("inputs", inputs)
    if options.bos_token_id is None:
        raise InvalidRequest("there are no `inputs`, and no `bos_token_id` to begin with. Pass one of them.")
    return torch.tensor([[options.bos_token_id]], device=device)


def _inferred(padded: Tensor, options: Options) -> Tensor:
    pad = options.pad_token_id
    if pad is None or pad in options.eos_token_id:
        return torch.ones_like(padded, dtype=torch.bool)
    return padded != pad
