"""The instruction sets that the native kernels can be compiled for and run with on this machine."""

from __future__ import annotations

from functools import cache

from kvloom.native.build import TARGETS, BuildError
from kvloom.native.library import load


@cache
def targets() -> tuple[str, ...]:
    """Names for `load`; empty without a compiler. Compiles what was not compiled before."""
    return tuple(target for target in TARGETS if _loads(target))


def _loads(target: str) -> bool:
    try:
        load(target)
    except BuildError:
        return False
    return True
