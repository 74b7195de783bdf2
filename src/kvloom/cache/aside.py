"""Files that are written aside and renamed: there is the old one or the new one, whole, whatever happens."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvloom.errors import InvalidRequest


def target_of(path: str | os.PathLike[str]) -> Path:
    """The file to be replaced: where a link points, not the link."""
    target = Path(path).expanduser().resolve()
    if not target.parent.is_dir():
        raise InvalidRequest(f"there is no folder `{target.parent}` to save a snapshot in. Make it, or name another.")
    if target.is_dir():
        raise InvalidRequest(f"`{target}` is a folder, and a snapshot is a file. Name a file in it.")
    if target.exists() and not target.is_file():
        raise InvalidRequest(f"`{target}` is not a regular file, so a snapshot cannot take its place. Name another.")
    return target


@contextmanager
def written_aside(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `target` at the end of the block; if the block fails, it is removed.

    It has one name for each target, so a writer that was killed leaves one file, which the next one writes over.
    """
    aside = target.with_name(f".{target.name}.partial")
    file = _open_alone(aside)
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    finally:
        file.close()
    _sync_folder(target.parent)


def _open_alone(aside: Path) -> BinaryIO:
    """An empty file that no other process writes; a lock on it ends with the process that holds it."""
    while True:
        file = open(aside, "ab")  # noqa: SIM115 (the caller closes it)
        fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, aside):
            file.truncate(0)
            return file
        file.close()  # the writer that we waited for has renamed or removed it


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Without this a power cut may undo the rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
