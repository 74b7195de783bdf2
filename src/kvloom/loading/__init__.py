"""From a hub id or a folder to a model, its tokenizer and its processor."""

from kvloom.loading.checkpoint import check_tokenizer, load_config, load_pretrained, read_dtype

__all__ = ["check_tokenizer", "load_config", "load_pretrained", "read_dtype"]
