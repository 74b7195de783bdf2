"""Every exception that KVLoom raises on purpose.

::

    KVLoomError
    ├── InvalidRequest (ValueError)      the call itself is wrong
    │   ├── UnknownOption                an option that does not exist; says which was probably meant
    │   ├── UnsupportedOption            an option that exists in transformers and is refused here, by name
    │   ├── EmptyPrompt                  nothing to continue
    │   ├── InvalidTokens                ids outside the vocabulary, wrong rank or type
    │   └── PromptTooLong                prompt and new tokens exceed the model's context
    ├── CacheError (RuntimeError)
    │   ├── CacheFull                    the pool cannot hold the request
    │   ├── CacheMismatch (ValueError)   `start` is not the length of the context
    │   ├── ContextClosed                the context was closed, or belongs to another model
    │   ├── ForkedMidway                 the process was forked while its parent was decoding
    │   └── SnapshotError                a snapshot cannot be restored
    │       ├── SnapshotNotFound         no such file
    │       ├── SnapshotMismatch         another model, dtype or codec made it; names which
    │       └── CorruptSnapshot          no snapshot, or one that is damaged or incomplete
    ├── ModelError (RuntimeError)
    │   ├── ModelNotFound                no such folder or hub id
    │   ├── CorruptCheckpoint            weights or config cannot be read
    │   ├── TokenizerMismatch            the tokenizer does not fit the model
    │   ├── UnsupportedModel             attach refuses the model, and says why
    │   │   └── AttachMismatch           cached output differs from the model's own; names the first layer
    │   └── NumericalError               the model returned NaN logits
    └── (a user's logits processor, stopping criterion or callback raises its own exception, unchanged)

Messages follow one pattern: what is needed, what there is, what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable


class KVLoomError(Exception):
    """Base class: `except KVLoomError` catches whatever KVLoom itself refuses or detects."""


class InvalidRequest(KVLoomError, ValueError):
    """The arguments of a call are wrong; nothing was computed."""


class UnknownOption(InvalidRequest):
    """An option that neither KVLoom nor `transformers.GenerationConfig` knows."""

    @classmethod
    def named(cls, name: str, known: Iterable[str]) -> UnknownOption:
        """The error for `name`, with the closest of `known` as a suggestion."""
        import difflib  # late: `import kvloom` is to take no time

        close = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        return cls(f"unknown option `{name}`.{hint}")


class UnsupportedOption(InvalidRequest):
    """An option that transformers has and KVLoom refuses rather than ignores."""


class EmptyPrompt(InvalidRequest):
    """The prompt holds no tokens."""


class InvalidTokens(InvalidRequest):
    """Token ids outside the vocabulary, of a wrong rank, or not integers."""


class PromptTooLong(InvalidRequest):
    """The prompt, or the prompt and its new tokens, exceed the model's context."""


class CacheError(KVLoomError, RuntimeError):
    """The key/value cache cannot do what was asked."""


class CacheFull(CacheError):
    """The pool has too few blocks for a request; nothing was computed for it."""


class CacheMismatch(CacheError, ValueError):
    """Tokens were offered at a position other than the end of the context."""


class ContextClosed(CacheError):
    """A context was used after `close()`, or with a model that did not make it."""


class ForkedMidway(CacheError):
    """The process was forked within a step of its parent, and has a half changed copy of model and cache."""


class SnapshotError(CacheError):
    """A snapshot cannot be restored; nothing is held for it."""


class SnapshotNotFound(SnapshotError):
    """No file at that path."""


class SnapshotMismatch(SnapshotError):
    """The snapshot is whole, but not of this model, dtype or codec."""


class CorruptSnapshot(SnapshotError):
    """The file is no snapshot, or it is damaged or incomplete."""


class ModelError(KVLoomError, RuntimeError):
    """A model cannot be loaded, attached or trusted."""


class ModelNotFound(ModelError):
    """No model at that folder or hub id."""


class CorruptCheckpoint(ModelError):
    """The checkpoint's files are damaged or incomplete."""


class TokenizerMismatch(ModelError):
    """The tokenizer can produce ids that the model has no embedding for."""


class UnsupportedModel(ModelError):
    """The model cannot be decoded on the cache; the message names the reason."""


class AttachMismatch(UnsupportedModel):
    """Cached output differs from the model's own forward beyond the tolerance."""


class NumericalError(ModelError):
    """The model returned logits that are not numbers."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in a line; with the next one if that is a heading. Its type if nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
