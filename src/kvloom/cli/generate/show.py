"""How results look: the text on stdout, everything else on stderr."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from kvloom import __version__
from kvloom.cli.output.terminal import is_terminal, stderr_console
from kvloom.units import counted, readable_bytes

TOKEN_COLUMNS = 48
"""About as wide as a table of tokens without their alternatives."""

if TYPE_CHECKING:
    from kvloom.engine import Usage
    from kvloom.language_model.results import Generation


def print_prompt(prompt: str) -> None:
    """The prompt, dim, before the text that continues it: on stderr, as it is not output."""
    click.echo(click.style(prompt, dim=True), nl=False, err=True)


def print_piece(text: str) -> None:
    """Some more output, at once."""
    click.echo(text, nl=False)


def print_sequences(generations: Sequence[Generation], *, as_ids: bool) -> None:
    """The text of one sequence and nothing else; several under numbered headings."""
    texts = [" ".join(map(str, own.token_ids)) if as_ids else own.text for own in generations]
    if len(texts) == 1:
        print_piece(texts[0])
        finish_line(texts[0])
        return
    for number, (own, text) in enumerate(zip(generations, texts, strict=True), start=1):
        score = "" if own.score is None else f" score {own.score:.4f}"
        click.echo(click.style(f"[{number}]{score}", fg="cyan"))
        click.echo(text.removesuffix("\n"))
        if number < len(texts):
            click.echo()


def finish_line(text: str) -> None:
    """In a terminal, output ends with a newline; in a file or a pipe it is exactly the text."""
    if is_terminal(sys.stdout) and not text.endswith("\n"):
        click.echo()


def print_summary(usage: Usage, generations: Sequence[Generation], **facts: Any) -> None:
    """What it cost, in a few aligned lines."""
    from rich.text import Text

    console = stderr_console()
    console.print()
    for label, figure, more in _summary_rows(usage, generations, **facts):
        console.print(Text.assemble((f"{label:<8}", "dim"), (figure, "bold"), (more, "dim")))


def _summary_rows(
    usage: Usage,
    generations: Sequence[Generation],
    *,
    model: str,
    dtype: str,
    device: str,
    seed: int | None,
    speed: str,
    retention: str | None,
) -> list[tuple[str, str, str]]:
    found, computed = usage.cached_prompt_tokens, usage.computed_prompt_tokens
    several = "" if len(generations) == 1 else f", {len(generations)} sequences"
    rows = [
        ("model", model, f", {dtype} on {device}"),
        ("prompt", counted(usage.prompt_tokens, "token"), f", {found:,} found in the cache, {computed:,} computed"),
        ("new", counted(usage.new_tokens, "token"), f"{several}, {usage.seconds:.2f} s{speed and f', {speed}'}"),
    ]
    if usage.source_tokens:
        read = "read by the encoder" if usage.computed_source_tokens else "found in the cache"
        rows.insert(1, ("source", counted(usage.source_tokens, "token"), f", {read}"))
    if usage.peak_bytes:
        memory = f", {readable_bytes(usage.peak_bytes)} of keys and values"
        rows.append(("cache", f"{counted(usage.peak_blocks, 'block')} at the peak", memory))
    else:
        rows.append(("cache", "off", ": everything was computed anew for each token"))
    if retention is not None:
        rows.append(("kept by", retention, f", {counted(usage.dropped_tokens, 'token')} of the sequence dropped"))
    rows.append(("finish", *_finish(generations)))
    if generations[0].score is not None and len(generations) == 1:
        rows.append(("score", f"{generations[0].score:.4f}", ", the sum of log-probabilities / length ^ penalty"))
    if seed is not None:
        rows.append(("seed", str(seed), " gives the same text again"))
    return rows


def _finish(generations: Sequence[Generation]) -> tuple[str, str]:
    meanings = {
        "eos": ", the model ended the text",
        "length": ", as long as was asked for",
        "stop": ", a stop text was met",
    }
    reasons = [own.finish_reason for own in generations]
    if len(reasons) == 1:
        return reasons[0], meanings[reasons[0]]
    return ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons)), ""


def print_logprobs(generations: Sequence[Generation], *, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
    """A table of tokens for each sequence, on stderr."""
    console = stderr_console()
    for number, own in enumerate(generations, start=1):
        console.print()
        if len(generations) > 1:
            console.print(f"[cyan]\\[{number}]")
        console.print(_logprob_table(own, tokenizer, prompt_ids, width=console.width))


def _logprob_table(generation: Generation, tokenizer: Any, prompt_ids: Sequence[int], *, width: int) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for heading in ("#", "id", "token", "logprob", "p"):
        table.add_column(heading, justify="left" if heading == "token" else "right", no_wrap=True)
    if generation.top_logprobs:
        table.add_column("likeliest", overflow="fold")
    token_ids = generation.token_ids
    for step, (token_id, logprob) in enumerate(zip(token_ids, generation.logprobs, strict=True)):
        before = [*prompt_ids, *token_ids[:step]]
        shown = _shown(token_id, tokenizer, before)
        cells = [str(step + 1), str(token_id), shown, f"{logprob:.4f}", _percent(logprob)]
        if generation.top_logprobs:
            top = generation.top_logprobs[step]
            pairs = zip(top.token_ids, top.logprobs, strict=True)
            alternatives = [f"{_shown(other, tokenizer, before)} {_percent(value)}" for other, value in pairs]
            cells.append(_wrapped(alternatives, width=width - TOKEN_COLUMNS))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _shown(token_id: int, tokenizer: Any, before: Sequence[int]) -> str:
    """A token as it reads after those before it, in quotes; its id where there is no tokenizer."""
    from kvloom.text import decode_new

    if tokenizer is None:
        return str(token_id)
    # A special token reads as nothing; its name says more.
    text = decode_new(tokenizer, before, [token_id])
    return repr(text) if text else str(tokenizer.convert_ids_to_tokens(token_id))


def _wrapped(parts: Sequence[str], *, width: int) -> str:
    """Parts side by side, as many as fit on a line; none is broken at its own spaces."""
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]}  {part}" if lines[-1] else part
        if lines[-1] and len(longer) > width:
            lines.append(part)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _percent(logprob: float) -> str:
    return f"{100 * math.exp(logprob):.1f}%"


# ---- JSON ----------------------------------------------------------------------------------------------------


def as_json(
    usage: Usage,
    generations: Sequence[Generation],
    *,
    prompt: str | None,
    prompt_ids: Sequence[int],
    settings: dict[str, Any],
    **facts: Any,
) -> dict[str, Any]:
    """Everything about a run; `generations` is a list even of one."""
    return {
        "kvloom": __version__,
        **facts,
        "prompt": prompt,
        "prompt_token_ids": list(prompt_ids),
        "settings": settings,
        "generations": [_generation(own) for own in generations],
        "usage": asdict(usage),
    }


def _generation(own: Generation) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "text": own.text,
        "token_ids": own.token_ids,
        "tokens": own.tokens,
        "logprobs": own.logprobs,
        "finish_reason": own.finish_reason,
        "score": own.score,
    }
    if own.top_logprobs is not None:
        fields["top_logprobs"] = [asdict(step) for step in own.top_logprobs]
    return fields
