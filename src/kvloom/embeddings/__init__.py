"""Modules that map embeddings to hidden states, driven by hand on the cache: what `attach(decoder)` gives."""

from kvloom.embeddings.context import Embedded, EmbeddingContext
from kvloom.embeddings.model import EmbeddingModel

__all__ = ["Embedded", "EmbeddingContext", "EmbeddingModel"]
