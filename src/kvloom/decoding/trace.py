"""What a decoder remembers of each step, so that finished sequences can be read off in the end.

A step looks at rows and yields candidates; each candidate continues one row, and some candidates become the
rows of the next step. A sequence is found by walking back from its last candidate along these parents. So
nothing is copied or reordered while decoding, and the host is not waited for until the results are read.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kvloom.decoding.base import TopLogprobs
from kvloom.decoding.logprobs import Logprobs
from kvloom.native import Absent, Library


@dataclass(frozen=True)
class Extras:
    """What the caller asked to see of the rows of one step.

    Attributes:
        top_ids, top_logprobs: int64 and float32[rows, k], likeliest first; None unless asked for.
        logits: float[rows, vocab], in the dtype the model gave them; None unless asked for.
        scores: float32[rows, vocab], what the processors made of them; None unless asked for. In the first step one
            row for each candidate sequence, all alike.
    """

    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class Observer:
    """Which of the raw logits to keep.

    Attributes:
        top_logprobs: how many alternatives a step; 0 for none.
        output_logits: whether to keep the logits themselves.
        mend: report NaN and infinite logits as `remove_invalid_values` lets the decoder see them.
        output_scores: whether to keep what the processors make of the logits.
        library: whose kernels look at them; by default the process's.
    """

    top_logprobs: int = 0
    output_logits: bool = False
    mend: bool = False
    output_scores: bool = False
    library: Library | Absent | None = None

    def logprobs(self, logits: Tensor) -> Logprobs:
        """The log-softmax of `logits`, float[rows, vocab], before any processor."""
        return Logprobs(torch.nan_to_num(logits.float(), nan=0.0) if self.mend else logits, self.library)

    def extras(self, logits: Tensor, logprobs: Logprobs, scores: Tensor | None) -> Extras:
        """What to keep of a step; copies, as the engine may reuse its buffer."""
        top = logprobs.all.topk(self.top_logprobs, dim=-1) if self.top_logprobs else None
        return Extras(
            top_ids=None if top is None else top.indices,
            top_logprobs=None if top is None else top.values,
            logits=logits.clone() if self.output_logits else None,
            scores=scores.clone() if self.output_scores and scores is not None else None,
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
    """A sequence, read back from its last candidate; `rows` are those that its tokens continued.

    `top_logprobs`, `logits` and `scores` only if asked for.
    """

    token_ids: list[int]
    rows: list[int]
    logprobs: list[float]
    stopped: bool
    top_logprobs: list[TopLogprobs] | None
    logits: Tensor | None
    scores: Tensor | None


class Trace:
    """The steps so far.

    Attributes:
        logits, scores: of each step the rows that were asked to be kept; see `Extras`. Empty unless asked for.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._tokens, self._parents, self._logprobs, self._kept = (_Column() for _ in range(4))
        self._stopped, self._top_ids, self._top_logprobs = (_Column() for _ in range(3))
        self.logits: list[Tensor] = []
        self.scores: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def append(self, record: Record, kept: Tensor) -> None:
        """Add a step. `kept`, int64[next rows], says which candidate each row of the next step is."""
        self._tokens.append(record.tokens)
        self._parents.append(record.parents)
        self._logprobs.append(record.logprobs)
        self._kept.append(kept)
        if record.stopped is not None:
            self._stopped.append(record.stopped)
        if record.extras.top_ids is not None and record.extras.top_logprobs is not None:
            self._top_ids.append(record.extras.top_ids)
            self._top_logprobs.append(record.extras.top_logprobs)
        if record.extras.logits is not None:
            self.logits.append(record.extras.logits)
        if record.extras.scores is not None:
            self.scores.append(record.extras.scores)

    def paths(self, ends: Sequence[tuple[int, int]]) -> list[Path]:
        """The sequences that end with the given `(step, candidate)`; a negative step is an empty sequence."""
        steps = _Steps(
            tokens=self._tokens.lists(),
            parents=self._parents.lists(),
            logprobs=self._logprobs.lists(),
            kept=self._kept.lists(),
            stopped=self._stopped.lists(),
            top_ids=self._top_ids.lists(),
            top_logprobs=self._top_logprobs.lists(),
        )
        return [self._path(steps, *end) for end in ends]

    def _path(self, steps: _Steps, last: int, candidate: int) -> Path:
        visits = steps.walk_back(last, candidate)
        asked = self._observer
        return Path(
            token_ids=[steps.tokens[step][candidate] for step, candidate, _ in visits],
            rows=[row for _, _, row in visits],
            logprobs=[steps.logprobs[step][candidate] for step, candidate, _ in visits],
            stopped=last >= 0 and bool(steps.stopped) and steps.stopped[last][candidate],
            top_logprobs=[steps.top(step, row) for step, _, row in visits] if asked.top_logprobs else None,
            logits=_visited(self.logits, visits) if asked.output_logits else None,
            scores=_visited(self.scores, visits) if asked.output_scores else None,
        )


def _visited(steps: list[Tensor], visits: list[tuple[int, int, int]]) -> Tensor:
    rows = [steps[step][row] for step, _, row in visits]
    return torch.stack(rows).float() if rows else torch.empty(0, 0)


FOLDED_STEPS = 512


class _Column:
    """One small tensor a step. Long columns are folded into few arrays, as a stream may have 100,000 steps.

    Folded numbers take 4 bytes, as do the steps' lengths: ids and indices fit, and log-probabilities are float32.
    """

    def __init__(self) -> None:
        self._lengths = array("i")
        self._folded: list[Tensor] = []
        self._recent: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._lengths)

    def append(self, tensor: Tensor) -> None:
        """Add the tensor of a step."""
        self._lengths.append(tensor.shape[0])
        self._recent.append(tensor)
        if len(self._recent) == FOLDED_STEPS:
            whole = torch.cat(self._recent)
            self._folded.append(whole.to(torch.int32) if whole.dtype == torch.int64 else whole)
            self._recent = []

    def lists(self) -> list[Any]:
        """Each tensor as a nested list, with one transfer from the device for all."""
        if not self._lengths:
            return []
        values = iter(torch.cat([*self._folded, *self._recent]).tolist())
        return [list(islice(values, length)) for length in self._lengths]


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """All columns as Python lists, indexed by step; the last three are empty unless they were kept."""

    tokens: list[list[int]]
    parents: list[list[int]]
    logprobs: list[list[float]]
    kept: list[list[int]]
    stopped: list[list[bool]]
    top_ids: list[list[list[int]]]
    top_logprobs: list[list[list[float]]]

    def walk_back(self, last: int, candidate: int) -> list[tuple[int, int, int]]:
        """`(step, candidate, row)` of each token of a sequence, first token first."""
        visits = []
        for step in range(last, -1, -1):
            row = self.parents[step][candidate]
            visits.append((step, candidate, row))
            candidate = self.kept[step - 1][row] if step else 0
        return visits[::-1]

    def top(self, step: int, row: int) -> TopLogprobs:
        return TopLogprobs(self.top_ids[step][row], self.top_logprobs[step][row])
