"""The benchmark's model as a GGUF file, by gguf's own writer: tensor names and metadata as llama.cpp wants them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np


def write_gguf(folder: Path, target: Path) -> None:
    """Convert a Qwen2 checkpoint in bfloat16; matrices stay bfloat16, vectors become float32."""
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _add_vocabulary(writer, config["vocab_size"])
    for name, bits in _read_bfloat16(folder / "model.safetensors"):
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if bits.ndim == 2:
            writer.add_tensor(new, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(new, (bits.astype(np.uint32) << 16).view(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_bfloat16(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a safetensors file (a JSON header behind its length, then the bytes) as bits, uint16."""
    data = np.memmap(file, dtype=np.uint8, mode="r")
    start = 8 + int(data[:8].view(np.uint64)[0])
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
        first, end = entry["data_offsets"]
        yield name, data[start + first : start + end].view(np.uint16).reshape(entry["shape"])


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Names for the ids; prompts are ids, so no text is ever made into tokens."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"<{token}>" for token in range(size)])
    writer.add_token_types(np.full(size, int(gguf.TokenType.NORMAL), dtype=np.int32).tolist())
    writer.add_token_merges(["< 0"])
