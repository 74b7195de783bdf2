"""The models of `bench_families.py`: shapes that people use, cut to 100 to 400 million parameters, random weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights

Inputs = Mapping[str, Any]

NOISE = 1 << 20
"""Random numbers that are drawn; weights repeat them."""

PICTURE_PATCHES = 32
"""High and wide; of 14 x 14 pixels, and four make a token."""


def _llama_like(kind: str, **changes: Any) -> Any:
    sizes = {
        "vocab_size": 32_000,
        "hidden_size": 1_024,
        "intermediate_size": 4_096,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4_096,
    }
    return getattr(transformers, kind)(**(sizes | changes))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama_like("LlamaConfig"),
    "qwen3": lambda: _llama_like("Qwen3Config", head_dim=128, num_key_value_heads=8, intermediate_size=3_072),
    "mistral": lambda: _llama_like("MistralConfig", sliding_window=256),
    "gemma2": lambda: _llama_like(
        "Gemma2Config", head_dim=256, num_attention_heads=4, num_key_value_heads=2, sliding_window=256
    ),
    # As google/gemma-3-270m, but for its vocabulary of 262,144.
    "gemma3": lambda: _llama_like(
        "Gemma3TextConfig",
        hidden_size=640,
        intermediate_size=2_048,
        num_hidden_layers=18,
        head_dim=256,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=65_536,
        sliding_window=256,
    ),
    "phi3": lambda: _llama_like("Phi3Config", num_key_value_heads=16, pad_token_id=0),
    # As openai-community/gpt2.
    "gpt2": lambda: transformers.GPT2Config(),
    # As EleutherAI/pythia-160m.
    "pythia": lambda: transformers.GPTNeoXConfig(
        vocab_size=50_304,
        hidden_size=768,
        intermediate_size=3_072,
        num_hidden_layers=12,
        num_attention_heads=12,
        rotary_pct=0.25,
        max_position_embeddings=2_048,
    ),
    # As bigscience/bloom-560m with half of its layers and a smaller vocabulary.
    "bloom": lambda: transformers.BloomConfig(vocab_size=65_536, hidden_size=1_024, n_layer=12, n_head=16),
    # One KV head, rotary positions, parallel residual, as tiiuae/falcon-7b.
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=65_024, hidden_size=1_024, num_hidden_layers=12, num_attention_heads=16
    ),
    # As facebook/opt-125m.
    "opt": lambda: transformers.OPTConfig(),
    "olmoe": lambda: _llama_like(
        "OlmoeConfig",
        num_key_value_heads=16,
        intermediate_size=512,
        num_hidden_layers=8,
        num_experts=16,
        num_experts_per_tok=4,
    ),
    "mixtral": lambda: _llama_like(
        "MixtralConfig", intermediate_size=1_536, num_hidden_layers=8, num_local_experts=8, num_experts_per_tok=2
    ),
    # As google-t5/t5-base.
    "t5": lambda: transformers.T5Config(
        d_model=768, d_kv=64, d_ff=3_072, num_layers=12, num_heads=12, decoder_start_token_id=0
    ),
    # As facebook/bart-base.
    "bart": lambda: transformers.BartConfig(
        d_model=768,
        encoder_layers=6,
        decoder_layers=6,
        encoder_ffn_dim=3_072,
        decoder_ffn_dim=3_072,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        forced_eos_token_id=None,
    ),
    # As openai/whisper-small.
    "whisper": lambda: transformers.WhisperConfig(
        vocab_size=51_865,
        d_model=768,
        encoder_layers=12,
        decoder_layers=12,
        encoder_ffn_dim=3_072,
        decoder_ffn_dim=3_072,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
    ),
    "qwen2-vl": lambda: transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 32_000,
            "hidden_size": 896,
            "intermediate_size": 4_864,
            "num_hidden_layers": 12,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4_096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        vision_config={"depth": 8, "embed_dim": 512, "hidden_size": 896, "num_heads": 8},
        image_token_id=31_990,
        video_token_id=31_991,
        vision_start_token_id=31_992,
        vision_end_token_id=31_993,
    ),
    "x-transformers": dict,
}


def make_model(family: str, dtype: torch.dtype) -> Any:
    """In evaluation mode."""
    if family == "x-transformers":
        model = _x_transformer()
    else:
        config = FAMILIES[family]()
        auto = {
            "whisper": transformers.AutoModelForSpeechSeq2Seq,
            "qwen2-vl": transformers.AutoModelForImageTextToText,
        }.get(family, transformers.AutoModelForCausalLM)
        auto = transformers.AutoModelForSeq2SeqLM if family in ("t5", "bart") else auto
        with no_init_weights():
            model = auto.from_config(config, dtype=dtype)
        for name in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
            setattr(model.generation_config, name, None)
    _draw(model)
    return model.to(dtype).eval().requires_grad_(False)


def inputs_for(model: Any, family: str, lengths: tuple[int, ...], *, seed: int) -> Inputs:
    """Prompts of so many tokens, padded on the left; of encoder-decoder models sources, padded on the right."""
    if family == "whisper":
        generator = torch.Generator().manual_seed(seed)
        return {"input_features": torch.randn(len(lengths), 80, 3_000, generator=generator).to(model.dtype)}
    draw, longest = random.Random(f"{family} {lengths} {seed}"), max(lengths)
    rows = [[draw.randrange(10, 30_000) for _ in range(length)] for length in lengths]
    if family == "x-transformers":
        return {"inputs": torch.tensor(rows) if len(rows) == 1 else [torch.tensor(row) for row in rows]}
    before = not model.config.is_encoder_decoder
    padded, mask = (
        torch.zeros(len(rows), longest, dtype=torch.int64),
        torch.zeros(len(rows), longest, dtype=torch.int64),
    )
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if before else slice(0, len(row))
        padded[index, place], mask[index, place] = torch.tensor(row), 1
    inputs = {"input_ids": padded, "attention_mask": mask}
    return inputs | _picture(model, padded, seed) if family == "qwen2-vl" and len(rows) == 1 else inputs


def _picture(model: Any, ids: Tensor, seed: int) -> dict[str, Tensor]:
    """A picture at the beginning of the prompt, whose ids are changed."""
    config = model.config
    tokens = PICTURE_PATCHES**2 // config.vision_config.spatial_merge_size**2
    ids[0, 0] = config.vision_start_token_id
    ids[0, 1 : 1 + tokens] = config.image_token_id
    ids[0, 1 + tokens] = config.vision_end_token_id
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(PICTURE_PATCHES**2, width, generator=generator).to(model.dtype),
        "image_grid_thw": torch.tensor([[1, PICTURE_PATCHES, PICTURE_PATCHES]]),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
    }


def _x_transformer() -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=768, depth=12, heads=12, rotary_pos_emb=True, attn_flash=True)
    model: nn.Module = TransformerWrapper(num_tokens=32_000, max_seq_len=2_048, attn_layers=layers)
    return model


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Weights: matrices are noise, vectors ones with noise, biases noise. Drawing them one by one takes seconds."""
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        drawn = noise.repeat(-(-size // NOISE))[:size].view(parameter.shape)
        parameter.copy_(1 + drawn if parameter.dim() == 1 and not name.endswith("bias") else drawn)
