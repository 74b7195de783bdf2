"""Small random image-text models, and prompts with pictures for them, built without network and processor files.

::

    model = tiny_vision_model("qwen2_vl")
    inputs = prompt(model, 5, Picture(4, 6), 7)          # five words, a picture of 4 x 6 patches, seven words
    model.generate(**inputs); lm.generate(inputs)        # one mapping serves both

`Picture` says how many patches an image has, high and wide; with `frames` it is a video of as many temporal patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    Qwen3VLConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from kvloom.loading.checkpoint import DEMO_MODEL
from kvloom.loading.processor import without_videos
from tiny import _draw_weights

WORDS = 118
"""Token ids below are words; above stand the special ones."""

IMAGE, VIDEO, START, END = 120, 121, 122, 123
PLACEHOLDERS = [IMAGE, VIDEO]

_TEXT = {
    "vocab_size": 131,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 2, 3]}
_SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2}


def qwen2_vl_config(**changes: Any) -> PreTrainedConfig:
    """`changes` are of the text config, or special tokens."""
    special = {name: changes.pop(name) for name in _SPECIAL if name in changes}
    return Qwen2VLConfig(
        text_config=_TEXT | {"rope_parameters": _ROPE} | changes,
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "patch_size": 14},
        **(_SPECIAL | special),
    )


def qwen2_5_vl_config() -> PreTrainedConfig:
    """Its time axis counts in `tokens_per_second`."""
    vision = {"depth": 2, "out_hidden_size": 48, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(
        text_config=_TEXT | {"rope_parameters": _ROPE},
        vision_config=_SMALL | vision | {"tokens_per_second": 2},
        **_SPECIAL,
    )


def qwen3_vl_config() -> PreTrainedConfig:
    """Its first two decoder layers get image features of their own (DeepStack), and a video is a row of frames."""
    vision = {"depth": 3, "out_hidden_size": 48, "patch_size": 16, "num_position_embeddings": 64}
    rope = _ROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config=_TEXT | {"head_dim": 16, "rope_parameters": rope},
        vision_config=_SMALL | vision | {"deepstack_visual_indexes": [0, 1]},
        **_SPECIAL,
    )


def llava_config() -> PreTrainedConfig:
    """Pictures of one size, positions that count tokens."""
    vision = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return LlavaConfig(
        text_config=LlamaConfig(**_TEXT),
        vision_config=CLIPVisionConfig(hidden_size=32, intermediate_size=48, projection_dim=32, **vision),
        image_token_id=IMAGE,
    )


def gemma3_config() -> PreTrainedConfig:
    """The tokens of a picture see each other, later ones too."""
    vision = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    return Gemma3Config(
        text_config=_TEXT | {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 2},
        vision_config={"hidden_size": 32, "intermediate_size": 48} | vision,
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
    )


_CONFIGS = {
    "qwen2_vl": qwen2_vl_config,
    "qwen2_5_vl": qwen2_5_vl_config,
    "qwen3_vl": qwen3_vl_config,
    "llava": llava_config,
    "gemma3": gemma3_config,
}

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""They rotate by time, height and width."""


def tiny_vision_model(family: str, *, seed: int = 0, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A random model in eval mode: the same arguments give the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config or _CONFIGS[family](), attn_implementation="eager")
        _draw_weights(model)
    return model.eval().requires_grad_(False)


CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

CHAT_TEMPLATE = """
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for block in message['content'] -%}
{%- if block['type'] == 'text' -%}{{ block['text'] }}
{%- else -%}<|vision_start|><|{{ block['type'] }}_pad|><|vision_end|>
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
"""In the manner of Qwen2-VL's, without its default system message."""


def tiny_processor() -> ProcessorMixin:
    """Qwen2-VL's processor on the bundled tokenizer, for images of 1 to 12 features; none of it needs torchvision."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 12 * 28 * 28})
    make = without_videos(Qwen2VLProcessor)
    return make(image_processor=images, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)


def chat_model(processor: ProcessorMixin) -> PreTrainedModel:
    """A Qwen2-VL model for a processor's vocabulary."""
    _, end, *special = processor.tokenizer.convert_tokens_to_ids(CHAT_TOKENS)
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = qwen2_vl_config(
        vocab_size=len(processor.tokenizer), eos_token_id=end, **dict(zip(names, special, strict=True))
    )
    return tiny_vision_model("qwen2_vl", config=config)


@dataclass(frozen=True)
class Picture:
    """An image of `height` x `width` patches, or a video of `frames` such images.

    Attributes:
        seed: the same seed and size give the same pixels.
        seconds: between two temporal patches of a video, for models that count seconds.
    """

    height: int = 4
    width: int = 4
    frames: int | None = None
    seed: int = 0
    seconds: float = 1.0

    def pixels(self, config: Any) -> Tensor:
        """As a processor would hand them over: noise."""
        generator = torch.Generator().manual_seed(self.seed)
        if not hasattr(config, "spatial_merge_size"):
            return torch.randn((1, 3, config.image_size, config.image_size), generator=generator)
        patches = (self.frames or 1) * self.height * self.width
        size = 3 * config.temporal_patch_size * config.patch_size**2
        return torch.randn((patches, size), generator=generator)


def prompt(model: PreTrainedModel, *parts: int | Picture | list[int], seed: int = 0) -> dict[str, Tensor]:
    """What a processor would return: words (so many random ones, or these ids) and pictures, in the order given."""
    config = model.config.vision_config
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    types: list[int] = []
    inputs: dict[str, list[Tensor]] = {}

    def add(tokens: list[int], kind: int = 0) -> None:
        ids.extend(tokens)
        types.extend([kind] * len(tokens))

    for part in parts:
        if isinstance(part, int):
            add(torch.randint(WORDS, (part,), generator=generator).tolist())
        elif isinstance(part, list):
            add(part)
        else:
            _add_picture(model, part, add, inputs)
    tensors = {name: torch.cat(own) for name, own in inputs.items()}
    if hasattr(config, "spatial_merge_size"):
        tensors["mm_token_type_ids"] = torch.tensor([types])
    elif model.config.model_type == "gemma3":
        tensors["token_type_ids"] = torch.tensor([types])
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64), **tensors}


def _add_picture(model: PreTrainedModel, picture: Picture, add: Any, inputs: dict[str, list[Tensor]]) -> None:
    config = model.config.vision_config
    if not hasattr(config, "spatial_merge_size"):
        add([IMAGE] * (config.image_size // config.patch_size) ** 2 if config.image_size == 28 else [IMAGE] * 4, 1)
        inputs.setdefault("pixel_values", []).append(picture.pixels(config))
        return
    merged = picture.height * picture.width // config.spatial_merge_size**2
    grid = torch.tensor([[picture.frames or 1, picture.height, picture.width]])
    if picture.frames is None:
        add([START])
        add([IMAGE] * merged, 1)
        add([END])
        inputs.setdefault("pixel_values", []).append(picture.pixels(config))
        inputs.setdefault("image_grid_thw", []).append(grid)
        return
    inputs.setdefault("pixel_values_videos", []).append(picture.pixels(config))
    inputs.setdefault("video_grid_thw", []).append(grid)
    if model.config.model_type == "qwen2_5_vl":
        inputs.setdefault("second_per_grid_ts", []).append(torch.tensor([picture.seconds]))
    runs = [merged] * picture.frames if model.config.model_type == "qwen3_vl" else [merged * picture.frames]
    for number, run in enumerate(runs):
        add([number + 1, START])  # Qwen3-VL writes the time before each frame
        add([VIDEO] * run, 2)
        add([END])
