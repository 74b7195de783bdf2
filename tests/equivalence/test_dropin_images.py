"""`kvloom.generate(model, **processor(...))` on image-text models: batches whose images stand one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

import kvloom
from kvloom.errors import InvalidRequest, UnsupportedOption
from tiny import random_ids, tiny_model
from tiny_vision import Picture, prompt, tiny_vision_model

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")


def together(prompts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Prompts as a processor hands over a batch: tokens padded on the left, media one after the other."""
    width = max(own["input_ids"].shape[1] for own in prompts)
    names = dict.fromkeys(name for own in prompts for name in own)
    by_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {
        name: torch.cat(
            [pad(own[name], (width - own[name].shape[1], 0)) if name in by_token else own[name] for own in having]
        )
        for name in names
        if (having := [own for own in prompts if name in own])
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_with_images_gives_what_transformers_gives(family: str) -> None:
    model = tiny_vision_model(family)
    model.generation_config.pad_token_id = 0
    inputs = together(
        [
            prompt(model, 5, Picture(4, 6), 7, seed=1),
            prompt(model, 3, seed=2),
            prompt(model, 2, Picture(4, 4, seed=3), 3, Picture(4, 8, seed=4), 2, seed=3),
        ]
    )
    options: dict[str, Any]
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        theirs = model.generate(**inputs, max_new_tokens=8, **options)
        ours = kvloom.generate(model, **inputs, max_new_tokens=8, **options)
        assert ours.tolist() == theirs.tolist()
    other = kvloom.generate(model, **{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}, max_new_tokens=8)
    assert other.tolist() != kvloom.generate(model, **inputs, max_new_tokens=8).tolist(), "the images count"


def test_a_video_beside_an_image_gives_what_transformers_gives() -> None:
    model = tiny_vision_model("qwen2_5_vl")
    inputs = together([prompt(model, 5, Picture(4, 6), 7), prompt(model, 4, Picture(4, 4, frames=2), 2)])
    theirs = model.generate(**inputs, max_new_tokens=8, pad_token_id=0)
    assert kvloom.generate(model, **inputs, max_new_tokens=8, pad_token_id=0).tolist() == theirs.tolist()


def test_images_that_are_not_those_of_the_placeholders_are_refused() -> None:
    model = tiny_vision_model("qwen2_vl")
    first, second = prompt(model, 5, Picture(4, 6), 7), prompt(model, 2, Picture(4, 6, seed=1), 10)
    inputs = together([first, second])
    with pytest.raises(InvalidRequest, match="12 image placeholders, but its 1 images make 6"):
        kvloom.generate(
            model, **{**inputs, "pixel_values": first["pixel_values"], "image_grid_thw": first["image_grid_thw"]}
        )
    with pytest.raises(InvalidRequest, match="cannot be split into single"):
        kvloom.generate(model, **{**inputs, "pixel_values": first["pixel_values"]})
    text = tiny_model("llama")
    with pytest.raises(InvalidRequest, match="pixel_values"):
        kvloom.generate(text, torch.tensor([random_ids(text, tokens=4)]), pixel_values=torch.zeros(1, 3, 8, 8))
    with pytest.raises(UnsupportedOption, match="`past_key_values` is not supported"):
        kvloom.generate(model, **first, past_key_values=DynamicCache())
