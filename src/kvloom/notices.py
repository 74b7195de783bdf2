"""Warnings that point at the line of the user's program, however deep inside KVLoom they arise."""

from __future__ import annotations

import sys
import warnings


class Notice(UserWarning):
    """A warning of KVLoom's own, so that the command can tell it from those of other libraries."""


def warn(message: str) -> None:
    """Issue a `Notice` on behalf of the nearest caller outside the package."""
    package = __name__.partition(".")[0]
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, Notice, stacklevel=level - 1)
