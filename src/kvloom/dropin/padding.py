"""Padded batches, as transformers' `generate` takes and returns them, and the prompts that are in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.decoding import Options
from kvloom.errors import InvalidRequest, InvalidTokens


@dataclass(frozen=True)
class Batch:
    """What a call continues.

    Attributes:
        padded: int64[batch, width], as it was passed.
        prompts: the token ids of each row, without padding.
    """

    padded: Tensor
    prompts: list[list[int]]

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


def read_batch(inputs: Any, attention_mask: Any, options: Options, *, device: torch.device) -> Batch:
    """The prompts of a padded batch.

    Args:
        inputs: int[batch, width]; None for the BOS token alone.
        attention_mask: [batch, width], 0 for padding; None to infer it as transformers does: where a PAD token is
            known that ends no sequence, each PAD in the inputs is padding.

    Raises:
        InvalidRequest, InvalidTokens: another rank or type, or padding elsewhere than on the left.
    """
    padded = _token_ids(inputs, options, device)
    mask = _inferred(padded, options) if attention_mask is None else _given(attention_mask, padded)
    lengths = mask.sum(dim=1)
    left_padded = torch.arange(padded.shape[1], device=mask.device) >= (padded.shape[1] - lengths)[:, None]
    if not torch.equal(mask, left_padded):
        raise InvalidRequest(
            "padding must stand on the left of a prompt, and the mask hides tokens on the right of one or within it. "
            "Tokenize with padding_side='left'; if the hidden tokens are meant, pass an `attention_mask` of ones."
        )
    rows = [row[padded.shape[1] - length :] for row, length in zip(padded.tolist(), lengths.tolist(), strict=True)]
    return Batch(padded, rows)


def _token_ids(inputs: Any, options: Options, device: torch.device) -> Tensor:
    if inputs is None:
        if options.bos_token_id is None:
            raise InvalidRequest("there are no `inputs`, and no `bos_token_id` to begin with. Pass one of them.")
        return torch.tensor([[options.bos_token_id]], device=device)
    if not isinstance(inputs, Tensor):
        raise InvalidTokens(f"`inputs` must be a tensor of token ids [batch, tokens]; got {type(inputs).__name__}.")
    if inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool:
        raise InvalidTokens(f"token ids are integers; `inputs` is a tensor of {inputs.dtype}.")
    if inputs.ndim != 2 or not inputs.numel():
        raise InvalidTokens(f"`inputs` must have the shape [batch, tokens], neither 0; got {list(inputs.shape)}.")
    return inputs.long()


def _inferred(padded: Tensor, options: Options) -> Tensor:
    pad = options.pad_token_id
    if pad is None or pad in options.eos_token_id:
        return torch.ones_like(padded, dtype=torch.bool)
    return padded != pad


def _given(attention_mask: Any, padded: Tensor) -> Tensor:
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != padded.shape:
        got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise InvalidRequest(
            f"`attention_mask` must be a tensor of shape {list(padded.shape)}, as `inputs`; got {got}."
        )
    mask = attention_mask.to(padded.device)
    if not torch.isin(mask, torch.tensor([0, 1], device=mask.device, dtype=mask.dtype)).all():
        raise InvalidRequest("`attention_mask` must hold 0 for padding and 1 for tokens, and nothing else.")
    return mask != 0
