"""Attach proves itself: cached output is compared with the model's own before the model is accepted.

Some architectures ignore a custom attention silently, others hide state in their modules. So two sequences of
unequal length are run on the cache, one of them in chunks, one is forked inside a block, three rows decode two
more tokens; and what goes into and comes out of each attention layer, and the logits, are compared with a forward
pass of the model itself. Each attention layer is then handed the model's own input, so that rounding does not add
up over layers, and a token that a mixture of experts routes otherwise does not spread to those after it.
A model whose windows are longer than the check is checked on a copy with small windows, which shares the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvloom.attention import Plan, build_plan
from kvloom.cache import CachedSequence, CacheLayout, KVCache, place_source
from kvloom.errors import AttachMismatch, UnsupportedModel
from kvloom.exclusive import uninterrupted
from kvloom.models.binding import Binding, Regime
from kvloom.models.hosted.base import MOST_ROWS, WINDOW_FIELDS, HostedModel
from kvloom.models.hosted.probe import AttentionCall
from kvloom.models.images.media import Media
from kvloom.models.proofs.tolerance import TIES_QUANTILE, TOLERANCE
from kvloom.models.sources.source import Source

CHECK_TOKENS = 44
DECODED_TOKENS = 2
SOURCE_TOKENS = (13, 6)
"""Of the two sources of an encoder-decoder model: neither is a number of whole blocks."""
SMALL_WINDOW = 8
BLOCK_TOKENS = 4
CHECKED_LOGITS = 4
"""Of so many last tokens of each chunk logits are compared: a row of them may be larger than all that its token brings
into and out of all layers."""
COMPARED_ROWS = 4


@dataclass(frozen=True)
class _Trace:
    """What each token of one sequence brought into and out of each attention layer, and the logits of some.

    Attributes:
        rows: by what it is, [tokens, hidden].
        logits: [checked, vocab], of the last tokens of each chunk.
    """

    rows: dict[str, Tensor]
    logits: Tensor


class Provable(Binding, Protocol):
    """A binding whose cached output can be compared with its own."""

    calls: tuple[AttentionCall, ...]

    def windows(self) -> set[int]:
        """The limits of all windows and chunks, as far as they are known."""
        ...

    def early_scales(self) -> bool:
        """Whether a layer changes its temperature within the rows of a step."""
        ...

    def run_order(self, plan: Plan) -> list[int]:
        """The order in which `forward` runs the rows of a plan."""
        ...


def prove(binding: Provable) -> float:
    """Compare cached with uncached output; returns the largest relative error seen.

    Raises `AttachMismatch` with the first layer that differs beyond the tolerance.
    """
    tokens = CHECK_TOKENS if binding.max_tokens is None else min(CHECK_TOKENS, binding.max_tokens)
    if tokens < 12:
        raise UnsupportedModel(f"the model's context of {binding.max_tokens} tokens is too short to be checked.")
    subject = binding
    if any(limit > tokens // 2 for limit in binding.windows()) or binding.early_scales():
        subject = _with_small_windows(binding)
    sequences = _random_sequences(subject, tokens)
    regime = subject.regime(tokens)
    return compare_runs(subject, sequences, regime=regime, chunk=len(sequences[0].token_ids) // 2 + 1)


def compare_runs(binding: Provable, sequences: list[CheckedSequence], *, regime: Regime, chunk: int) -> float:
    """The schedule of the check on the cache, against the model's own forward; returns the largest relative error.

    Args:
        sequences: a long one, a shorter one, and a fork of the long one that differs in its last two tokens.
        chunk: the first chunk of the long one.

    Raises:
        AttachMismatch: with the first layer that differs beyond the tolerance.
    """
    checked = _checked_positions(sequences, chunk)
    own = [_run_uncached(binding, *each, regime) for each in zip(sequences, checked, strict=True)]
    cached = _run_cached(binding, sequences, own, chunk)
    return max(_compare(binding, *each) for each in zip(own, cached, checked, strict=True))


def _checked_positions(sequences: list[CheckedSequence], chunk: int) -> list[list[int]]:
    """Of each sequence, where logits are compared: at the last tokens of each chunk of the schedule."""
    prompts = [len(own.token_ids) - DECODED_TOKENS for own in sequences]
    chunks = [(chunk, prompts[0] - chunk), (prompts[1],), (chunk, prompts[2] - chunk)]
    found = []
    for own in chunks:
        counts = [*own, *[1] * DECODED_TOKENS]
        ends = zip(accumulate(counts), counts, strict=True)
        found.append([at for end, count in ends for at in range(end - min(count, CHECKED_LOGITS), end)])
    return found


def check_bytes(binding: HostedModel) -> int:
    """About how much memory `prove` takes besides weights: all that it records, and one comparison of logits.

    Each layer's input and output is recorded for every token of three sequences, without the cache and on it, and
    logits of some; the model's own forward gives those of a whole sequence.
    """
    tokens = CHECK_TOKENS if binding.max_tokens is None else min(CHECK_TOKENS, binding.max_tokens)
    hidden = int(binding.model.get_input_embeddings().weight.shape[-1])
    lengths = (tokens, tokens // 2, tokens)
    rows = 2 * sum(lengths) * 2 * hidden * len(binding.calls)
    sequences = [CheckedSequence([0] * length) for length in lengths]
    checked = 2 * sum(map(len, _checked_positions(sequences, tokens // 2 + 1)))
    return (rows + (checked + tokens) * binding.vocab_size) * binding.dtype.itemsize


@dataclass(frozen=True)
class CheckedSequence:
    """Token ids, what they are decoded from where there is an encoder, and what they show."""

    token_ids: list[int]
    source: Source | None = None
    media: Media | None = None


def _random_sequences(binding: Provable, tokens: int) -> list[CheckedSequence]:
    """A long sequence, a shorter one, and a fork of the long one with an ending of its own."""
    generator = torch.Generator().manual_seed(20_26)
    long, short, ending = (
        torch.randint(binding.vocab_size, (count,), generator=generator).tolist()
        for count in (tokens, tokens // 2, DECODED_TOKENS)
    )
    if binding.counting is not None:
        long, short, ending = map(binding.counting.without_pad, (long, short, ending))
    sources: list[Source | None] = [None, None]
    if binding.encoder is not None:
        sources = [binding.encoder.random_source(generator, tokens=count) for count in SOURCE_TOKENS]
    fork = long[:-DECODED_TOKENS] + ending
    return [CheckedSequence(own, sources[index]) for own, index in ((long, 0), (short, 1), (fork, 0))]


def _run_cached(binding: Provable, sequences: list[CheckedSequence], own: list[_Trace], chunk: int) -> list[_Trace]:
    """The schedule of the check: chunk and whole, chunk, fork, two decode steps of three rows."""
    long, short, fork = (sequence.token_ids for sequence in sequences)
    longest = max((own.source.tokens for own in sequences if own.source), default=0)
    layout = CacheLayout(layers=binding.layers, dtype=binding.dtype, block_tokens=BLOCK_TOKENS)
    blocks = max(64, 2 * layout.blocks_of(longest), sum(layout.blocks_of(len(own.token_ids)) + 2 for own in sequences))
    cache = KVCache(layout, budget_bytes=layout.bytes_per_row_of_blocks * blocks, device=binding.device)
    runner = _Runner(binding, cache, sequences, own)
    a, b = runner.open(0), runner.open(1)
    runner.step([(0, a, chunk), (1, b, len(short) - DECODED_TOKENS)])
    runner.step([(0, a, len(long) - DECODED_TOKENS - chunk)])
    c = cache.fork(a)
    runner.copy_trace(source=0, target=2)
    for _ in range(DECODED_TOKENS):
        runner.step([(0, a, 1), (1, b, 1), (2, c, 1)])
    assert len(fork) == c.tokens, "the fork is as long as its ending"
    return runner.traces()


class _Runner:
    """Runs steps on the cache and files every row under its sequence."""

    def __init__(self, binding: Provable, cache: KVCache, sequences: list[CheckedSequence], own: list[_Trace]) -> None:
        self._binding = binding
        self._cache = cache
        self._sequences = sequences
        self._own = own
        self._regime = binding.regime(len(sequences[0].token_ids))
        self._rows: list[dict[str, list[Tensor]]] = [{} for _ in sequences]
        self._logits: list[list[Tensor]] = [[] for _ in sequences]

    def open(self, index: int) -> CachedSequence:
        """An empty sequence, whose source is encoded."""
        sequence = self._cache.open()
        source = self._sequences[index].source
        if source is not None:
            slots = torch.from_numpy(place_source(self._cache, sequence, source.tokens)).to(self._binding.device)
            self._binding.encode(source, self._cache.store, slots)
        return sequence

    def step(self, requests: list[tuple[int, CachedSequence, int]]) -> None:
        extension = self._cache.extend([(sequence, count) for _, sequence, count in requests])
        logits_of = [min(count, CHECKED_LOGITS) for *_, count in requests]
        plan = build_plan(self._cache, extension, logits=logits_of, device=self._binding.device)
        new = [(index, slice(sequence.tokens - count, sequence.tokens)) for index, sequence, count in requests]
        parts = [(self._sequences[index].token_ids, tokens.start, tokens.stop) for index, tokens in new]
        if self._binding.counting is not None:
            plan = self._binding.counting.of_step(plan, parts)
        token_ids = [token for ids, first, end in parts for token in ids[first:end]]
        own = {
            name: torch.cat([self._own[index].rows[name][tokens] for index, tokens in new])
            for name in self._own[0].rows
        }
        with uninterrupted(), _recorded(self._binding, own, self._binding.run_order(plan)) as rows:
            logits = self._binding.forward(
                torch.tensor(token_ids, device=self._binding.device),
                plan,
                self._cache.store,
                regime=self._regime,
                media=[self._sequences[index].media for index, *_ in requests],
            )
        self._cache.commit(extension)
        first = 0
        for (index, _, count), own_logits in zip(requests, torch.split(logits, logits_of), strict=True):
            self._logits[index].append(own_logits)
            for name, own_rows in rows.items():
                self._rows[index].setdefault(name, []).append(own_rows[first : first + count])
            first += count

    def copy_trace(self, *, source: int, target: int) -> None:
        self._rows[target] = {name: list(rows) for name, rows in self._rows[source].items()}
        self._logits[target] = list(self._logits[source])

    def traces(self) -> list[_Trace]:
        return [
            _Trace({name: torch.cat(parts) for name, parts in rows.items()}, torch.cat(logits))
            for rows, logits in zip(self._rows, self._logits, strict=True)
        ]


def _run_uncached(binding: Provable, sequence: CheckedSequence, checked: list[int], regime: Regime) -> _Trace:
    token_ids = torch.tensor([sequence.token_ids], device=binding.device)
    with uninterrupted(), _recorded(binding) as rows:
        logits = binding.forward_own(token_ids, last=None, regime=regime, source=sequence.source, media=sequence.media)
    return _Trace(rows, logits[0, checked])


@contextmanager
def _recorded(
    binding: Provable, given: dict[str, Tensor] | None = None, order: list[int] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Within the block, what goes into and comes out of each attention module is kept, [tokens, hidden].

    Args:
        given: what the modules are handed instead of the input that was kept.
        order: of the rows, if a binding runs them in several passes; by default as they are.
    """
    rows: dict[str, Tensor] = {}
    passes: dict[str, list[Tensor]] = {}

    def before(names: Iterator[str]) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            name = f"the input of {next(names)}"
            hidden = named.get("hidden_states", inputs[0] if inputs else None)
            if not isinstance(hidden, Tensor) or hidden.dim() != 3:
                return None
            done = sum(map(len, passes.setdefault(name, [])))
            passes[name].append(hidden.flatten(0, -2).detach())
            if given is None:
                return None
            now = slice(done, done + len(passes[name][-1]))
            own = given[name][now if order is None else order[now]].view_as(hidden)
            if "hidden_states" in named:
                return inputs, named | {"hidden_states": own}
            return (own, *inputs[1:]), named

        return hook

    def after(names: Iterator[str]) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            own = (output[0] if isinstance(output, tuple) else output).flatten(0, -2).detach()
            passes.setdefault(next(names), []).append(own)

        return hook

    handles = []
    for module, names in _names_of(binding).items():
        handles.append(module.register_forward_pre_hook(before(cycle(names)), with_kwargs=True))
        handles.append(module.register_forward_hook(after(cycle(names))))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
        for name, parts in passes.items():
            rows[name] = torch.cat(parts)
            if order is not None:
                places = torch.tensor(order, device=rows[name].device)
                rows[name] = torch.empty_like(rows[name]).index_copy_(0, places, rows[name])


def _names_of(binding: Provable) -> dict[nn.Module, list[str]]:
    """For each attention module a name, or one for each of its runs in a pass: a model may loop over its layers."""
    names: dict[nn.Module, list[str]] = {}
    for call in binding.calls:
        earlier = names.setdefault(call.module, [])
        earlier.append(f"`{call.name}`" + (f" in run {len(earlier) + 1}" if earlier else ""))
    return names


def _compare(binding: Provable, own: _Trace, cached: _Trace, checked: Sequence[int]) -> float:
    """The largest relative error; raises at the first layer beyond the tolerance."""
    tolerance = TOLERANCE.get(binding.dtype, TOLERANCE[torch.bfloat16])
    attention = {name for names in _names_of(binding).values() for name in names}
    worst = 0.0
    compared = [(name, expected, cached.rows[name]) for name, expected in own.rows.items()]
    for name, expected, got in [*compared, ("the logits", own.logits, cached.logits)]:
        if got.shape != expected.shape:
            raise AttachMismatch(f"{name} is {tuple(got.shape)} on the cache and {tuple(expected.shape)} without it.")
        errors = _relative_errors(got, expected)
        strict = name in attention or binding.dtype in (torch.float32, torch.float64)
        error = float(errors.max() if strict else _error_but_for_ties(errors))
        if not error <= tolerance:
            row = int(errors.nan_to_num(nan=torch.inf).argmax())
            position = checked[row] if expected is own.logits else row
            raise AttachMismatch(
                f"cached output differs from the model's own, first in {name}: relative error {error:.2g} "
                f"(largest at position {position}), tolerance {tolerance:.2g} for {binding.dtype}. "
                "The model is not decoded on the cache rather than decoded wrongly."
            )
        worst = max(worst, error)
    return worst


def _relative_errors(got: Tensor, expected: Tensor) -> Tensor:
    """float32[rows]; of a few rows at a time, because one of logits may be large."""
    errors = []
    for mine, theirs in zip(torch.split(got, COMPARED_ROWS), torch.split(expected, COMPARED_ROWS), strict=True):
        wide = theirs.float()
        errors.append((mine.float() - wide).norm(dim=-1) / wide.norm(dim=-1).clamp_min(1e-12))
    return torch.cat(errors)


def _error_but_for_ties(errors: Tensor) -> Tensor:
    """What most rows keep to; the few decoded rows are looked at on their own, lest they be taken for ties."""
    return torch.maximum(errors.quantile(TIES_QUANTILE), errors[-DECODED_TOKENS:].min())


def _with_small_windows(binding: Provable) -> HostedModel:
    """The same weights under a config and modules whose windows or chunks are `SMALL_WINDOW` tokens."""
    assert isinstance(binding, HostedModel), "only of a model of transformers windows are known"
    model = binding.model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        twin = copy.deepcopy(model, shared)
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} has windows longer than the check, and cannot be copied to check them: {error}"
        ) from error
    large = binding.windows()
    for holder in [
        *twin.modules(),
        *(module.config for module in twin.modules() if hasattr(module, "config")),
    ]:
        for attribute in WINDOW_FIELDS:
            if getattr(holder, attribute, None) in large:
                setattr(holder, attribute, SMALL_WINDOW)
    for module in twin.modules():
        if getattr(module, "attn_temperature_tuning", False) and int(getattr(module, "floor_scale", 0)) <= MOST_ROWS:
            module.floor_scale = SMALL_WINDOW
    small = type(binding)(twin)
    if any(limit > SMALL_WINDOW for limit in small.windows()):
        raise UnsupportedModel(
            f"{type(model).__name__} has windows longer than the check, and they cannot be made smaller to check them."
        )
    return small
