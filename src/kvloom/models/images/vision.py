"""How an image-text model of transformers takes images and videos.

Its vision encoder turns each into features, which stand in the places of placeholder tokens in the prompt. Each medium
is encoded by itself, so its features depend on nothing else. Where the model rotates by time, height and width (M-RoPE:
Wang et al. 2024, "Qwen2-VL", section 2.1), its own `get_rope_index` says the positions, which then belong to the
sequence.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.errors import InvalidRequest, UnsupportedModel
from kvloom.models.images.features import Features
from kvloom.models.images.media import Kind, Media, Medium
from kvloom.models.modules import device_of

Inputs = Mapping[str, Any]
"""What a processor of transformers returns for one prompt: a tensor for each argument of the model's forward."""

NOT_OF_MEDIA = frozenset({"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "video_metadata"})


@dataclass(frozen=True)
class _Modality:
    """The names under which a kind of media is handed to a model."""

    kind: Kind
    values: str
    grid: str
    encode: str
    more: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.values, self.grid, *self.more)


MODALITIES = (
    _Modality("image", "pixel_values", "image_grid_thw", "get_image_features"),
    _Modality("video", "pixel_values_videos", "video_grid_thw", "get_video_features", ("second_per_grid_ts",)),
)
MEDIA_INPUTS = frozenset(name for modality in MODALITIES for name in modality.names)


class Vision:
    """The image side of a model.

    Args:
        model: an image-text model, see `takes_images`.

    Attributes:
        merge: patches a side of the image that make one feature.
        refusals: for kinds of media that cannot be decoded on the cache, why.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._core: Any = model.base_model
        self._token_ids: dict[Kind, int] = {
            modality.kind: int(token_id)
            for modality in MODALITIES
            if hasattr(self._core, modality.encode)
            and (token_id := getattr(model.config, f"{modality.kind}_token_id", None)) is not None
        }
        self._rope_index = getattr(self._core, "get_rope_index", None)
        vision_config = getattr(model.config, "vision_config", None)
        self.merge = int(getattr(vision_config, "spatial_merge_size", 1))
        self.refusals: dict[Kind, str] = {}
        # Some models take the kinds of tokens under one name, some under the other, and some not at all.
        known = inspect.signature(model.forward).parameters
        self._types_names = [name for name in ("mm_token_type_ids", "token_type_ids") if name in known]

    @property
    def three_axes(self) -> bool:
        """Whether the model rotates by time, height and width."""
        return self._rope_index is not None

    @property
    def token_ids(self) -> Mapping[Kind, int]:
        """The placeholder of each kind of media that the model takes."""
        return self._token_ids

    # ---- from a processor's output to the media of a sequence ----------------------------------------------

    def read(self, token_ids: Sequence[int], inputs: Inputs) -> Media | None:
        """The media of a prompt, as if a sequence began with it; None if there are none.

        Args:
            token_ids: with all placeholders.
            inputs: a processor's output; see `Inputs`.

        Raises:
            InvalidRequest: inputs that do not fit together or that the model does not take.
        """
        unknown = sorted(set(inputs) - NOT_OF_MEDIA - MEDIA_INPUTS)
        if unknown:
            raise InvalidRequest(f"the processor's output holds `{unknown[0]}`, which is not supported. Leave it out.")
        ids = np.asarray(token_ids, dtype=np.int64)
        items = [item for modality in MODALITIES for item in self._items(modality, ids, inputs)]
        if not items:
            return None
        items.sort(key=lambda item: int(item.places[0]))
        if self._rope_index is None:
            return Media(tuple(items), len(ids), None, len(ids))
        positions = self._positions(ids, items)
        return Media(tuple(items), len(ids), positions[:, :-1], int(positions[0, -1]))

    def read_rows(self, rows: Sequence[Sequence[int]], inputs: Inputs) -> list[Media | None]:
        """The same for each prompt of a batch, whose media stand one after the other in `inputs`."""
        shares: list[dict[str, Tensor]] = [{} for _ in rows]
        for modality in MODALITIES:
            if inputs.get(modality.values) is None:
                continue
            self._check_takes(modality.kind)
            parts = self._parts(modality, inputs)
            places = [list(row).count(self._token_ids[modality.kind]) for row in rows]
            total = sum(places)
            counts = self._feature_counts(modality, parts, total)
            waiting = deque(zip(parts, counts, strict=True))
            for index, share in enumerate(shares):
                own = []
                while waiting and places[index] > 0:
                    part, count = waiting.popleft()
                    own.append(part)
                    places[index] -= count
                share.update({name: torch.cat([part[name] for part in own]) for name in (own[0] if own else ())})
            if waiting or any(places):
                raise _misfit(modality.kind, total, len(parts), sum(counts))
        rest = {name: own for name, own in inputs.items() if name not in MEDIA_INPUTS}
        return [self.read(row, rest | share) for row, share in zip(rows, shares, strict=True)]

    def _check_takes(self, kind: Kind) -> None:
        if kind in self.refusals:
            raise InvalidRequest(self.refusals[kind])
        if kind not in self._token_ids:
            raise InvalidRequest(f"{type(self._model).__name__} takes no {kind}s. Leave them out.")

    def _items(self, modality: _Modality, ids: np.ndarray, inputs: Inputs) -> list[Medium]:
        """The media of one kind, each with its share of the placeholders."""
        given = inputs.get(modality.values)
        if given is None:
            return []
        kind = modality.kind
        self._check_takes(kind)
        parts = self._parts(modality, inputs)
        places = np.flatnonzero(ids == self._token_ids[kind])
        counts = self._feature_counts(modality, parts, len(places))
        if sum(counts) != len(places):
            raise _misfit(kind, len(places), len(parts), sum(counts))
        shares = np.split(places, np.cumsum(counts)[:-1])
        return [Medium(kind, part, share) for part, share in zip(parts, shares, strict=True)]

    def _parts(self, modality: _Modality, inputs: Inputs) -> list[dict[str, Tensor]]:
        """The inputs of each medium."""
        given = {name: torch.as_tensor(inputs[name]) for name in modality.names if inputs.get(name) is not None}
        values, grids = given[modality.values], given.get(modality.grid)
        if grids is not None:
            patches = grids.prod(dim=-1).tolist()
            fits = sum(patches) == values.shape[0]
            parts = list(torch.split(values, patches)) if fits else []
        else:
            # Pictures of one size, [pictures, channels, height, width].
            fits = self._rope_index is None and values.dim() == 4
            parts = list(torch.split(values, 1)) if fits else []
        if not fits:
            raise InvalidRequest(
                f"`{modality.values}` has the shape {list(values.shape)}, which cannot be split into single "
                f"{modality.kind}s{'' if grids is None else f' by `{modality.grid}`'}."
            )
        others = {name: tensor for name, tensor in given.items() if name != modality.values}
        return [
            {modality.values: part} | {name: tensor[index : index + 1] for name, tensor in others.items()}
            for index, part in enumerate(parts)
        ]

    def _feature_counts(self, modality: _Modality, parts: list[dict[str, Tensor]], places: int) -> list[int]:
        """How many placeholders each medium has; of equal pictures equally many."""
        if all(modality.grid in part for part in parts):
            return [int(part[modality.grid].prod()) // self.merge**2 for part in parts]
        return [places // len(parts)] * len(parts)

    def _positions(self, ids: np.ndarray, items: Sequence[Medium]) -> Tensor:
        """int64[3, tokens + 1], rotary positions of the tokens and of a text token behind them."""
        assert self._rope_index is not None, "the model counts tokens"
        with_next = torch.from_numpy(np.append(ids, 0))[None]
        known = inspect.signature(self._rope_index).parameters
        named = {name: tensor for name, tensor in together(items).items() if name in known}
        named["mm_token_type_ids"] = self._types(items, 1, len(ids) + 1)
        positions, _ = self._rope_index(input_ids=with_next, **named)
        if tuple(positions.shape) != (3, 1, len(ids) + 1):
            raise UnsupportedModel(f"{type(self._core).__name__}.get_rope_index returns {tuple(positions.shape)}.")
        own: Tensor = positions[:, 0].to("cpu", torch.int64)
        return own

    def _types(self, items: Sequence[Medium], batch: int, tokens: int) -> Tensor:
        """int64[batch, tokens]: 0 for text, 1 for images, 2 for videos, as transformers has it."""
        types = torch.zeros((batch, tokens), dtype=torch.int64)
        for item in items:
            types[:, torch.from_numpy(item.places)] = 1 if item.kind == "image" else 2
        return types

    # ---- the encoder ---------------------------------------------------------------------------------------

    def encode(self, medium: Medium) -> Features:
        """Run the vision encoder over one medium."""
        modality = next(own for own in MODALITIES if own.kind == medium.kind)
        features = self._run_encoder(modality, medium.inputs)
        if len(features.rows) != len(medium.places):
            raise InvalidRequest(f"{medium} has {len(medium.places)} placeholders and {len(features.rows)} features.")
        return features

    def feature_count(self, kind: Kind, inputs: Mapping[str, Tensor]) -> int:
        """How many placeholders one medium needs."""
        modality = next(own for own in MODALITIES if own.kind == kind)
        if modality.grid in inputs:
            return int(inputs[modality.grid].prod()) // self.merge**2
        return len(self._run_encoder(modality, inputs).rows)

    def _run_encoder(self, modality: _Modality, given: Mapping[str, Tensor]) -> Features:
        names = (modality.values, modality.grid)
        inputs = {name: given[name].to(self.device) for name in names if name in given}
        output = getattr(self._core, modality.encode)(**inputs, return_dict=True)
        deep = getattr(output, "deepstack_features", None) or ()
        return Features(_rows(output.pooler_output), tuple(_rows(level) for level in deep))

    # ---- into the model's own forward ----------------------------------------------------------------------

    def wrote_placeholders(self, media: Media, token_ids: Tensor) -> bool:
        """Whether a sequence of int64[batch, tokens] holds placeholders with nothing behind them: the model wrote them.

        They are embedded as any word is. The model's own forward cannot take them beside pixels.
        """
        for kind, token_id in self._token_ids.items():
            expected = sum(len(item.places) for item in media.items if item.kind == kind)
            if bool(((token_ids == token_id).sum(dim=1) != expected).any()):
                return True
        return False

    def own_inputs(self, media: Media, token_ids: Tensor) -> dict[str, Tensor]:
        """What the model's own forward takes for `token_ids`, int64[batch, tokens], of sequences of one prompt."""
        batch, tokens = token_ids.shape
        inputs = {name: torch.cat([tensor] * batch).to(self.device) for name, tensor in together(media.items).items()}
        types = self._types(media.items, batch, tokens).to(self.device)
        return {"input_ids": token_ids} | inputs | dict.fromkeys(self._types_names, types)

    @property
    def device(self) -> torch.device:
        """Where the model's weights lie."""
        return device_of(self._model)


def _misfit(kind: Kind, places: int, items: int, features: int) -> InvalidRequest:
    return InvalidRequest(
        f"the prompt has {places} {kind} placeholders, but its {items} {kind}s make {features} features. Pass each "
        f"{kind} once, and the prompt as the processor writes it."
    )


def takes_images(model: PreTrainedModel) -> bool:
    """Whether a model has a vision encoder and a placeholder for images."""
    takes = hasattr(model.base_model, "get_image_features") and not model.config.is_encoder_decoder
    return takes and getattr(model.config, "image_token_id", None) is not None


def together(items: Sequence[Medium]) -> dict[str, Tensor]:
    """The inputs of all media, as a processor hands them over."""
    names = dict.fromkeys(name for item in items for name in item.inputs)
    return {name: torch.cat([item.inputs[name] for item in items if name in item.inputs]) for name in names}


def _rows(output: Any) -> Tensor:
    """float[features, hidden] of one medium, however a model wraps them."""
    if isinstance(output, Tensor):
        return output.flatten(0, -2)
    return torch.cat([own.flatten(0, -2) for own in output])
