"""What a program reads: one JSON object on one line."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import click


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    click.echo(json.dumps(_finite(value), ensure_ascii=not utf8, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return value
