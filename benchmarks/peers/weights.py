"""The model that all peers run: Qwen2.5-0.5B's shape with random weights, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 151_936


def make_model(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """24 layers, hidden size 896, 14 query and 2 KV heads of 64, tied embeddings."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=896,
        intermediate_size=4_864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(dtype).eval()


def save(folder: Path) -> None:
    """Write config and weights."""
    make_model().save_pretrained(folder)
