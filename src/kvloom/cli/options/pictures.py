"""Images and videos as they come to a command: files, and folders of frames."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvloom.errors import InvalidRequest

FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

Blocks = list[dict[str, Any]]


def shown_blocks(images: Sequence[str] = (), *, frames: str | None = None, videos: Sequence[str] = ()) -> Blocks:
    """The content of a message before its text: images, the frames of a folder as images, then videos."""
    paths = [*images, *(() if frames is None else map(str, frames_in(frames)))]
    blocks: Blocks = [{"type": "image", "path": path} for path in paths]
    return [*blocks, *({"type": "video", "path": path} for path in videos)]


def with_text(blocks: Blocks, text: str) -> Any:
    """A prompt: plain text, or one message that shows something before the text."""
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": text}]}] if blocks else text


def frames_in(folder: str) -> list[Path]:
    """The images of a folder in the order of their names, in which numbers count as numbers."""
    found = Path(folder).expanduser()
    if not found.is_dir():
        raise InvalidRequest(f"there is no folder `{folder}`. Name one that holds the frames as images.")
    frames = [path for path in found.iterdir() if path.suffix.lower() in FRAMES]
    if not frames:
        raise InvalidRequest(
            f"the folder `{folder}` holds no images. Put frames into it that end with {', '.join(FRAMES)}."
        )
    return sorted(frames, key=_by_number)


def _by_number(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]
