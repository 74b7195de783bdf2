"""Attach proves images, too: features, their places, and rotary positions on three axes.

Tiny pictures of noise are shown to the model's own forward, from pixels on, and to ours, in chunks that cut through a
picture, beside another sequence with another picture, and behind a fork. A model whose own forward does something
else with pictures (that lets their tokens see later ones, say) is decoded on text, and its images are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvloom.errors import AttachMismatch
from kvloom.models.hosted.base import HostedModel
from kvloom.models.images.media import Kind, Media
from kvloom.models.images.vision import Vision
from kvloom.models.proofs.provable import CheckedSequence
from kvloom.models.proofs.running import DECODED_TOKENS
from kvloom.models.proofs.selfcheck import compare_runs

TEXT_TOKENS = 5


def prove_images(binding: HostedModel) -> None:
    """Compare cached with uncached output on pictures; what fails is refused from then on, with the reason."""
    if binding.vision is None:
        return
    if (reason := _difference(binding, binding.vision, ["image"])) is not None:
        refused: list[Kind] = ["image", "video"]
    elif "video" in binding.vision.token_ids:
        reason, refused = _difference(binding, binding.vision, ["image", "video"]), ["video"]
    if reason is not None:
        name = type(binding.model).__name__
        binding.vision.refusals |= {
            kind: f"{kind}s of {name} cannot be decoded on the cache ({reason}). Leave them out." for kind in refused
        }


def _difference(binding: HostedModel, vision: Vision, kinds: list[Kind]) -> str | None:
    """What is wrong with pictures of these kinds; None if they come out right."""
    assert binding.showing is not None, "a model with vision is shown something"
    try:
        _compare(binding, vision, kinds)
    except AttachMismatch as error:
        return str(error).partition(". The model")[0]
    except Exception as error:  # of a model that is handed pixels in a way of its own
        return f"{type(error).__name__}: {error}"
    finally:
        binding.showing.features.clear()
    return None


@torch.no_grad()
def _compare(binding: HostedModel, vision: Vision, kinds: list[Kind]) -> None:
    noise = _Noise(binding, vision)
    long, shown = noise.sequence(kinds)
    short, shown_beside = noise.sequence(["image"])
    fork = long[:-DECODED_TOKENS] + noise.text(DECODED_TOKENS)
    picture = shown.items[0].places
    sequences = [CheckedSequence(long, media=shown), CheckedSequence(short, media=shown_beside)]
    compare_runs(
        binding,
        [*sequences, CheckedSequence(fork, media=shown)],
        regime=binding.regime(len(long)),
        chunk=int(picture[len(picture) // 2]),
    )


class _Noise:
    """Random sequences with pictures of noise."""

    def __init__(self, binding: HostedModel, vision: Vision) -> None:
        self._vision = vision
        self._config: Any = binding.model.config.vision_config
        self._generator = torch.Generator().manual_seed(20_26)
        special = set(vision.token_ids.values())
        self._words = [token for token in range(min(binding.vocab_size, 1_000)) if token not in special]

    def sequence(self, kinds: list[Kind]) -> tuple[list[int], Media]:
        """Text, then each picture and text behind it."""
        token_ids, inputs = self.text(TEXT_TOKENS), dict[str, Tensor]()
        for kind in kinds:
            own = self._picture(kind)
            token_ids += [self._vision.token_ids[kind]] * self._vision.feature_count(kind, own)
            token_ids += self.text(TEXT_TOKENS)
            inputs |= own
        media = self._vision.read(token_ids, inputs)
        assert media is not None, "the sequence shows something"
        return token_ids, media

    def text(self, tokens: int) -> list[int]:
        """Random tokens that are no placeholders."""
        chosen = torch.randint(len(self._words), (tokens,), generator=self._generator).tolist()
        return [self._words[index] for index in chosen]

    def _picture(self, kind: Kind) -> dict[str, Tensor]:
        """What a processor would make of one."""
        values, grid = (
            ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
        )
        channels = self._first("in_channels", "in_chans", "num_channels", default=3)
        if self._vision.three_axes:
            height, width = 2 * self._vision.merge, 3 * self._vision.merge
            patch = self._first("patch_size") ** 2 * self._first("temporal_patch_size", default=1)
            return {
                values: self._random(height * width, channels * patch),
                grid: torch.tensor([[1, height, width]]),
            }
        side = self._first("image_size")
        return {values: self._random(1, channels, side, side)}

    def _first(self, *names: str, default: int | None = None) -> int:
        """The first of some fields of the vision config."""
        found = next((getattr(self._config, name) for name in names if hasattr(self._config, name)), default)
        assert found is not None, f"the vision config has none of {', '.join(names)}"
        return int(found[0] if isinstance(found, (list, tuple)) else found)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)
