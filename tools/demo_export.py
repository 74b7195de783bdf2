"""Writes the demonstration model as Hugging Face Transformers reads it: bfloat16, tied matrix stored once."""

import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2ForCausalLM, Qwen2Tokenizer

from demo_corpus import END_OF_TEXT, PADDING


def wrap_tokenizer(tokenizer: Tokenizer, context_tokens: int) -> PreTrainedTokenizerBase:
    """The trained tokenizer with what generation needs to know: where texts end, and what pads a batch."""
    return Qwen2Tokenizer(
        tokenizer_object=tokenizer,
        unk_token=None,  # bytes cover every text
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",  # what a decoder needs: every prompt of a batch then ends where its story begins
        model_max_length=context_tokens,
    )


def export_model(model: Qwen2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Exports beside the folder first and then moves file by file, so that readers never find half a file."""
    exported = deepcopy(model).to("cpu", torch.bfloat16)
    end, padding = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(PADDING)
    exported.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=padding, do_sample=False)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        exported.save_pretrained(unfinished)
        wrap_tokenizer(tokenizer, model.config.max_position_embeddings).save_pretrained(unfinished)
        for path in Path(unfinished).iterdir():
            path.chmod(0o644)  # safetensors writes for its owner alone
            path.replace(folder / path.name)
