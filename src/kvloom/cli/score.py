"""`kvloom score`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.group import Command
from kvloom.cli.options.params import json_option, load_model, model_name, model_options, option, quiet_option
from kvloom.cli.options.prompts import as_text, read_ids, read_prompt
from kvloom.cli.output.as_json import print_json
from kvloom.cli.output.terminal import stderr_console, stdout_console, waiting
from kvloom.errors import InvalidRequest
from kvloom.units import counted, dtype_name

if TYPE_CHECKING:
    from kvloom.language_model.model import LanguageModel
    from kvloom.language_model.scoring import Score, Scores


@click.command(cls=Command, short_help="Rank continuations of a prompt.")
@click.argument("prompt", required=False)
@option(
    "-c",
    "--continuation",
    "continuations",
    metavar="TEXT",
    multiple=True,
    section="Input and output",
    help="Score this behind the prompt; mostly it begins with a space. To be repeated.",
)
@option(
    "--file",
    "file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    section="Input and output",
    help="Score each line of a file, without its newline.",
)
@option(
    "--token-ids",
    is_flag=True,
    section="Input and output",
    help="The prompt and the continuations are token ids, with commas or spaces between.",
)
@json_option("Input and output")
@quiet_option("Input and output", no="progress, no summary")
@option(
    "--normalize",
    metavar="HOW",
    type=click.Choice(["none", "tokens", "bytes"]),
    default="none",
    show_default=True,
    section="Ranking",
    help="Rank by the log-probability (none), or by that divided by tokens or bytes, which is fair to long ones.",
)
@model_options
@option(
    "--no-cache",
    is_flag=True,
    section="Model",
    help="Compute prompt and continuation anew for each.",
)
def score(
    prompt: str | None,
    continuations: tuple[str, ...],
    file: Path | None,
    token_ids: bool,
    as_json: bool,
    quiet: bool,
    normalize: Any,
    no_cache: bool,
    **settings: Any,
) -> None:
    """Rank continuations of PROMPT by their probability, best first.

    The prompt is computed once for all of them. `-` reads it from standard input, as does a pipe if there is no
    PROMPT; one newline at its end is dropped.

    \b
    kvloom score "Once upon a time, there was a little" -c " girl" -c " boy" -c " elephant"
    kvloom score "The weather today is" --file labels.txt --normalize bytes --json
    """
    text = read_prompt(prompt, example='kvloom score "Once upon a" -c " time" -c " hill"')
    given = [as_text(own, what="a continuation") for own in continuations]
    candidates = [*given, *(_lines(file) if file is not None else [])]
    if not candidates:
        raise click.UsageError("nothing to score. Pass `--continuation TEXT`, more than once, or `--file FILE`.")
    ids = read_ids(text) if token_ids else None
    candidate_ids = [read_ids(own, what="a continuation") for own in candidates] if token_ids else None
    lm = load_model(quiet=quiet, **settings)
    model = model_name(settings["model"])
    if ids is None and lm.tokenizer is None:
        raise InvalidRequest(f"{model} has no tokenizer. Pass token ids with --token-ids.")
    with waiting(f"[dim]scoring {len(candidates)} continuations ...", quiet=quiet):
        scores = lm.score(
            candidates if candidate_ids is None else candidate_ids,
            prompt=text if ids is None else ids,
            normalize=normalize,
            use_cache=not no_cache,
        )
    ranking = sorted(range(len(scores)), key=lambda index: -scores[index].score)
    if as_json:
        print_json(_to_dict(lm, scores, ranking, model=model, prompt=text, normalize=normalize))
        return
    stdout_console().print(_table([scores[index] for index in ranking], as_ids=token_ids))
    if not quiet:
        sys.stdout.flush()
        _print_summary(scores, model)


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"`{file}` is not UTF-8 text: {error}. Convert it.") from error
    lines = text.removesuffix("\n").split("\n")
    empty = next((number for number, line in enumerate(lines, start=1) if not line), None)
    if empty is not None:
        raise InvalidRequest(
            f"line {empty} of `{file}` is empty, and a continuation has at least one character. Take the line out."
        )
    return lines


def _table(ranked: list[Score], *, as_ids: bool) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    table.add_column("#", justify="right")
    table.add_column("continuation", overflow="fold")
    for heading in ("p", "logprob", "per token", "per byte", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, own in enumerate(ranked, start=1):
        shown = " ".join(map(str, own.token_ids)) if as_ids else repr(own.text)
        per_byte = f"{own.logprob / own.bytes:.4f}" if own.bytes else "-"
        cells = [str(place), shown, f"{100 * math.exp(own.logprob):.3g}%"]
        cells += [f"{own.logprob:.4f}", f"{own.mean_logprob:.4f}", per_byte, str(len(own.token_ids))]
        table.add_row(*(Text(cell) for cell in cells), style="bold" if place == 1 else None)
    return table


def _print_summary(scores: Scores, model: str) -> None:
    usage = scores.usage
    stderr_console().print(
        f"[dim]{model}: a prompt of {counted(usage.prompt_tokens, 'token')}, {usage.cached_prompt_tokens:,} found in "
        f"the cache, {usage.computed_prompt_tokens:,} computed; {counted(len(scores), 'continuation')} of "
        f"{counted(usage.new_tokens, 'token')}; "
        f"{usage.seconds:.2f} s",
        soft_wrap=True,
    )


def _to_dict(
    lm: LanguageModel, scores: Scores, ranking: list[int], *, model: str, prompt: str, normalize: str
) -> dict[str, Any]:
    from dataclasses import asdict

    from kvloom import __version__

    return {
        "kvloom": __version__,
        "model": model,
        "dtype": dtype_name(lm.binding.dtype),
        "device": str(lm.binding.device),
        "prompt": prompt,
        "normalize": normalize,
        "scores": [
            {
                "index": index,
                "text": scores[index].text,
                "token_ids": scores[index].token_ids,
                "score": scores[index].score,
                "logprob": scores[index].logprob,
                "mean_logprob": scores[index].mean_logprob,
                "token_logprobs": scores[index].token_logprobs,
                "bytes": scores[index].bytes,
            }
            for index in ranking
        ],
        "usage": asdict(scores.usage),
    }
