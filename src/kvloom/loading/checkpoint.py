"""From a hub id or a folder to a model and its tokenizer, with one clear error for each thing that can be wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from kvloom.errors import (
    CorruptCheckpoint,
    InvalidRequest,
    ModelNotFound,
    TokenizerMismatch,
    UnsupportedModel,
    first_line,
)
from kvloom.loading.processor import read_processor
from kvloom.models.hosted.weightless import auto_class
from kvloom.models.images.vision import takes_images
from kvloom.notices import warn

TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.tiktoken", "spiece.model", "sentencepiece*")

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

DTYPES = tuple(SAFETENSORS_DTYPES.values())

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"


def load_pretrained(
    name: str | os.PathLike[str] | None, *, dtype: torch.dtype | str | None, device: torch.device
) -> tuple[PreTrainedModel, Any, Any]:
    """The model, in evaluation mode on `device`, its tokenizer and its processor (None if the checkpoint has none).

    Args:
        name: a folder or a hub id; None for the bundled demonstration model.
        dtype: by default that of the checkpoint.

    Raises:
        ModelNotFound, CorruptCheckpoint, UnsupportedModel, TokenizerMismatch.
    """
    source = _locate(name)
    if isinstance(source, Path):
        _check_files(source)
    config = _read_config(source)
    model = _read_weights(source, config, read_dtype(dtype)).to(device).eval()
    processor = read_processor(source, config) if takes_images(model) else None
    tokenizer = _read_tokenizer(source) if processor is None else processor.tokenizer
    if tokenizer is not None:
        check_tokenizer(tokenizer, _embedding_rows(model))
    return model, tokenizer, processor


def load_config(name: str | os.PathLike[str] | None) -> tuple[Any, torch.dtype]:
    """A checkpoint's config, and the dtype that it loads in by default. Weights are not read.

    Raises:
        ModelNotFound, CorruptCheckpoint, UnsupportedModel.
    """
    source = _locate(name)
    if isinstance(source, Path):
        _check_files(source)
    config = _read_config(source)
    dtype = getattr(config, "dtype", None) or _dtype_of_weights(source)
    return config, dtype if isinstance(dtype, torch.dtype) else torch.float32


def _dtype_of_weights(source: Path | str) -> torch.dtype | None:
    """Where a config names no dtype, the first weight's decides; None if there are no weights to look at."""
    for weights in sorted(source.glob("*.safetensors")) if isinstance(source, Path) else ():
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (not a dict)
                name = str(file.get_slice(key).get_dtype())
                if name in SAFETENSORS_DTYPES:
                    return SAFETENSORS_DTYPES[name]
    return None


def read_dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    """A torch dtype from its name; "auto", the checkpoint's, for None."""
    if dtype is None or dtype == "auto":
        return "auto"
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if found not in DTYPES:
        raise InvalidRequest(
            f"`dtype={dtype}` is not a floating-point dtype that models run in. Pass float64, float32, bfloat16 or "
            "float16."
        )
    return found


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that can produce ids beyond the model's embeddings."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise TokenizerMismatch(
            f"the tokenizer has ids up to {largest}, but the model's vocabulary ends at {vocab_size - 1}. "
            "Use the tokenizer that belongs to the model."
        )


def _locate(name: str | os.PathLike[str] | None) -> Path | str:
    """A folder, or a hub id."""
    if name is None:
        return DEMO_MODEL
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise InvalidRequest(f"a model is named by a folder or a hub id; got {name!r}.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    text = os.fspath(name)
    if folder.exists():
        raise ModelNotFound(f"`{text}` is a file. Pass the model folder, which has a config.json beside its weights.")
    looks_like_a_path = isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if looks_like_a_path:
        raise ModelNotFound(f"there is no model folder `{text}`. Pass a folder that has a config.json, or a hub id.")
    return text


def _check_files(folder: Path) -> None:
    """Look at the files before transformers does, whose errors speak of other things."""
    config = folder / "config.json"
    if not config.is_file():
        raise ModelNotFound(
            f"`{folder}` holds no config.json, so it is not a model folder. Pass the folder that has it."
        )
    for file in (config, folder / "generation_config.json"):
        if file.is_file():
            _check_json(file)
    for weights in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(weights, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CorruptCheckpoint(f"`{weights}` is damaged or incomplete: {first_line(error)}") from error


def _check_json(file: Path) -> None:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CorruptCheckpoint(f"`{file}` cannot be read: {first_line(error)}") from error
    if not isinstance(fields, dict):
        raise CorruptCheckpoint(f"`{file}` holds a JSON {type(fields).__name__}, not an object with fields.")


def _read_config(source: Path | str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelNotFound(
            f"`{source}` is neither a folder nor a model that can be fetched from the hub: {first_line(error)}"
        ) from error
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UnsupportedModel(f"the config of `{source}` cannot be used: {first_line(error)}") from error


def _read_weights(source: Path | str, config: Any, dtype: torch.dtype | str) -> PreTrainedModel:
    try:
        with _quiet(local=isinstance(source, Path)):
            model, report = auto_class(config).from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise CorruptCheckpoint(f"the weights of `{source}` cannot be read: {first_line(error)}") from error
    except OSError as error:
        raise CorruptCheckpoint(f"`{source}` holds no complete set of weights: {first_line(error)}") from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"`{source}` is not a language model that can be decoded: {first_line(error)}"
        ) from error
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise CorruptCheckpoint(
            f"`{name}` in the checkpoint `{source}` has the shape {list(found)}, but its config says {list(expected)}."
        )
    if unused := sorted(report["unexpected_keys"]):
        warn(
            f"the checkpoint `{source}` holds {len(unused)} weights that its config has no place for, "
            f"`{unused[0]}` first."
        )
    if missing := sorted(report["missing_keys"]):
        raise CorruptCheckpoint(
            f"the checkpoint `{source}` lacks {len(missing)} of the model's weights, `{missing[0]}` first; "
            "transformers would have made them up. Fetch it again, or save it whole."
        )
    return model


@contextmanager
def _quiet(*, local: bool) -> Iterator[None]:
    """Without transformers' load report, and for local files without its progress bar: we report ourselves."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if local:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _read_tokenizer(source: Path | str) -> Any:
    """The checkpoint's tokenizer; None if it has no tokenizer files."""
    if isinstance(source, Path) and not any(any(source.glob(name)) for name in TOKENIZER_FILES):
        # transformers would make one up, with an empty vocabulary.
        return None
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise CorruptCheckpoint(f"the tokenizer of `{source}` cannot be read: {first_line(error)}") from error


def _embedding_rows(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
