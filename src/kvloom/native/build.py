"""The native kernels are compiled on the machine that they run on, once, in a few seconds.

What is built lies in the user's cache folder under a name that says of which sources, by which compiler, with which
flags and for which CPU it was made, so a change of any of them builds anew. A process builds aside and renames, so that
nobody sees a half-written file, and others that start meanwhile wait for what it builds.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("g++", "clang++", "c++")
# No contraction: the compiler must not fuse a product and a sum in one loop and leave them apart in another, or two
# kernels that say the same would round differently. Where kernels fuse, they say so.
# No automatic vectors: kernels say what is a vector, and GCC 12 made loops over rows that read beyond the last row.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-tree-vectorize",
    "-fvisibility=hidden",
)


class BuildError(Exception):
    """The kernels cannot be built here; says why in one line."""


@dataclass(frozen=True)
class Target:
    """A set of instructions to compile for.

    Attributes:
        flags: of the compiler.
        needs: what the CPU must have, as Linux calls it.
    """

    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

TARGETS: Mapping[str, Target] = {"native": Target(("-march=native",))} | (
    {
        "avx512": Target(("-march=x86-64-v4",), _AVX512),
        "avx2": Target(("-march=x86-64-v3",), _AVX2),
        "portable": Target(("-march=x86-64",)),
    }
    if platform.machine() in ("x86_64", "AMD64")
    else {"portable": Target(())}
)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: as it is called.
        identity: changes when another version is installed.
    """

    command: str
    identity: str

    def compile(self, flags: tuple[str, ...], source: Path, result: Path) -> None:
        """One object file."""
        self._run(*FLAGS, *flags, "-c", str(source), "-o", str(result))

    def link(self, objects: list[Path], result: Path) -> None:
        """One shared library."""
        self._run("-shared", "-fopenmp", *map(str, objects), "-o", str(result))

    def _run(self, *arguments: str) -> None:
        try:
            subprocess.run([self.command, *arguments], check=True, capture_output=True, text=True, errors="replace")
        except subprocess.CalledProcessError as error:
            lines = [line.strip() for line in error.stderr.splitlines() if "error" in line.lower()]
            reason = lines[0] if lines else f"exit status {error.returncode}"
            raise BuildError(f"{self.command} failed: {reason}") from error
        except OSError as error:
            raise BuildError(f"{self.command} cannot be run: {error.strerror or error}") from error


def find_compiler() -> Compiler:
    """The compiler that $CXX names, else the first of `COMPILERS` on the path.

    Raises:
        BuildError: there is none.
    """
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        if (found := shutil.which(name)) is not None:
            file = Path(found).resolve()
            state = file.stat()
            return Compiler(found, f"{file} {state.st_size} {state.st_mtime_ns}")
    raise BuildError(
        f"$CXX names {wanted}, which is no command here" if wanted else f"no C++ compiler ({', '.join(COMPILERS)})"
    )


def cpu_flags() -> frozenset[str]:
    """What the CPU offers, in Linux' words; empty where there is no /proc/cpuinfo."""
    return frozenset(_cpu_field("flags").split())


def cpu_name() -> str:
    """What the CPU calls itself."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Where libraries are kept: `kvloom` in $XDG_CACHE_HOME, by default in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "kvloom"
    except RuntimeError:  # a user without a home
        return _temporary_folder()


def build(target: str, sources: Path = SOURCES) -> Path:
    """The shared library for a name in `TARGETS`, compiled if this machine has not compiled it before.

    Raises:
        BuildError: there is no compiler, it fails, the disk is full, or the CPU lacks what the target needs.
    """
    chosen = TARGETS.get(target)
    if chosen is None:
        raise BuildError(f"there is no target {target!r} on this machine; there are {', '.join(TARGETS)}")
    if lacking := chosen.needs - cpu_flags():
        raise BuildError(f"the CPU has no {', '.join(sorted(lacking))}, which {target} needs")
    compiler = find_compiler()
    name = f"kernels-{target}-{_key(compiler, chosen, sources)}.so"
    folders = [cache_folder(), _temporary_folder()]
    for folder in folders:
        # Unlike Path.is_file, this is False for a folder that we may not look into.
        if os.path.isfile(folder / name) and _is_ours(folder):
            return folder / name
    for folder in folders:
        if _is_writable(folder):
            try:
                with _one_at_a_time(folder / f"{name}.lock"):
                    built = os.path.isfile(folder / name)  # by the process that was waited for
                    return folder / name if built else _build_in(folder, name, compiler, chosen.flags, sources)
            except OSError as error:
                raise BuildError(f"{folder} cannot take the kernels: {error.strerror or error}") from error
    raise BuildError(f"neither {folders[0]} nor {folders[1]} can be written")


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """One process at a time holds `lock`; the system takes it back from a process, however that ends.

    Where files cannot be locked, each process builds: that costs time and harms nothing.
    """
    with lock.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _build_in(folder: Path, name: str, compiler: Compiler, flags: tuple[str, ...], sources: Path) -> Path:
    """Compile the files side by side, the longest first: they take longest, and the last one is waited for."""
    files = sorted(sources.glob("*.cpp"), key=lambda file: (-file.stat().st_size, file.name))
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as aside, ThreadPoolExecutor() as pool:
        objects = [Path(aside) / f"{file.stem}.o" for file in files]
        list(pool.map(compiler.compile, repeat(flags), files, objects))
        compiler.link(objects, Path(aside) / name)
        os.replace(Path(aside) / name, folder / name)
    return folder / name


def _key(compiler: Compiler, target: Target, sources: Path) -> str:
    cpu = " ".join([platform.machine(), cpu_name(), *sorted(cpu_flags())])
    digest = hashlib.blake2b("\n".join([compiler.identity, cpu, *FLAGS, *target.flags]).encode(), digest_size=10)
    for source in sorted(sources.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()


def _temporary_folder() -> Path:
    """For a cache folder that cannot be written. Others can write to its parent, so it must be ours alone."""
    return Path(tempfile.gettempdir()) / f"kvloom-{os.getuid()}"


def _is_ours(folder: Path) -> bool:
    """Whether nobody but us, or the system's owner, can have put a library there."""
    state = folder.lstat()
    return (
        stat.S_ISDIR(folder.stat().st_mode)
        and state.st_uid in (os.getuid(), 0)
        and not folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return False
    return _is_ours(folder)


def _cpu_field(name: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
