"""Prompts as they come to a command: an argument, standard input, ids."""

from __future__ import annotations

import os
import sys

import click

from kvloom.cli.output.terminal import is_terminal
from kvloom.errors import EmptyPrompt, InvalidRequest


def read_prompt(prompt: str | None, *, example: str) -> str:
    """The prompt, from standard input if it is `-` or missing; one newline at its end is dropped there."""
    if prompt is None and is_terminal(sys.stdin):
        raise click.UsageError(f"no prompt. Pass it, as in `{example}`, or pipe it in.")
    if prompt is None or prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"the prompt on standard input is not UTF-8 text: {error}. Convert it.") from error
    prompt = as_text(prompt)
    if not prompt:
        raise EmptyPrompt("the prompt is empty. Pass some text, or token ids with --token-ids.")
    return prompt


def as_text(argument: str, *, what: str = "the prompt") -> str:
    """An argument or a line as text: UTF-8, also where the locale has another encoding and Python could not read it."""
    try:
        return os.fsencode(argument).decode() if _is_undecoded(argument) else argument
    except UnicodeError as error:
        raise InvalidRequest(f"{what} is not UTF-8 text: {error}. Convert it.") from error


def _is_undecoded(text: str) -> bool:
    """Whether Python holds bytes in the text that it could not decode (PEP 383)."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def read_ids(text: str, *, what: str = "the prompt") -> list[int]:
    """Token ids, with commas or spaces between."""
    words = text.replace(",", " ").split()
    wrong = next((word for word in words if not word.lstrip("-").isdecimal()), None)
    if wrong is not None:
        raise InvalidRequest(
            f"`{wrong}` is not a token id, and with --token-ids {what} is integers. Leave --token-ids out to pass text."
        )
    if not words:
        raise EmptyPrompt(f"{what} holds no token ids. Pass at least one.")
    return [int(word) for word in words]
