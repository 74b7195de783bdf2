"""The processor of an image-text checkpoint: its tokenizer, and what turns images into the model's inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PROCESSOR_MAPPING, AutoProcessor
from transformers.utils import is_torchvision_available

from kvloom.errors import CorruptCheckpoint, first_line

FILES = ("processor_config.json", "preprocessor_config.json")


def read_processor(source: Path | str, config: Any) -> Any:
    """The checkpoint's processor; None if it has none, and then prompts are text.

    Raises:
        CorruptCheckpoint: it cannot be read.
    """
    if isinstance(source, Path) and not any((source / name).is_file() for name in FILES):
        return None
    loader = AutoProcessor
    if not is_torchvision_available() and type(config) in PROCESSOR_MAPPING:
        loader = without_videos(PROCESSOR_MAPPING[type(config)])
    try:
        return loader.from_pretrained(source)
    except Exception as error:
        raise CorruptCheckpoint(f"the processor of `{source}` cannot be read: {first_line(error)}") from error


def without_videos(processor_class: Any) -> Any:
    """A processor class that has no part for videos, which transformers makes with torchvision alone.

    Images need Pillow only, so a model takes them where torchvision is not installed.
    """
    if "video_processor" not in processor_class.get_attributes():
        return processor_class

    def get_attributes(cls: Any) -> list[str]:
        return [name for name in processor_class.get_attributes() if name != "video_processor"]

    return type(processor_class.__name__, (processor_class,), {"get_attributes": classmethod(get_attributes)})
