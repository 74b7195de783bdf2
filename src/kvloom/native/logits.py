"""What decoders ask of rows of logits, in one pass over them, by `src/logits.cpp`, or by PyTorch where that is absent.

A log-softmax is (x - largest) - log_sum. Two numbers a row are enough to tell the log-probability of any token, so the
log-softmax of a whole vocabulary need not be written down to read one number of it.
"""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvloom.native.library import Absent, Library, native
from kvloom.native.linear import DTYPES


@dataclass(frozen=True)
class Normalizers:
    """Of some rows.

    Attributes:
        largest: float32[rows], the largest logit.
        where: int64[rows], its first index; any where there is no normaliser.
        log_sums: float32[rows], log of the sum of exp(x - largest). NaN if the row holds a NaN or plus infinity,
            or nothing but minus infinity: then there is no normaliser.
    """

    largest: Tensor
    where: Tensor
    log_sums: Tensor


def normalizers(logits: Tensor, library: Library | Absent | None = None) -> Normalizers:
    """Of the rows of `logits`, float[rows, vocab]; by `library`, by default that of the process."""
    if (own := _kernels(logits, library)) is None:
        return plain_normalizers(logits)
    rows, columns = logits.shape
    largest, log_sums, where = torch.empty(rows), torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    own.normalizers(
        *(DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), rows, columns),
        *(largest.data_ptr(), where.data_ptr(), log_sums.data_ptr(), torch.get_num_threads()),
    )
    return Normalizers(largest, where, log_sums)


def plain_normalizers(logits: Tensor) -> Normalizers:
    """The same by PyTorch's operators."""
    wide = logits.float()
    largest, where = wide.max(dim=-1)
    return Normalizers(largest, where, (wide - largest[:, None]).exp().sum(dim=-1).log())


@dataclass(frozen=True)
class Continuations:
    """Tokens that may follow some rows, best first. All numbers are NaN if a row has no normaliser.

    Attributes:
        scores: float32[count], the row's score plus the token's log-probability.
        rows, tokens: int64[count].
        logprobs: float32[count].
    """

    scores: Tensor
    rows: Tensor
    tokens: Tensor
    logprobs: Tensor


def best_continuations(
    logits: Tensor, own: Normalizers, scores: Tensor, count: int, library: Library | Absent | None = None
) -> Continuations:
    """The best `count` of all rows' tokens; of equal ones the first.

    Args:
        logits: float[rows, vocab]. own: its normalisers. scores: float32[rows].
        library: by default that of the process.
    """
    assert count <= logits.shape[1], "a row alone can fill the places"
    if (kernels := _kernels(logits, library)) is None:
        return plain_best_continuations(logits, own, scores, count)
    rows, columns = logits.shape
    scores = scores.contiguous()
    best, logprobs = torch.empty(count), torch.empty(count)
    best_rows, tokens = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    kernels.best(
        *(DTYPES[logits.dtype], logits.data_ptr(), logits.stride(0), rows, columns),
        *(own.largest.data_ptr(), own.log_sums.data_ptr(), scores.data_ptr()),
        *(count, best.data_ptr(), logprobs.data_ptr(), best_rows.data_ptr(), tokens.data_ptr()),
        torch.get_num_threads(),
    )
    return Continuations(best, best_rows, tokens, logprobs)


def plain_best_continuations(logits: Tensor, own: Normalizers, scores: Tensor, count: int) -> Continuations:
    """The same by PyTorch's operators, but for the order of equal ones, of which PyTorch says nothing."""
    logprobs = (logits.float() - own.largest[:, None]) - own.log_sums[:, None]
    best = (logprobs + scores[:, None]).reshape(-1).topk(count)
    rows, tokens = best.indices // logits.shape[1], best.indices % logits.shape[1]
    known = logprobs[rows, tokens].where(~best.values.isnan(), torch.nan)
    return Continuations(best.values, rows, tokens, known)


@dataclass(frozen=True)
class _Kernels:
    normalizers: Any
    best: Any


def _kernels(logits: Tensor, library: Library | Absent | None) -> _Kernels | None:
    """The compiled functions, if they take these logits."""
    if type(logits) is not Tensor or logits.device.type != "cpu":
        return None
    if not isinstance(library := native() if library is None else library, Library):
        return None
    return _bound(library) if logits.dtype in library.dtypes and logits.stride(1) == 1 else None


@cache
def _bound(library: Library) -> _Kernels:
    rows = (c_int, c_void_p, c_int64, c_int64, c_int64)
    return _Kernels(
        normalizers=library.function("kvloom_normalizers", *rows, c_void_p, c_void_p, c_void_p, c_int),
        best=library.function("kvloom_best", *rows, *(c_void_p,) * 3, c_int64, *(c_void_p,) * 4, c_int),
    )


__all__ = [
    "Continuations",
    "Normalizers",
    "best_continuations",
    "normalizers",
    "plain_best_continuations",
    "plain_normalizers",
]
