"""A conversation as a file holds it: turns as JSON; keys and values in a snapshot beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kvloom.conversation.turn import Turn
from kvloom.errors import InvalidRequest

FORMAT = "kvloom conversation 1"


def told(turn: Turn) -> dict[str, Any]:
    """A turn as JSON holds it."""
    if not all(isinstance(own, (str, os.PathLike)) for own in turn.images):
        raise InvalidRequest("an image that is not in a file cannot be saved. Show images by their paths.")
    images = [os.fspath(own) for own in turn.images]
    fields = {"said": turn.said, "answer": turn.answer, "tokens_before": turn.tokens_before}
    return {**fields, "images": images} if images else fields


def beside(file: Path) -> Path:
    """Where the keys and values of a conversation in `file` lie."""
    return file.with_name(file.name + ".kv")


def read(file: Path) -> dict[str, Any]:
    """What `save` wrote."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"`{file}` cannot be read: {error.strerror}. Name another file.") from error
    except ValueError as error:
        raise InvalidRequest(f"`{file}` is not a saved conversation.") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise InvalidRequest(f"`{file}` is not a saved conversation.")
    try:
        turns = [Turn(**turn) for turn in fields["turns"]]
        whole = all(isinstance(turn.said + turn.answer, str) and turn.tokens_before >= 0 for turn in turns)
        whole = whole and isinstance(fields["token_ids"], list) and isinstance(fields["system"], str | None)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise InvalidRequest(
            f"`{file}` is a damaged conversation: it lacks something, or holds it in another form. Save it again."
        )
    return fields
