"""What KVLoom runs on here, and why: kernels, compiler, CPU, threads, memory bandwidth, libraries, GPU."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from kvloom.bench.bandwidth import read_bandwidth
from kvloom.models.packing.packings import OneDnnPacking
from kvloom.native import Absent, Library, native
from kvloom.native.build import BuildError, cache_folder, cpu_flags, cpu_name, find_compiler
from kvloom.native.library import VARIABLE
from kvloom.units import dtype_name

# What kernels are compiled for, or might be, in Linux' words.
TOLD_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The native kernels.

    Attributes:
        in_use: whether there are any. reason: why not, or what lowered them; None if there is nothing to say.
        instructions, dtypes: what they use, and which weights and caches they take.
        library: the compiled file.
        linear_layers: what runs packed linear layers here: "native", "oneDNN" or "PyTorch".
    """

    in_use: bool
    reason: str | None
    instructions: str | None
    dtypes: tuple[str, ...]
    library: str | None
    linear_layers: str


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found. Made by `examine`.

    Attributes:
        compiler: its version line; None if there is none, and `compiler_problem` says why.
        cpu_instructions: those that matter to the kernels, in Linux' words.
        threads: that PyTorch and the kernels use. cpus: that this process may use.
        bytes_per_second: of reading memory with all threads, measured.
        gpu: its name; None if there is none that PyTorch can use.
    """

    kernels: Kernels
    compiler: str | None
    compiler_problem: str | None
    cache_folder: str
    cpu: str
    cpu_instructions: tuple[str, ...]
    threads: int
    cpus: int
    bytes_per_second: float
    versions: dict[str, str]
    gpu: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine(*, version: str, threads: int | None = None) -> Examination:
    """Look at this machine. Kernels are compiled if they were not before, and memory is read for a tenth of a second.

    Args:
        version: of KVLoom.
        threads: PyTorch's, for the whole process; by default as PyTorch has them.

    Raises:
        InvalidRequest: $KVLOOM_NATIVE has a value that means nothing.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    found = native()
    compiler, problem = _compiler()
    return Examination(
        kernels=_kernels(found),
        compiler=compiler,
        compiler_problem=problem,
        cache_folder=str(found.path.parent if isinstance(found, Library) else cache_folder()),
        cpu=cpu_name(),
        cpu_instructions=tuple(flag for flag in TOLD_FLAGS if flag in cpu_flags()),
        threads=torch.get_num_threads(),
        cpus=len(os.sched_getaffinity(0)),
        bytes_per_second=read_bandwidth(torch.device("cpu")),
        versions={
            "kvloom": version,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


def _kernels(found: Library | Absent) -> Kernels:
    if not isinstance(found, Library):
        linear = "oneDNN" if OneDnnPacking.exists() else "PyTorch"
        return Kernels(
            in_use=False, reason=found.reason, instructions=None, dtypes=(), library=None, linear_layers=linear
        )
    return Kernels(
        in_use=True,
        reason=None if found.target == "native" else f"${VARIABLE} is {found.target}",
        instructions=found.instructions,
        dtypes=tuple(dtype_name(dtype) for dtype in found.dtypes),
        library=str(found.path),
        linear_layers="native",
    )


def _compiler() -> tuple[str | None, str | None]:
    """Its version line, or why there is none."""
    try:
        command = find_compiler().command
        answer = subprocess.run([command, "--version"], capture_output=True, text=True, errors="replace", check=True)
    except BuildError as error:
        return None, str(error)
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"{Path(command).name} cannot be run: {error}"
    lines = answer.stdout.splitlines()
    return (lines[0] if lines else command), None
