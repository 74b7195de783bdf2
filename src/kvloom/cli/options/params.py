"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvloom.cli.group import Option
from kvloom.cli.options.values import ByteSize, Count
from kvloom.cli.output.terminal import is_terminal, waiting

if TYPE_CHECKING:
    from kvloom.language_model.model import LanguageModel

Function = TypeVar("Function", bound=Callable[..., Any])

option = partial(click.option, cls=Option)

MODEL_SETTINGS = ("model", "dtype", "device", "threads", "budget_bytes", "block_tokens", "codec")
IMPLY_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def decorated(function: Function, options: Sequence[Callable[[Function], Function]]) -> Function:
    """A command with these options, which its help lists in this order."""
    for decorate in reversed(options):
        function = decorate(function)
    return function


def json_option(section: str) -> Callable[[Function], Function]:
    """Print for programs, not for people."""
    return option("--json", "as_json", is_flag=True, section=section, help="Print one JSON object.")


def quiet_option(section: str, *, no: str) -> Callable[[Function], Function]:
    """Nothing but the result; `no` says what is left out."""
    return option("-q", "--quiet", is_flag=True, section=section, help=f"No {no}.")


def plot_option(what: str) -> Callable[[Function], Function]:
    """A picture of the result; `what` says what it shows."""
    return option(
        "--plot",
        metavar="FILE.png",
        type=click.Path(dir_okay=False, path_type=Path),
        section="Output",
        help=f"{what} Needs matplotlib.",
    )


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
            help="float64, float32, bfloat16 or float16.  [default: the checkpoint's]",
        ),
        option("--device", metavar="DEVICE", section="Model", default="cpu", show_default=True, help="cpu or cuda."),
        option(
            "--threads",
            metavar="N",
            type=Count(min=1),
            section="Model",
            help="Of PyTorch.  [default: its own choice]",
        ),
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
            type=Count(min=1),
            default=16,
            show_default=True,
            section="Model",
            help="Tokens a block.",
        ),
        codec_option("Model"),
    ]
    return decorated(function, options)


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
        option(
            "--no-repeat-ngram-size",
            metavar="N",
            type=Count(min=0),
            section="Sampling",
            help="No N tokens in a row occur twice; 0: they may. Needs no sampling.",
        ),
    ]
    return decorated(function, options)


def model_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of `model_options` out of `options`: what `load_model` is given."""
    return {name: options.pop(name) for name in MODEL_SETTINGS}


def imply_sampling(given: dict[str, Any]) -> None:
    """Whoever sets a temperature wants to sample; add `do_sample` to the options given, or refuse a contradiction."""
    implied = [name for name in IMPLY_SAMPLING if name in given]
    if implied and given.get("do_sample") is False:
        flag = implied[0].replace("_", "-")
        raise click.UsageError(f"`--{flag}` and `--no-do-sample` contradict each other. Leave one out.")
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
