"""Values of options."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    IntType = click.ParamType[int]
    OptionalIntType = click.ParamType[int | None]
else:
    # Generic since click 8.4 only.
    IntType = OptionalIntType = click.ParamType

_SCALE = {"": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _SCALE |= {_letter: 1024**_power, f"{_letter}I": 1024**_power, f"{_letter}IB": 1024**_power}
    _SCALE |= {f"{_letter}B": 1000**_power}


class Count(click.IntRange):
    """An integer of at least `min`."""

    name = "integer"  # what a wrong value is said not to be


class ByteSize(IntType):
    """A number of bytes: 65536, 512MiB, 2GB. MiB and M count in 1,024s, MB in 1,000s."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes that `value` says."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        unit = match[2].upper().removesuffix("YTES").removesuffix("YTE") if match else ""
        if unit == "B":
            unit = ""
        if match is None or unit not in _SCALE or (size := int(float(match[1]) * _SCALE[unit])) < 1:
            self.fail(f"{value!r} is not a size such as 512MiB, 2GiB or 65536.", param, ctx)
        return size


class TokenId(OptionalIntType):
    """A token id, or "none"."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The id, None for "none"."""
        if isinstance(value, int) or value is None or value.lower() == "none":
            return value if isinstance(value, int) else None
        if not value.isdecimal():
            self.fail(f"{value!r} is neither a token id nor `none`.", param, ctx)
        return int(value)


class Alternatives(IntType):
    """How many alternatives to show; an option whose value may be left out swallows what stands behind it."""

    name = "k"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        if isinstance(value, int):
            return value
        if not value.isdecimal():
            self.fail(f"{value!r} is not a number. Without one, write the option after the prompt.", param, ctx)
        return int(value)
