"""Numbers, and what they are kept in, as people read them."""

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
    """A number of things: "1 block", "1,024 blocks"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def dtype_name(dtype: object) -> str:
    """A dtype of PyTorch without its package: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
