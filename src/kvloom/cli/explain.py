"""`kvloom explain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvloom.cli.group import Command
from kvloom.cli.options.params import load_model, model_name, model_options, option, plot_option, quiet_option
from kvloom.cli.options.prompts import as_text
from kvloom.cli.options.values import Count
from kvloom.cli.output.figure import refuse_unless_plottable
from kvloom.cli.output.terminal import note
from kvloom.errors import InvalidRequest

if TYPE_CHECKING:
    from kvloom.explain import Observation

INDEX = Count(min=0)


@click.command(cls=Command, short_help="Show on a model why keys and values are cached.")
@click.argument("text")
@option(
    "--html",
    "page",
    metavar="FILE.html",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("explain.html"),
    show_default=True,
    section="Output",
    help="Write the page here.",
)
@plot_option("Also draw a picture.")
@option(
    "--lang",
    type=click.Choice(["en", "zh"]),
    default="en",
    show_default=True,
    section="Output",
    help="Language of the captions.",
)
@quiet_option("Output", no="progress, no summary")
@option("--layer", metavar="N", type=INDEX, section="Attention", help="Counted from 0.  [default: see --head]")
@option(
    "--head",
    metavar="N",
    type=INDEX,
    section="Attention",
    help="Counted from 0.  [default: the head whose attention is spread most widely]",
)
@model_options
def explain(
    text: str,
    page: Path,
    plot: Path | None,
    lang: str,
    quiet: bool,
    layer: int | None,
    head: int | None,
    **settings: Any,
) -> None:
    """Show on a model's own attention why keys and values are cached and queries are not.

    TEXT is a sentence of 2 to 40 tokens. The page shows what each step computes and what it reuses, and what adding
    a token changes, with the causal mask and without it.

    \b
    kvloom explain "The old king had three sons"
    kvloom explain "The old king had three sons" --lang zh --plot attention.png
    """
    if not page.parent.is_dir():
        raise InvalidRequest(f"`--html {page}`: there is no folder `{page.parent}`. Make it, or name another.")
    if plot is not None:
        refuse_unless_plottable(plot)
    lm = load_model(quiet=quiet, **settings)
    from kvloom.explain import observe, write_page
    from kvloom.explain.captions import LANGUAGES

    seen = observe(lm, as_text(text, what="the text"), layer=layer, head=head, name=model_name(settings["model"]))
    if plot is not None:
        from kvloom.explain.picture import draw

        draw(seen, LANGUAGES[lang], plot)
    write_page(seen, LANGUAGES[lang], page)
    for file in (page, plot):
        if file is not None:
            click.echo(file)
    if not quiet:
        _tell(seen)


def _tell(seen: Observation) -> None:
    """The page in two lines."""
    mask, none = seen.with_mask.values, seen.without_mask.values
    note(
        f"{len(seen.tokens)} tokens, layer {seen.layer}, head {seen.head}. Adding the last token changed the earlier "
        f"tokens' values by {mask:.1%} with the causal mask, and by {none:.0%} without it."
    )
