"""The plan of one step: which slots each query row reads and writes, built once on the host, shared by all layers.

A step runs one ragged row of tokens: the new tokens of every live sequence, one after the other. The plan holds what
the tables say. What a kernel makes of it is made when that kernel first asks, once for all layers of a group: spans for
PyTorch's operators, a schedule for the native kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from kvloom.attention.observation import Observation
from kvloom.attention.schedule import Schedule
from kvloom.attention.sealed_spans import SealedSpans
from kvloom.attention.source import Source
from kvloom.attention.spans import Span, SpanBuilder, as_tensor
from kvloom.attention.views import Views, Wanted
from kvloom.cache import CachedSequence, Extension, KVCache, Landing, Reach, Written
from kvloom.cache.landing import land


@dataclass(frozen=True)
class GroupPlan:
    """What the layers of one group write and read.

    Attributes:
        writes: where the ragged row's keys and values go: int64[tokens] slots, or a `Landing` where blocks are sealed.
        sources: what each sequence reads.
        reach: how far back each new token sees.
        observation: what retention policies want to know of this step; None if nothing.
        schedules: made by the native kernels, see there.
    """

    writes: Tensor | Landing
    sources: tuple[Source, ...]
    reach: Reach
    block_tokens: int
    observation: Observation | None = None
    schedules: dict[tuple[int, str], Schedule] = field(default_factory=dict, repr=False, compare=False)

    @property
    def write_slots(self) -> Tensor:
        """int64[tokens], where the ragged row's keys and values go in a store that keeps them in its own dtype."""
        assert isinstance(self.writes, Tensor), "where blocks are sealed, tokens land in more than one place"
        return self.writes

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """They cover every (query, visible key) pair exactly once."""
        builder = SealedSpans if isinstance(self.writes, Landing) else SpanBuilder
        return builder(self.reach, self.block_tokens, self.writes.device).build(self.sources)

    @property
    def observed(self) -> int | None:
        """The address of what the native kernels add attention masses to; None if nothing is observed."""
        return None if self.observation is None else self.observation.native(self.sources)

    @property
    def whole(self) -> bool:
        """Whether the only span covers all rows in order, so that nothing needs merging."""
        return len(self.spans) == 1 and self.spans[0].rows == slice(0, sum(own.count for own in self.sources))

    @cached_property
    def chooses(self) -> bool:
        """Whether some token holds more than it may read, so that each layer chooses."""
        return any(own.chooses for own in self.sources)


@dataclass(frozen=True)
class Plan:
    """One step.

    Attributes:
        positions: int64[tokens], logical positions of the ragged row, as the model counts them.
        logit_rows: int64[n], the rows whose logits are wanted.
        groups: one plan for each layer group.
        views: collects what the step shows to those who look inside; None if nobody does.
    """

    positions: Tensor
    logit_rows: Tensor
    groups: tuple[GroupPlan, ...]
    views: Views | None = None

    @property
    def tokens(self) -> int:
        """Length of the ragged row."""
        return int(self.positions.shape[0])

    @property
    def unobserved(self) -> Plan:
        """The same step, of which policies want to know nothing."""
        return replace(self, groups=tuple(replace(group, observation=None) for group in self.groups))


def build_plan(
    cache: KVCache,
    extension: Extension,
    *,
    logits: Sequence[int],
    device: torch.device | str = "cpu",
    wanted: Sequence[Wanted | None] = (),
) -> Plan:
    """Plan the step that an extension has made room for.

    Args:
        logits: for each sequence, of how many of its last new tokens logits are wanted; 0 for none.
        wanted: for each sequence, what is to be seen of its new tokens; may be left out if nothing is.
    """
    work = list(zip(extension.sequences, extension.counts, strict=True))
    ends = list(accumulate(extension.counts))
    # Lists: a step has few rows or is long, and what NumPy needs to begin with costs more than a few of them.
    positions = [position for own, count in work for position in range(own.tokens - count, own.tokens)]
    logit_rows = [row for end, n in zip(ends, logits, strict=True) for row in range(end - n, end)]
    groups = []
    for index, group in enumerate(cache.groups):
        reach = group.group.reach
        written = cache.written(extension, index) if cache.layout.seals and not reach.cross else None
        sources = tuple(
            _source(sequence, index, reach, end - count, count, None if written is None else written[i])
            for i, ((sequence, count), end) in enumerate(zip(work, ends, strict=True))
        )
        groups.append(
            GroupPlan(
                writes=as_tensor(extension.slots(index), device) if written is None else land(written, device),
                sources=sources,
                reach=reach,
                block_tokens=cache.layout.block_tokens,
                observation=_observation(extension.sequences, sources, reach),
            )
        )
    return Plan(
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
        groups=tuple(groups),
        views=Views(wanted) if any(wanted) else None,
    )


def _source(
    sequence: CachedSequence, group: int, reach: Reach, first_row: int, count: int, written: Written | None
) -> Source:
    """Retention applies to full attention; a reach of its own is kept as it is."""
    runs, first_position = sequence.tables[group].runs, sequence.tokens - count
    retained = sequence.retained
    if retained is None or not reach.unlimited:
        return Source(runs, first_row, first_position, count, written=written)
    read_tokens = retained.policy.read_tokens(first_position, retained.prompt)
    return Source(runs, first_row, first_position, count, retained.sight, read_tokens, written)


def _observation(sequences: Sequence[CachedSequence], sources: Sequence[Source], reach: Reach) -> Observation | None:
    """Which queries the sequences' policies want to observe."""
    counts = [0] * len(sources)
    for index, (sequence, source) in enumerate(zip(sequences, sources, strict=True)):
        if sequence.retained is not None and reach.unlimited:
            counts[index] = sequence.retained.observed(source.first_position, source.count)
    return Observation(tuple(counts)) if any(counts) else None
