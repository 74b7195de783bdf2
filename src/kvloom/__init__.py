"""KVLoom: decode Hugging Face models on a paged, forkable, bounded and provable key/value cache.

::

    import kvloom

    lm = kvloom.load()                                  # the bundled demonstration model
    out = lm.generate("Once upon a time", max_new_tokens=64)
    print(out.text, out.usage)
"""

from kvloom import errors
from kvloom.context import Context
from kvloom.engine import Usage
from kvloom.errors import (
    AttachMismatch,
    CacheFull,
    CacheMismatch,
    InvalidRequest,
    KVLoomError,
    UnsupportedModel,
)
from kvloom.model import LanguageModel, Stream, attach, load
from kvloom.results import Extended, Generation, Hypotheses, Piece

__version__ = "0.1.0"

__all__ = [
    "AttachMismatch",
    "CacheFull",
    "CacheMismatch",
    "Context",
    "Extended",
    "Generation",
    "Hypotheses",
    "InvalidRequest",
    "KVLoomError",
    "LanguageModel",
    "Piece",
    "Stream",
    "UnsupportedModel",
    "Usage",
    "__version__",
    "attach",
    "errors",
    "load",
]
