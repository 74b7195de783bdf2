"""Numbers as people read them."""

from __future__ import annotations


def readable_bytes(size: int) -> str:
    """A number of bytes in the largest unit that leaves a whole part."""
    amount = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:,.0f} {unit}" if unit == "bytes" else f"{amount:,.1f} {unit}"


def counted(number: int, noun: str) -> str:
    """So many things: "1 block", "2,048 tokens"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
