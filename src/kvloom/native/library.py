"""The compiled kernels, loaded, or the reason why they are not.

torch is imported first, so that its OpenMP runtime is the one that the kernels find: both then share one pool of
threads, whose number `torch.set_num_threads` sets.
"""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvloom.errors import InvalidRequest
from kvloom.native.build import TARGETS, BuildError, build

VARIABLE = "KVLOOM_NATIVE"
"""The environment variable that switches the kernels off (0) or lowers the instructions that they use."""

logger = logging.getLogger("kvloom.native")


@dataclass(frozen=True)
class Library:
    """The kernels, compiled for one target.

    Attributes:
        target: what they were compiled for: native, or a lower set of instructions.
        instructions: what they use: AVX512-BF16, AVX512, AVX2 or portable.
        dtypes: of weights and cache that they take.
        path: where the compiled file lies.
    """

    target: str
    instructions: str
    dtypes: tuple[torch.dtype, ...]
    path: Path
    _functions: ctypes.CDLL = field(repr=False, compare=False)

    def function(self, name: str, *argtypes: Any, restype: Any = None) -> Any:
        """A function of the library by its C name, with the types of its arguments."""
        function = self._functions[name]  # by index: a fresh object, whose types are nobody else's
        function.argtypes, function.restype = argtypes, restype
        return function


@dataclass(frozen=True)
class Absent:
    """Why there are no native kernels, in half a sentence."""

    reason: str


def native() -> Library | Absent:
    """The kernels for this process: as $KVLOOM_NATIVE says, by default for all that the CPU has.

    The first call may compile, which takes seconds; one warning says if there are no kernels.

    Raises:
        InvalidRequest: the variable has a value that means nothing.
    """
    wanted = os.environ.get(VARIABLE, "1").strip().lower()
    if wanted not in ("0", "1", "", *TARGETS):
        raise InvalidRequest(f"${VARIABLE} is {wanted!r}; set it to 0, 1, {', '.join(TARGETS)}, or not at all.")
    return _native(wanted)


@cache
def _native(wanted: str) -> Library | Absent:
    try:
        if wanted == "0":
            raise BuildError(f"${VARIABLE} is 0")
        return load("native" if wanted in ("1", "") else wanted)
    except BuildError as error:
        logger.warning("No native kernels: %s. PyTorch's operators serve instead, slower.", error)
        return Absent(str(error))


def load(target: str) -> Library:
    """The kernels for one target of `build.TARGETS`.

    Raises:
        BuildError: they cannot be built or loaded; says why. What failed once is not tried again by this process.
    """
    found = _outcome(target)
    if isinstance(found, Library):
        return found
    raise BuildError(str(found))


@cache
def _outcome(target: str) -> Library | BuildError:
    try:
        return _load(target)
    except BuildError as error:
        return error


def _load(target: str) -> Library:
    path = build(target)
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the library that was built cannot be loaded: {error}") from error
    functions.kvloom_instructions.restype = ctypes.c_char_p
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return Library(
        target=target,
        instructions=functions.kvloom_instructions().decode(),
        dtypes=dtypes if functions.kvloom_has_float16() else dtypes[:2],
        path=path,
        _functions=functions,
    )
