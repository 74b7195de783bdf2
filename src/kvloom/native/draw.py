"""Drawing tokens from rows of logits, by `src/draw.cpp`, or by PyTorch where that is absent.

The filters are those of transformers, in its order: temperature, top-k, top-p. The kernel finds their limits without
sorting the vocabulary; 150,000 sorted logits take longer than a decode step of a small model.
"""

from __future__ import annotations

from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvloom.native.library import Absent, Library, native
from kvloom.native.linear import DTYPES


@dataclass(frozen=True)
class Limits:
    """What may be drawn; by default every token as often as it is probable.

    Attributes:
        temperature: logits are divided by it.
        top_k: how many of the likeliest tokens stay, and those as likely as the last of them; 0 for all.
        top_p: the least likely go that together have no more than 1 - top_p of the probability; the likeliest stays.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def draw(
    logits: Tensor, uniforms: Tensor, limits: Limits, library: Library | Absent | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a token for each row: the first whose cumulative probability exceeds the row's uniform number.

    A token of probability 0 is never drawn.

    Args:
        logits: float[rows, vocab], unnormalised; -inf forbids a token. The stride of rows may be 0.
        uniforms: float64[rows] in [0, 1).
        library: by default that of the process.

    Returns:
        int64[rows] tokens; bool[rows], False where no token was possible (all forbidden, or NaN).
    """
    if type(logits) is not Tensor or logits.device.type != "cpu" or logits.stride(1) != 1:
        return plain_draw(logits, uniforms, limits)
    library = native() if library is None else library
    if not isinstance(library, Library) or logits.dtype not in library.dtypes:
        return plain_draw(logits, uniforms, limits)
    rows, columns = logits.shape
    uniforms, drawn = uniforms.contiguous(), torch.empty(rows, dtype=torch.int64)
    _bound(library)(
        *(DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), rows, columns),
        *(limits.temperature, limits.top_k, limits.top_p),
        *(uniforms.data_ptr(), drawn.data_ptr(), torch.get_num_threads()),
    )
    return drawn.clamp_min(0), drawn >= 0


def plain_draw(logits: Tensor, uniforms: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's operators."""
    return invert_cdf(filtered(logits, limits), uniforms)


def filtered(logits: Tensor, limits: Limits) -> Tensor:
    """float32[rows, vocab]: scores of the tokens that may be drawn, minus infinity for the others."""
    scores = logits.float() / limits.temperature
    if limits.top_k:
        least = scores.topk(min(limits.top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if limits.top_p < 1:
        ascending, places = scores.sort(stable=True)
        gone = ascending.softmax(-1).cumsum(-1) <= 1 - limits.top_p
        gone[:, -1] = False
        scores = scores.masked_fill(gone.scatter(1, places, gone), -torch.inf)
    return scores


def invert_cdf(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """`draw` without limits, in float64.

    A token of probability 0 is not drawn even where rounding, or a parallel prefix sum that is not quite monotone,
    would reach it.
    """
    probabilities = torch.softmax(scores.double(), dim=-1)
    cumulative = probabilities.cumsum(dim=-1).masked_fill(probabilities == 0, -1.0)
    total = cumulative.amax(dim=-1)
    # A uniform number is at most 1 - 2^-53, so its product with the total stays below the total.
    tokens = (cumulative > (uniforms * total)[:, None]).to(torch.uint8).argmax(dim=-1)
    return tokens, probabilities.gather(1, tokens[:, None])[:, 0] > 0


@cache
def _bound(library: Library) -> Any:
    rows = (c_int, c_void_p, c_int64, c_int64, c_int64)
    return library.function("kvloom_draw", *rows, c_float, c_int64, c_double, c_void_p, c_void_p, c_int)
