"""What a decoder remembers of each step, so that finished sequences can be read off in the end.

A step looks at rows and yields candidates; each candidate continues one row, and some candidates become the
rows of the next step. A sequence is found by walking back from its last candidate along these parents. So
nothing is copied or reordered while decoding, and the host is not waited for until the results are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kvloom.decoding.base import TopLogprobs


@dataclass(frozen=True)
class Extras:
    """What the caller asked to see of the rows of one step.

    Attributes:
        top_ids, top_logprobs: int64 and float32[rows, k], likeliest first; None unless asked for.
        logits: float[rows, vocab], in the dtype the model gave them; None unless asked for.
    """

    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Observer:
    """Which of the raw logits to keep.

    Attributes:
        top_logprobs: how many alternatives a step; 0 for none.
        output_logits: whether to keep the logits themselves.
        mend: report NaN and infinite logits as `remove_invalid_values` lets the decoder see them.
    """

    top_logprobs: int = 0
    output_logits: bool = False
    mend: bool = False

    def logprobs(self, logits: Tensor) -> Tensor:
        """float32[rows, vocab]: the log-softmax of `logits`, float[rows, vocab], before any processor."""
        seen = torch.nan_to_num(logits.float(), nan=0.0) if self.mend else logits.float()
        return torch.log_softmax(seen, dim=-1)

    def extras(self, logits: Tensor, logprobs: Tensor) -> Extras:
        """What to keep of a step; copies, as the engine may reuse its buffer."""
        top = logprobs.topk(self.top_logprobs, dim=-1) if self.top_logprobs else None
        return Extras(
            top_ids=None if top is None else top.indices,
            top_logprobs=None if top is None else top.values,
            logits=logits.clone() if self.output_logits else None,
        )


@dataclass(frozen=True)
class Record:
    """One step: its candidates, and what was asked to be kept of its rows.

    Attributes:
        tokens, parents: int64[candidates], the token and the row that it continues.
        logprobs: float32[candidates], raw log-softmax of the token.
        stopped: bool[candidates], met a stop string or criterion; None if there are none.
        extras: what was asked to be kept of the rows.
    """

    tokens: Tensor
    parents: Tensor
    logprobs: Tensor
    stopped: Tensor | None
    extras: Extras


@dataclass(frozen=True)
class Path:
    """A sequence, read back from its last candidate. `top_logprobs` and `logits` only if asked for."""

    token_ids: list[int]
    logprobs: list[float]
    stopped: bool
    top_logprobs: list[TopLogprobs] | None
    logits: Tensor | None


class Trace:
    """The steps so far."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._records: list[Record] = []
        self._kept: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._records)

    def append(self, record: Record, kept: Tensor) -> None:
        """Add a step. `kept`, int64[next rows], says which candidate each row of the next step is."""
        self._records.append(record)
        self._kept.append(kept)

    def paths(self, ends: Sequence[tuple[int, int]]) -> list[Path]:
        """The sequences that end with the given `(step, candidate)`; a negative step is an empty sequence."""
        steps = _Steps(self._records, self._kept)
        return [self._path(steps, *end) for end in ends]

    def _path(self, steps: _Steps, last: int, candidate: int) -> Path:
        stopped = last >= 0 and steps.stopped(last, candidate)
        visits = self._walk_back(steps, last, candidate)
        asked = self._observer
        return Path(
            token_ids=[steps.tokens[step][candidate] for step, candidate, _ in visits],
            logprobs=[steps.logprobs[step][candidate] for step, candidate, _ in visits],
            stopped=stopped,
            top_logprobs=[steps.top(step, row) for step, _, row in visits] if asked.top_logprobs else None,
            logits=self._logits(visits) if asked.output_logits else None,
        )

    def _walk_back(self, steps: _Steps, last: int, candidate: int) -> list[tuple[int, int, int]]:
        """`(step, candidate, row)` of each token of a sequence, first token first."""
        visits = []
        for step in range(last, -1, -1):
            row = steps.parents[step][candidate]
            visits.append((step, candidate, row))
            candidate = steps.kept[step - 1][row] if step else 0
        return visits[::-1]

    def _logits(self, visits: list[tuple[int, int, int]]) -> Tensor:
        kept = [(self._records[step].extras.logits, row) for step, _, row in visits]
        rows = [logits[row] for logits, row in kept if logits is not None]
        return torch.stack(rows).float() if rows else torch.empty(0, 0)


class _Steps:
    """All records as Python lists, indexed by step; each field crosses to the host in one go."""

    def __init__(self, records: list[Record], kept: list[Tensor]) -> None:
        extras = [record.extras for record in records]
        self.tokens: list[list[int]] = _to_lists([record.tokens for record in records])
        self.parents: list[list[int]] = _to_lists([record.parents for record in records])
        self.logprobs: list[list[float]] = _to_lists([record.logprobs for record in records])
        self.kept: list[list[int]] = _to_lists(kept)
        self._stopped: list[list[bool]] = _to_lists([record.stopped for record in records])
        self._ids: list[list[list[int]]] = _to_lists([extra.top_ids for extra in extras])
        self._tops: list[list[list[float]]] = _to_lists([extra.top_logprobs for extra in extras])

    def stopped(self, step: int, candidate: int) -> bool:
        return bool(self._stopped) and self._stopped[step][candidate]

    def top(self, step: int, row: int) -> TopLogprobs:
        return TopLogprobs(self._ids[step][row], self._tops[step][row])


def _to_lists(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Each tensor as a nested list, with one transfer from the device for all; empty if none were kept."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return []
    values = iter(torch.cat(present).tolist())
    return [list(islice(values, tensor.shape[0])) for tensor in present]
