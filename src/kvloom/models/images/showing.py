"""Images in a forward pass: features enter as embeddings, in the rows of their placeholders.

So a prompt with images runs in chunks, in ragged batches and on a cache like any other. The model's own forward, which
that is compared with, gets pixels instead, and finds features, places and positions by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvloom.attention import Plan
from kvloom.models.images.features import FeatureCache
from kvloom.models.images.media import Media, Medium
from kvloom.models.images.vision import Vision

Shown = tuple[Medium, slice, Tensor]
"""A medium, which of its features are shown, and int64[n], the rows in which they stand."""


class Showing:
    """Hands images to one model.

    Args:
        model: left as it is.
        vision: how the model takes images.
        weights: names the state of its weights, which features depend on.

    Attributes:
        features: what the encoder made of the images and videos that were shown lately.
    """

    def __init__(self, model: PreTrainedModel, vision: Vision, weights: Callable[[], bytes]) -> None:
        self._model = model
        self._vision = vision
        self._weights = weights
        self.features = FeatureCache(vision.encode)

    @contextmanager
    def step(self, token_ids: Tensor, plan: Plan, media: Sequence[Media | None]) -> Iterator[dict[str, Any]]:
        """The arguments of one ragged step over int64[tokens]."""
        with self._embedded(token_ids[None], self._in_step(plan, media)) as inputs:
            yield {**inputs, "position_ids": self._positions(plan, media), "use_cache": False}

    @contextmanager
    def whole(self, token_ids: Tensor, media: Media) -> Iterator[dict[str, Any]]:
        """The arguments of the model's own forward over int64[batch, tokens]: pixels, wherever it can take them."""
        if not self._vision.wrote_placeholders(media, token_ids):
            yield self._vision.own_inputs(media, token_ids)
            return
        batch, tokens = token_ids.shape
        positions = media.positions_of(0, tokens).to(self._vision.device)
        with self._embedded(token_ids, self._in_batch(media, batch, tokens)) as inputs:
            yield inputs | {
                "position_ids": positions[:, None].expand(3, batch, tokens)
                if self._vision.three_axes
                else positions[0].expand(batch, tokens)
            }

    # ---- what is shown, and where --------------------------------------------------------------------------

    def _positions(self, plan: Plan, media: Sequence[Media | None]) -> Tensor:
        """Rotary positions of a step: int64[3, 1, tokens], or [1, tokens] where the model counts tokens."""
        if not self._vision.three_axes:
            return plan.positions[None]
        positions = plan.positions.expand(3, -1).clone()
        for source, own in zip(plan.groups[0].sources, media, strict=True):
            if own is not None:
                rows = slice(source.first_row, source.first_row + source.count)
                positions[:, rows] = own.positions_of(source.first_position, source.count).to(positions.device)
        return positions[:, None]

    def _in_step(self, plan: Plan, media: Sequence[Media | None]) -> list[Shown]:
        """What a step shows."""
        found = []
        for source, own in zip(plan.groups[0].sources, media, strict=True):
            for item in () if own is None else own.items:
                part = item.between(source.first_position, source.first_position + source.count)
                if part.start < part.stop:
                    rows = item.places[part] - source.first_position + source.first_row
                    found.append((item, part, torch.from_numpy(rows).to(self._vision.device)))
        return found

    def _in_batch(self, media: Media, batch: int, tokens: int) -> list[Shown]:
        """What whole sequences of one prompt show."""
        places = [(item, torch.from_numpy(item.places).to(self._vision.device)) for item in media.items]
        return [
            (item, slice(0, len(own)), own + first)
            for first in range(0, batch * tokens, tokens)
            for item, own in places
        ]

    # ---- embeddings ----------------------------------------------------------------------------------------

    @contextmanager
    def _embedded(self, token_ids: Tensor, shown: Sequence[Shown]) -> Iterator[dict[str, Tensor]]:
        """int64[batch, tokens], as embeddings where something is shown; within the block, deeper layers get theirs.

        Args:
            shown: rows are counted over the whole batch.
        """
        if not shown:
            yield {"input_ids": token_ids}
            return
        features = self.features.of([item for item, *_ in shown], key=self._weights())
        rows = torch.cat([own for *_, own in shown])
        parts = [part for _, part, _ in shown]
        embeddings = self._model.get_input_embeddings()(token_ids)
        seen = torch.cat([own.rows[part] for own, part in zip(features, parts, strict=True)])
        embeddings.view(-1, embeddings.shape[-1])[rows] = seen.to(embeddings.dtype)
        levels = zip(*(own.deep for own in features), strict=True)
        deep = [torch.cat([own[part] for own, part in zip(level, parts, strict=True)]) for level in levels]
        with self._deeper(rows, deep, token_ids):
            yield {"inputs_embeds": embeddings}

    @contextmanager
    def _deeper(self, rows: Tensor, deep: list[Tensor], token_ids: Tensor) -> Iterator[None]:
        """Hand features to the decoder, whose caller would do so only for a whole prompt (Qwen3-VL's DeepStack)."""
        if not deep:
            yield
            return
        order = rows.argsort()
        seen = torch.zeros(token_ids.shape, dtype=torch.bool, device=rows.device)
        seen.view(-1)[rows] = True
        given = {"visual_pos_masks": seen, "deepstack_visual_embeds": [level[order] for level in deep]}

        def hand_over(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return inputs, named | given

        decoder: Any = self._model.base_model.language_model
        handle = decoder.register_forward_pre_hook(hand_over, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def fresh_rotary_deltas(model: nn.Module) -> Iterator[None]:
    """Within the block no module knows the offset that an earlier call has left on it; afterwards all is as before.

    transformers keeps the distance between token index and rotary position of the last call on the model
    (`rope_deltas`), where another request finds it.
    """
    modules: list[Any] = [module for module in model.modules() if "rope_deltas" in module.__dict__]
    saved = [module.rope_deltas for module in modules]
    try:
        for module in modules:
            module.rope_deltas = None
        yield
    finally:
        for module, own in zip(modules, saved, strict=True):
            module.rope_deltas = own
