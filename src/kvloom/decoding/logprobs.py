"""The log-softmax of rows of logits, of which only what is asked for is calculated.

A row of a large vocabulary is several hundred kilobytes; writing its log-softmax down to read one number of it took as
long as a tenth of a decode step. Two numbers a row, its normaliser, tell the log-probability of any token.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from kvloom.native import Absent, Library
from kvloom.native.logits import Continuations, Normalizers, best_continuations, normalizers


class Logprobs:
    """Of `logits`, float[rows, vocab]: (logit - largest) - log(sum(exp(logit - largest))) in float32.

    Args:
        library: whose kernels calculate it; by default the process's.
    """

    def __init__(self, logits: Tensor, library: Library | Absent | None = None) -> None:
        self._logits = logits
        self._library = library

    @cached_property
    def _own(self) -> Normalizers:
        return normalizers(self._logits, self._library)

    @property
    def likeliest(self) -> tuple[Tensor, Tensor]:
        """int64[rows], the first of the likeliest tokens, and its log-probability; NaN where there is none."""
        # The largest logit less itself is zero.
        return self._own.where, -self._own.log_sums

    def of(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """float32[n], of `tokens` in `rows`, both int64[n]; NaN where a row's logits hold a NaN."""
        if "all" in vars(self):
            return self.all[rows, tokens]
        return (self._logits[rows, tokens].float() - self._own.largest[rows]) - self._own.log_sums[rows]

    @cached_property
    def all(self) -> Tensor:
        """float32[rows, vocab], PyTorch's own; the last bit may be another than `of` gives without it."""
        return torch.log_softmax(self._logits.float(), dim=-1)

    def best(self, scores: Tensor, count: int) -> Continuations:
        """The best `count` of all log-probabilities plus their row's score.

        Args:
            scores: float32[n]; a single row of logits serves all of them.
        """
        logits, own = self._logits, self._own
        if logits.dtype == torch.float32:
            # PyTorch's own log-softmax, which is in transformers' scores to the last bit, as if it were logits.
            none = torch.zeros_like(own.log_sums)
            logits, own = self.all, Normalizers(none, own.where, none.where(own.log_sums.isfinite(), torch.nan))
        if (rows := scores.shape[0]) > logits.shape[0]:
            own = Normalizers(*(value.repeat(rows) for value in (own.largest, own.where, own.log_sums)))
            logits = logits.expand(rows, -1)
        return best_continuations(logits, own, scores, count, self._library)
