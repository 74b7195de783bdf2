"""Values of options, and the options that every command has."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvloom.cli.group import Option
from kvloom.cli.terminal import is_terminal, waiting

if TYPE_CHECKING:
    from kvloom.model import LanguageModel

    IntType = click.ParamType[int]
    OptionalIntType = click.ParamType[int | None]
else:
    # Generic since click 8.4 only.
    IntType = OptionalIntType = click.ParamType

Function = TypeVar("Function", bound=Callable[..., Any])

option = partial(click.option, cls=Option)

IMPLY_SAMPLING = ("temperature", "top_k", "top_p", "min_p")

_SCALE = {"": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _SCALE |= {_letter: 1024**_power, f"{_letter}I": 1024**_power, f"{_letter}IB": 1024**_power}
    _SCALE |= {f"{_letter}B": 1000**_power}


class ByteSize(IntType):
    """A number of bytes: 65536, 512MiB, 2GB. MiB and M count in 1,024s, MB in 1,000s."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes that `value` says."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        unit = match[2].upper().removesuffix("YTES").removesuffix("YTE") if match else ""
        if unit == "B":
            unit = ""
        if match is None or unit not in _SCALE or (size := int(float(match[1]) * _SCALE[unit])) < 1:
            self.fail(f"{value!r} is not a size such as 512MiB, 2GiB or 65536.", param, ctx)
        return size


class TokenId(OptionalIntType):
    """A token id, or "none"."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The id, None for "none"."""
        if isinstance(value, int) or value is None or value.lower() == "none":
            return value if isinstance(value, int) else None
        if not value.isdecimal():
            self.fail(f"{value!r} is neither a token id nor `none`.", param, ctx)
        return int(value)


class Alternatives(IntType):
    """How many alternatives to show; an option whose value may be left out swallows what stands behind it."""

    name = "k"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        if isinstance(value, int):
            return value
        if not value.isdecimal():
            self.fail(f"{value!r} is not a number. Without one, write the option after the prompt.", param, ctx)
        return int(value)


def codec_option(section: str) -> Callable[[Function], Function]:
    """How keys and values are kept."""
    return option(
        "--codec",
        metavar="NAME",
        default="native",
        show_default=True,
        section=section,
        help="How keys and values are kept: native, or int8, which halves the bytes of full blocks and loses a little.",
    )


def model_options(function: Function) -> Function:
    """What model to load, and how."""
    options = [
        option(
            "--model",
            metavar="NAME",
            section="Model",
            help="A folder, or an id on the Hugging Face hub.  [default: the bundled demonstration model]",
        ),
        option(
            "--dtype",
            metavar="DTYPE",
            section="Model",
            help="float32, bfloat16 or float16.  [default: the checkpoint's]",
        ),
        option("--device", metavar="DEVICE", section="Model", default="cpu", show_default=True, help="cpu or cuda."),
        option("--threads", metavar="N", type=click.IntRange(min=1), section="Model", help="Threads of PyTorch."),
        option(
            "--budget",
            "budget_bytes",
            metavar="SIZE",
            type=ByteSize(),
            section="Model",
            help="The most that the cache may take, such as 512MiB.  "
            "[default: eight sequences of the model's context, at most a quarter of the free memory]",
        ),
        option(
            "--block-tokens",
            metavar="N",
            type=click.IntRange(min=1),
            default=16,
            show_default=True,
            section="Model",
            help="Tokens a block.",
        ),
        codec_option("Model"),
    ]
    for decorate in reversed(options):
        function = decorate(function)
    return function


def sampling_options(function: Function) -> Function:
    """How tokens are chosen, without beams."""
    options = [
        option(
            "--do-sample/--no-do-sample",
            default=None,
            section="Sampling",
            help="Draw tokens, or take the likeliest.  [default: as the model's generation config says]",
        ),
        option(
            "--temperature",
            metavar="X",
            type=float,
            section="Sampling",
            help="Below 1 sharpens, above 1 flattens. This and the next three imply --do-sample.",
        ),
        option(
            "--top-k", metavar="N", type=int, section="Sampling", help="Draw from the N likeliest tokens; 0: from all."
        ),
        option(
            "--top-p",
            metavar="P",
            type=float,
            section="Sampling",
            help="Draw from the likeliest tokens that make up P.",
        ),
        option(
            "--min-p",
            metavar="P",
            type=float,
            section="Sampling",
            help="Draw from tokens at least P times as likely as the likeliest.",
        ),
        option(
            "--seed",
            metavar="N",
            type=int,
            section="Sampling",
            help="The same seed gives the same text.  [default: a new one; the summary shows it]",
        ),
        option(
            "--repetition-penalty",
            metavar="X",
            type=float,
            section="Sampling",
            help="Above 1: tokens that occurred become less likely. Needs no sampling.",
        ),
        option(
            "--presence-penalty",
            metavar="X",
            type=float,
            section="Sampling",
            help="Subtracted from the logits of tokens written before. Needs no sampling.",
        ),
    ]
    for decorate in reversed(options):
        function = decorate(function)
    return function


def imply_sampling(given: dict[str, Any]) -> None:
    """Whoever sets a temperature wants to sample; add `do_sample` to the options given, or refuse a contradiction."""
    implied = [name for name in IMPLY_SAMPLING if name in given]
    if implied and given.get("do_sample") is False:
        flag = implied[0].replace("_", "-")
        raise click.UsageError(f"`--{flag}` and `--no-do-sample` contradict each other. Leave one away.")
    if implied:
        given["do_sample"] = True


def load_model(*, quiet: bool, **settings: Any) -> LanguageModel:
    """Import torch, which takes seconds, and load the model."""
    with waiting(f"[dim]loading {model_name(settings['model'])} ...", quiet=quiet):
        silence_libraries(quiet)
        from kvloom.attaching import load

        return load(**settings)


def model_name(model: str | None) -> str:
    """What to call a model."""
    return model or "demonstration model"


def silence_libraries(quiet: bool) -> None:
    """Their advice is for programmers; ours is in the errors. A download keeps its bar, in a terminal."""
    import os
    import sys

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if quiet or not is_terminal(sys.stderr):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
