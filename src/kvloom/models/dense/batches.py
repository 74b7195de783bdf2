"""From a plan to dense batches: what a model with an attention of its own can be run on.

Such a model wants keys and values as tensors, [batch, kv_heads, tokens, dim], in which every row is as long as the
others. So the sequences of a step that have equally many tokens behind them and equally many new ones run together.
Those that add a single token may run together behind unlike pasts, too, where the model has proven that it can: shorter
ones are padded on the left. Others run apart. (Sources are padded: every model takes a mask for these.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvloom.attention import Plan
from kvloom.attention.source import Source as Reads
from kvloom.blocks.runs import expand_runs
from kvloom.errors import ModelError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DenseSource:
    """The sources of a batch's rows.

    Attributes:
        slots: int64[batch, longest], or a slice if all rows read one source; short ones repeat a slot of their own.
        seen: bool[batch, longest], False where a slot repeats; None if none does.
        tokens: the longest.
    """

    slots: slice | Tensor
    seen: Tensor | None
    tokens: int


@dataclass(frozen=True)
class DenseBatch:
    """Sequences of a step that run together.

    Attributes:
        members: which of the plan's sequences they are.
        rows: int64[batch, count], their new tokens' rows of the ragged row.
        past: tokens that each has behind it, or the longest where others are padded.
        padding: int64[batch, 1], by how many slots each is padded on the left; None if none is.
        wanted: of how many of its last new tokens a row's logits are wanted, at most.
        logit_rows: int64[n], the batch's (row, token) pairs whose logits are wanted, as an index into [batch * wanted].
        logit_places: int64[n], where these stand among the plan's logits.
        write_slots: int64[batch * count]. read_slots: int64[batch, past + count], or a slice if they are a single row's
            and follow each other; padding repeats a slot of its own row.
        source: None without cross-attention.
    """

    members: tuple[int, ...]
    rows: Tensor
    past: int
    padding: Tensor | None
    wanted: int
    logit_rows: Tensor
    logit_places: Tensor
    write_slots: Tensor
    read_slots: slice | Tensor
    source: DenseSource | None

    @property
    def batch(self) -> int:
        """How many sequences."""
        return int(self.rows.shape[0])

    @property
    def count(self) -> int:
        """New tokens of each."""
        return int(self.rows.shape[1])

    @property
    def seen(self) -> Tensor | None:
        """bool[batch, past + count], False where a slot is padding; None if none is."""
        if self.padding is None:
            return None
        return torch.arange(self.past + self.count, device=self.padding.device) >= self.padding

    @property
    def source_tokens(self) -> list[int]:
        """How long the source of each is; 0 without one."""
        if self.source is None or self.source.seen is None:
            return [0 if self.source is None else self.source.tokens] * self.batch
        lengths: list[int] = self.source.seen.sum(dim=1).tolist()
        return lengths


def dense_batches(plan: Plan, device: torch.device, *, padding_tokens: int = 0) -> list[DenseBatch]:
    """The batches of a step.

    Args:
        padding_tokens: the most slots of padding that a batch may have.
    """
    own = plan.groups[0]
    cross = plan.groups[-1] if plan.groups[-1].reach.cross else None
    wanted = plan.logit_rows.cpu().numpy()
    return [
        _batch(
            members,
            [own.sources[index] for index in members],
            None if cross is None else [cross.sources[index] for index in members],
            own.write_slots,
            wanted,
            own.block_tokens,
            device,
        )
        for members in _together(own.sources, padding_tokens)
    ]


def _together(sources: Sequence[Reads], padding_tokens: int) -> list[list[int]]:
    """Which sequences run together, each by its index."""
    alike: dict[tuple[int, int], list[int]] = {}
    for index, reads in enumerate(sources):
        alike.setdefault((reads.count, reads.first_position), []).append(index)
    chunks = [members for (count, _), members in alike.items() if count > 1]
    steps = {past: members for (count, past), members in alike.items() if count == 1}
    together = chunks + _joined(steps, padding_tokens)
    return [sorted(members) for members in together]


def _joined(by_past: dict[int, list[int]], padding_tokens: int) -> list[list[int]]:
    """The longest pasts first, each with as many shorter ones as their padding allows."""
    joined: list[list[int]] = []
    longest = left = 0
    for past in sorted(by_past, reverse=True):
        padding = len(by_past[past]) * (longest - past)
        if joined and padding <= left:
            joined[-1] += by_past[past]
            left -= padding
        else:
            joined.append(by_past[past])
            longest, left = past, padding_tokens
    return joined


def run_dense(
    plan: Plan, device: torch.device, run: Callable[[DenseBatch], Tensor], *, padding_tokens: int = 0
) -> Tensor:
    """Run a step batch by batch.

    Args:
        padding_tokens: as of `dense_batches`.
        run: gives logits, float[batch, wanted, vocab], of the last tokens of a batch's rows.

    Returns:
        logits, float[n, vocab], in the order of the plan.
    """
    logits: Tensor | None = None
    for batch in dense_batches(plan, device, padding_tokens=padding_tokens):
        own = run(batch).flatten(0, 1)[batch.logit_rows]
        if logits is None:
            logits = own.new_empty((len(plan.logit_rows), own.shape[-1]))
        logits[batch.logit_places] = own
    assert logits is not None, "a step has rows"
    return logits


def run_order(plan: Plan, *, padding_tokens: int = 0) -> list[int]:
    """The rows of the ragged row in the order in which `dense_batches` takes them."""
    batches = dense_batches(plan, torch.device("cpu"), padding_tokens=padding_tokens)
    return [row for batch in batches for row in batch.rows.flatten().tolist()]


def _batch(
    members: Sequence[int],
    own: Sequence[Reads],
    sources: Sequence[Reads] | None,
    write_slots: Tensor,
    wanted: Ints,
    block_tokens: int,
    device: torch.device,
) -> DenseBatch:
    pasts, count = np.array([reads.first_position for reads in own]), own[0].count
    past = int(pasts.max())
    rows = np.stack([np.arange(reads.first_row, reads.first_row + count) for reads in own])
    slots = [expand_runs(reads.runs, block_tokens) for reads in own]
    for held, behind in zip(slots, pasts, strict=True):
        if len(held) != behind + count:
            raise ModelError(
                f"a sequence of {behind + count} tokens holds {len(held)} of them. A model that computes its own "
                "attention is handed whole sequences, so nothing of them can be dropped."
            )
    padding = past - pasts
    slots = [np.pad(held, (short, 0), mode="edge") for held, short in zip(slots, padding, strict=True)]
    places = np.flatnonzero(np.isin(wanted, rows))
    # The plan's rows ascend, and so do the batch's.
    which = np.searchsorted(rows[:, -1], wanted[places])
    tokens = wanted[places] - rows[which, 0]
    most = int(count - tokens.min()) if len(places) else 0
    flat = _tensor(rows.flatten(), device)
    return DenseBatch(
        members=tuple(members),
        rows=_tensor(rows, device),
        past=past,
        padding=_tensor(padding[:, None], device) if padding.any() else None,
        wanted=most,
        logit_rows=_tensor(which * most + tokens - (count - most), device),
        logit_places=_tensor(places, device),
        write_slots=write_slots[flat],
        read_slots=_one_view(slots) or _tensor(np.stack(slots), device),
        source=None if sources is None else _source(sources, block_tokens, device),
    )


def _source(sources: Sequence[Reads], block_tokens: int, device: torch.device) -> DenseSource:
    slots = [expand_runs(reads.runs, block_tokens) for reads in sources]
    longest = max(map(len, slots))
    if all(len(own) == longest and (own == slots[0]).all() for own in slots) and (view := _one_view(slots[:1])):
        return DenseSource(view, None, longest)
    lengths = np.array([len(own) for own in slots])
    padded = np.stack([np.pad(own, (0, longest - len(own)), mode="edge") for own in slots])
    seen = None if (lengths == longest).all() else _tensor(np.arange(longest) < lengths[:, None], device)
    return DenseSource(_tensor(padded, device), seen, longest)


def _one_view(slots: Sequence[Ints]) -> slice | None:
    """The slots of a single row as a slice, if they follow each other."""
    if len(slots) > 1 or (np.diff(slots[0]) != 1).any():
        return None
    return slice(int(slots[0][0]), int(slots[0][-1]) + 1)


def _tensor(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
