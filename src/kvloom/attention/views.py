"""What a step shows to those who look inside: attention weights and hidden states of its new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvloom.attention.weights import Weights
from kvloom.cache import MixedKept

if TYPE_CHECKING:
    from kvloom.attention.plan import GroupPlan

Layers = tuple[Tensor, ...]


@dataclass(frozen=True)
class Wanted:
    """What is to be seen of a sequence.

    Attributes:
        attentions, hidden_states: whether these are.
        every_row: of a sequence that is computed without a cache, all rows of every pass instead of the new tokens'.
    """

    attentions: bool = False
    hidden_states: bool = False
    every_row: bool = False


@dataclass(frozen=True)
class View:
    """What passes have shown of some consecutive tokens of one sequence; what was not wanted is None.

    Attributes:
        attentions: for each layer float[heads, tokens, columns], what the tokens give to the token at each position.
            Columns end with the last of the tokens; what a token does not see weighs an exact zero.
        cross_attentions: for each layer float[heads, tokens, source_tokens]; None without a source.
        hidden_states: float[tokens, hidden], as many as transformers counts: what goes into the first layer, then what
            comes out of each, the last one behind the last norm.
    """

    attentions: Layers | None = None
    cross_attentions: Layers | None = None
    hidden_states: Layers | None = None

    def followed_by(self, later: View) -> View:
        """Both, of tokens that follow each other."""
        return View(
            _joined(self.attentions, later.attentions),
            _joined(self.cross_attentions, later.cross_attentions),
            _joined(self.hidden_states, later.hidden_states),
        )

    def of_source(self, tokens: int) -> View:
        """The same, of a source that was padded from `tokens` on."""
        cross = self.cross_attentions
        return self if cross is None else replace(self, cross_attentions=tuple(own[..., :tokens] for own in cross))

    def last(self, tokens: int) -> View:
        """The same of the last tokens."""

        def cut(layers: Layers | None) -> Layers | None:
            return None if layers is None else tuple(own[..., own.shape[-2] - tokens :, :] for own in layers)

        return View(cut(self.attentions), cut(self.cross_attentions), cut(self.hidden_states))


class Views:
    """Collects what one step shows.

    Args:
        wanted: of each of the plan's sequences; None where nothing is.
    """

    def __init__(self, wanted: Sequence[Wanted | None]) -> None:
        self._wanted = tuple(wanted)
        self._attentions: list[list[Tensor]] = [[] for _ in wanted]
        self._cross_attentions: list[list[Tensor]] = [[] for _ in wanted]
        self._hidden_states: list[Layers | None] = [None for _ in wanted]

    @property
    def wanted(self) -> Wanted:
        """What any of the sequences wants."""
        return Wanted(
            attentions=any(own is not None and own.attentions for own in self._wanted),
            hidden_states=any(own is not None and own.hidden_states for own in self._wanted),
        )

    def view(self, index: int) -> View:
        """What was shown of a sequence's new tokens."""
        attentions, cross = self._attentions[index], self._cross_attentions[index]
        return View(tuple(attentions) or None, tuple(cross) or None, self._hidden_states[index])

    def add_attention(
        self,
        queries: Tensor,
        keys: Tensor | MixedKept,
        plan: GroupPlan,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """Add a layer's weights, of the arguments of its attention; layers come in their order."""
        for index, source in enumerate(plan.sources):
            if not self._wants_attentions(index):
                continue
            weights = Weights(queries, keys, plan, source, scale=scale, softcap=softcap, sinks=sinks)
            shown = weights.of(0, source.count).to(queries.dtype)
            if plan.reach.cross:
                self._cross_attentions[index].append(shown)
            else:
                columns = source.first_position + source.count
                self._attentions[index].append(_at_positions(shown, weights.positions, columns))

    def add_hidden_states(self, states: Layers, plan: GroupPlan) -> None:
        """Add what the layers gave for the whole ragged row, each [tokens, hidden]."""
        for index, source in enumerate(plan.sources):
            rows = slice(source.first_row, source.first_row + source.count)
            self._put_hidden_states(index, tuple(own[rows] for own in states))

    def add(self, index: int, view: View) -> None:
        """Add all that a sequence's new tokens show; what it did not want is left out."""
        if self._wants_attentions(index):
            self._attentions[index] += view.attentions or ()
            self._cross_attentions[index] += view.cross_attentions or ()
        self._put_hidden_states(index, view.hidden_states)

    def _wants_attentions(self, index: int) -> bool:
        wanted = self._wanted[index]
        return wanted is not None and wanted.attentions

    def _put_hidden_states(self, index: int, states: Layers | None) -> None:
        wanted = self._wanted[index]
        if wanted is not None and wanted.hidden_states:
            self._hidden_states[index] = states


def _at_positions(weights: Tensor, positions: Tensor, columns: int) -> Tensor:
    """float[heads, tokens, columns] of weights that stand by the tokens held: a window has let go of some."""
    if weights.shape[-1] == columns:
        return weights
    placed = weights.new_zeros((*weights.shape[:-1], columns))
    placed[..., positions] = weights
    return placed


def _joined(earlier: Layers | None, later: Layers | None) -> Layers | None:
    """Rows of the one above those of the other, which may have more columns."""
    if earlier is None or later is None:
        return None
    pairs = zip(earlier, later, strict=True)
    return tuple(torch.cat([pad(own, (0, more.shape[-1] - own.shape[-1])), more], dim=-2) for own, more in pairs)
