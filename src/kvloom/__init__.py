"""KVLoom: decode Hugging Face models on a paged, forkable, bounded and provable key/value cache.

::

    import kvloom

    lm = kvloom.load()                                  # the bundled demonstration model
    out = lm.generate("Once upon a time", max_new_tokens=64)
    print(out.text, out.usage)
"""

import importlib
from typing import TYPE_CHECKING

from kvloom import errors
from kvloom.errors import (
    AttachMismatch,
    CacheFull,
    CacheMismatch,
    InvalidRequest,
    KVLoomError,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from kvloom.attaching import attach, load
    from kvloom.cache.retention import CompressedPrompt, HeavyHitters, LastQuery, SinkWindow, TopBlocks
    from kvloom.dropin import generate
    from kvloom.embeddings import Embedded, EmbeddingContext, EmbeddingModel
    from kvloom.engine import Usage
    from kvloom.language_model.context import Context
    from kvloom.language_model.inspecting import Inspection
    from kvloom.language_model.model import LanguageModel
    from kvloom.language_model.results import Extended, Generation, Hypotheses, Piece
    from kvloom.language_model.scoring import Score, Scores
    from kvloom.language_model.stream import Stream
    from kvloom.models import PagedCache
    from kvloom.planning import MemoryPlan, plan
    from kvloom.verify import Report

__version__ = "0.1.0"

__all__ = [
    "AttachMismatch",
    "CacheFull",
    "CacheMismatch",
    "CompressedPrompt",
    "Context",
    "Embedded",
    "EmbeddingContext",
    "EmbeddingModel",
    "Extended",
    "Generation",
    "HeavyHitters",
    "Hypotheses",
    "Inspection",
    "InvalidRequest",
    "KVLoomError",
    "LanguageModel",
    "LastQuery",
    "MemoryPlan",
    "PagedCache",
    "Piece",
    "Report",
    "Score",
    "Scores",
    "SinkWindow",
    "Stream",
    "TopBlocks",
    "UnsupportedModel",
    "Usage",
    "__version__",
    "attach",
    "errors",
    "generate",
    "load",
    "plan",
]

# What needs torch and transformers is imported when it is first asked for, so that `kvloom --help` and a
# mistyped option are answered at once (PEP 562).
_LATE = {
    "CompressedPrompt": "cache.retention",
    "Context": "language_model.context",
    "Embedded": "embeddings",
    "EmbeddingContext": "embeddings",
    "EmbeddingModel": "embeddings",
    "Extended": "language_model.results",
    "Generation": "language_model.results",
    "HeavyHitters": "cache.retention",
    "Hypotheses": "language_model.results",
    "Inspection": "language_model.inspecting",
    "LanguageModel": "language_model.model",
    "LastQuery": "cache.retention",
    "MemoryPlan": "planning",
    "PagedCache": "models",
    "Piece": "language_model.results",
    "Report": "verify",
    "Score": "language_model.scoring",
    "Scores": "language_model.scoring",
    "SinkWindow": "cache.retention",
    "Stream": "language_model.stream",
    "TopBlocks": "cache.retention",
    "Usage": "engine",
    "attach": "attaching",
    "generate": "dropin",
    "load": "attaching",
    "plan": "planning",
}


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    # What is public; submodules that happen to be imported are not.
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
