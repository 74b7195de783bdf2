"""`kvloom bench`: one command, two measurements, speed and quality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kvloom import __version__
from kvloom.cli.bench import quality_plot, speed_plot
from kvloom.cli.bench.quality import print_quality
from kvloom.cli.bench.speed import print_speed
from kvloom.cli.group import Command
from kvloom.cli.options.params import (
    json_option,
    load_model,
    model_name,
    model_options,
    option,
    plot_option,
    quiet_option,
)
from kvloom.cli.options.values import Count
from kvloom.cli.output.as_json import print_json
from kvloom.cli.output.figure import refuse_unless_plottable
from kvloom.cli.output.terminal import counting_runs
from kvloom.errors import InvalidRequest

POSITIVE = Count(min=1)
SEVERAL = Count(min=2)
SPEED, QUALITY = "Speed", "Quality"


@click.command(cls=Command, short_help="Measure a model on this machine: speed, or quality.")
@option(
    "--quality",
    is_flag=True,
    section="Work",
    help="Measure what retention policies and codecs cost, instead of speed.",
)
@option(
    "--prompt-tokens",
    metavar="N",
    type=POSITIVE,
    section="Work",
    help="Length of the prompt.  [default: 512, or half of a shorter context; with --quality 768, or three quarters]",
)
@option(
    "--max-new-tokens",
    "new_tokens",
    metavar="N",
    type=SEVERAL,
    section="Work",
    help="Tokens of each run.  [default: 24; with --quality 32]",
)
@option(
    "--num-beams", metavar="N", type=SEVERAL, default=4, show_default=True, section=SPEED, help="Beams of the search."
)
@option("--batch", metavar="N", type=SEVERAL, default=4, show_default=True, section=SPEED, help="Prompts of the batch.")
@option(
    "--longest",
    metavar="N",
    type=Count(min=32),
    section=SPEED,
    help="Length up to which one token's cost is followed.  [default: 1,024, or what the context leaves]",
)
@option(
    "--runs",
    metavar="N",
    type=POSITIVE,
    default=3,
    show_default=True,
    section=SPEED,
    help="Medians are over so many runs.",
)
@option(
    "--text",
    metavar="FILE",
    type=click.Path(path_type=Path),
    section=QUALITY,
    help="Text that the model was not trained on.  [default: a tale that comes with KVLoom]",
)
@option(
    "--retention",
    "policies",
    metavar="POLICY",
    multiple=True,
    section=QUALITY,
    help="sink-window, heavy-hitters, last-query, compressed-prompt, top-blocks, or a control: random, recent, "
    "every-kth; may be repeated.  [default: all]",
)
@option(
    "--keep",
    "keeps",
    metavar="SHARE",
    type=float,
    multiple=True,
    section=QUALITY,
    help="Of the prompt's tokens, how many may stay; may be repeated.  [default: 0.5, 0.25, 0.125]",
)
@option(
    "--passages",
    metavar="N",
    type=POSITIVE,
    default=4,
    show_default=True,
    section=QUALITY,
    help="Passages of the text at most.",
)
@option(
    "--recall-texts",
    metavar="N",
    type=POSITIVE,
    default=8,
    show_default=True,
    section=QUALITY,
    help="Texts with two planted facts each.",
)
@option(
    "--seed",
    metavar="N",
    type=Count(min=0),
    default=0,
    show_default=True,
    section=QUALITY,
    help="Of the facts, and of random choices.",
)
@json_option("Output")
@plot_option(
    "Draw it: one token's cost against the length of the sequence; with --quality, what is lost and recalled "
    "against what is kept."
)
@quiet_option("Output", no="progress")
@model_options
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    quality: bool,
    prompt_tokens: int | None,
    new_tokens: int | None,
    num_beams: int,
    batch: int,
    longest: int | None,
    runs: int,
    text: Path | None,
    policies: tuple[str, ...],
    keeps: tuple[float, ...],
    passages: int,
    recall_texts: int,
    seed: int,
    as_json: bool,
    plot: Path | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Measure a model on this machine: its speed, or what is lost when less is kept.

    Speed is prefill, greedy decoding, beams and a batch, with and without the cache, on random tokens. Let the machine
    be idle: another busy process changes timings tenfold.

    Quality is what retention policies and codecs change on held-out text, and whether facts planted in a text can still
    be recalled, beside the full cache and beside controls that know nothing.

    \b
    kvloom bench
    kvloom bench --model Qwen/Qwen2.5-0.5B --prompt-tokens 2048 --num-beams 8 --plot growth.png
    kvloom bench --quality --plot quality.png
    kvloom bench --quality --retention heavy-hitters --retention random --keep 0.25
    """
    _refuse_options_of(SPEED if quality else QUALITY, ctx)
    if plot is not None:
        refuse_unless_plottable(plot)
    lm = load_model(quiet=quiet, **settings)
    work: dict[str, Any] = {"new_tokens": new_tokens}
    if quality:
        work |= {"prompt_tokens": prompt_tokens, "text": text, "policies": policies, "keeps": keeps}
        work |= {"passages": passages, "recall_texts": recall_texts, "seed": seed}
        if _is_given("codec", ctx):
            work["codecs"] = (settings["codec"],)
    else:
        work |= {"prompt_tokens": prompt_tokens, "longest": longest}
        work |= {"num_beams": num_beams, "batch": batch, "runs": runs}
    # What was left open is for the measurement to choose.
    chosen = {name: own for name, own in work.items() if own not in (None, ())}
    measurement = _quality() if quality else _speed()
    with counting_runs(measurement.name, quiet=quiet) as on_progress:
        report = measurement.measure(lm, on_progress=on_progress, **chosen)
    model = model_name(settings["model"])
    if plot is not None:
        measurement.draw(report, model, plot)
    if as_json:
        print_json({"kvloom": __version__, "model": model, **report.to_dict()})
    else:
        measurement.show(report, model)


@dataclass(frozen=True)
class _Measurement:
    """One of the two: by what it is measured, drawn to a file, and printed."""

    name: str
    measure: Callable[..., Any]
    draw: Callable[[Any, str, Path], None]
    show: Callable[[Any, str], None]


def _speed() -> _Measurement:
    from kvloom.bench import measure_speed

    return _Measurement("bench", measure_speed, speed_plot.draw, print_speed)


def _quality() -> _Measurement:
    from kvloom.bench.quality import measure_quality

    return _Measurement("quality", measure_quality, quality_plot.draw, print_quality)


def _refuse_options_of(section: str, ctx: click.Context) -> None:
    """An option of the other measurement would do nothing."""
    for parameter in ctx.command.params:
        if getattr(parameter, "section", None) == section and _is_given(str(parameter.name), ctx):
            remedy = "Leave out `--quality`, or this option." if section == SPEED else "Add `--quality`."
            raise InvalidRequest(f"`{parameter.opts[-1]}` is for measuring {section.lower()}. {remedy}")


def _is_given(name: str, ctx: click.Context) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
