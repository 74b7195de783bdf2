"""`kvloom generate`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from kvloom.cli.generate import show
from kvloom.cli.generate.job import DEFAULT_NEW_TOKENS, prepare
from kvloom.cli.group import Command, in_words_of_the_command
from kvloom.cli.options.params import (
    imply_sampling,
    load_model,
    model_name,
    model_options,
    model_settings,
    option,
    quiet_option,
    sampling_options,
)
from kvloom.cli.options.pictures import shown_blocks, with_text
from kvloom.cli.options.prompts import as_text, read_ids, read_prompt
from kvloom.cli.options.retention import read_retention, retention_options
from kvloom.cli.options.values import Alternatives, Count, TokenId
from kvloom.cli.output.as_json import print_json
from kvloom.cli.output.terminal import note

COUNT = Count(min=1)


@click.command(cls=Command, short_help="Continue a prompt: stream, sample, or search.")
@click.argument("prompt", required=False)
@option(
    "--token-ids",
    is_flag=True,
    section="Input and output",
    help="The prompt is token ids, with commas or spaces between; so is the output.",
)
@option(
    "--image",
    "images",
    metavar="PATH",
    multiple=True,
    section="Input and output",
    help="Show an image-text model this image, before PROMPT as a message. May be repeated.",
)
@option(
    "--frames",
    metavar="FOLDER",
    section="Input and output",
    help="Show the images of a folder, in the order of their names, such as the frames of a video.",
)
@option(
    "--video",
    "videos",
    metavar="PATH",
    multiple=True,
    section="Input and output",
    help="Show this video, which needs torchvision and a library that decodes it; --frames needs neither.",
)
@option(
    "--json",
    "as_json",
    is_flag=True,
    section="Input and output",
    help="Print one JSON object: text, tokens, log-probabilities, usage, settings.",
)
@option(
    "--logprobs",
    "top_logprobs",
    metavar="[K]",
    type=Alternatives(),
    is_flag=False,
    flag_value=0,
    section="Input and output",
    help="Show the probability of each token, and the K likeliest ones, on stderr.",
)
@quiet_option("Input and output", no="progress, no notes, no summary")
@option(
    "--max-new-tokens",
    metavar="N",
    type=COUNT,
    section="Length",
    help=f"The most tokens to write.  [default: {DEFAULT_NEW_TOKENS}, or what the model's context leaves]",
)
@option("--min-new-tokens", metavar="N", type=Count(min=0), section="Length", help="No EOS before these.")
@option(
    "--stop",
    "stop_strings",
    metavar="TEXT",
    multiple=True,
    section="Length",
    help="Stop when this has been written. May be repeated.",
)
@option(
    "--eos-token-id",
    metavar="ID",
    type=TokenId(),
    multiple=True,
    section="Length",
    help="Stop at this token; `none`: at no token. May be repeated.  [default: the model's]",
)
@sampling_options
@option("--num-beams", metavar="N", type=COUNT, section="Beam search", help="Search with N beams.")
@option(
    "--num-return-sequences",
    metavar="N",
    type=COUNT,
    section="Beam search",
    help="Show the N best hypotheses; without beams, N samples.",
)
@option(
    "--length-penalty",
    metavar="X",
    type=float,
    section="Beam search",
    help="Scores are divided by length ^ X, so X above 0 favours long hypotheses.",
)
@option(
    "--early-stopping",
    metavar="WHEN",
    type=click.Choice(["false", "true", "never"]),
    section="Beam search",
    help="Stop when there are N hypotheses (true), when better ones are unlikely (false) or impossible (never).",
)
@retention_options
@model_options
@option(
    "--no-cache",
    is_flag=True,
    section="Model",
    help="Compute everything anew for each token.",
)
@click.pass_context
def generate(
    ctx: click.Context,
    /,
    prompt: str | None,
    token_ids: bool,
    images: tuple[str, ...],
    frames: str | None,
    videos: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Continue PROMPT, or decode from it with an encoder-decoder model.

    PROMPT is text. `-` reads it from standard input, as does a pipe if there is no PROMPT; one newline at its
    end is dropped. With an image it is a message, written as the model's chat template has it. Standard output
    holds the generated text and nothing else. It is streamed, unless there are beams or several sequences.

    \b
    kvloom generate "Once upon a time" --temperature 0.8 --seed 7
    kvloom generate "Once upon a time" --num-beams 4 --num-return-sequences 2
    kvloom generate --model Qwen/Qwen2.5-VL-3B-Instruct --image photo.png "What is this?"
    echo "Once upon a time" | kvloom generate --json | jq -r '.generations[0].text'
    """
    text = read_prompt(prompt, example='kvloom generate "Once upon a time"')
    settings = model_settings(options)
    retention = read_retention(options)
    if retention is not None and options["no_cache"]:
        raise click.UsageError("`--retention` and `--no-cache` contradict each other. Leave one out.")
    if settings["codec"] != "native" and options["no_cache"]:
        raise click.UsageError("`--codec` and `--no-cache` contradict each other. Leave one out.")
    given = _given(options)
    if token_ids and (images or frames or videos):
        flag = "--image" if images else "--frames" if frames else "--video"
        raise click.UsageError(f"`{flag}` goes with a text prompt, and `--token-ids` has none. Leave one out.")
    asked = read_ids(text) if token_ids else with_text(shown_blocks(images, frames=frames, videos=videos), text)
    with _notes(ctx, quiet):
        lm = load_model(quiet=quiet, retention=retention, **settings)
        shown = None if token_ids else text
        job = prepare(lm, asked, given, text=shown, model=model_name(settings["model"]), quiet=quiet)
        results = job.stream() if job.streams and not as_json else job.decode()
        if as_json:
            print_json(job.to_dict(results))
        elif not job.streams:
            job.print_sequences(results)
        if "top_logprobs" in given and not as_json:
            sys.stdout.flush()
            show.print_logprobs(results, tokenizer=lm.tokenizer, prompt_ids=job.continued_ids)
        if not quiet:
            sys.stdout.flush()
            job.print_summary(results)


# ---- what was asked for ------------------------------------------------------------------------------------------


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were set, in the library's words."""
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if given.pop("no_cache"):
        given["use_cache"] = False
    if "eos_token_id" in given:
        known = [token for token in given["eos_token_id"] if token is not None]
        given["eos_token_id"] = known or None
    if "stop_strings" in given:
        given["stop_strings"] = [as_text(own, what="`--stop`") for own in given["stop_strings"]]
    if "early_stopping" in given:
        given["early_stopping"] = {"true": True, "false": False}.get(given["early_stopping"], "never")
    imply_sampling(given)
    return given


@contextmanager
def _notes(ctx: click.Context, quiet: bool) -> Iterator[None]:
    """Warnings of ours become notes; those of other libraries are not for users of a command."""

    said: set[str] = set()

    def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        ours = category.__module__.startswith("kvloom.")
        if ours and not quiet and str(message) not in said:
            said.add(str(message))
            note(in_words_of_the_command(str(message), ctx))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning)
        warnings.showwarning = show_warning
        yield
