"""One run of `kvloom generate`: from what was asked for to what is printed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kvloom.cli.generate import show
from kvloom.cli.generate.meter import Meter
from kvloom.cli.output.terminal import is_file, is_terminal, note
from kvloom.errors import InvalidRequest
from kvloom.units import dtype_name

if TYPE_CHECKING:
    from kvloom.decoding import Options
    from kvloom.language_model.model import LanguageModel
    from kvloom.language_model.results import Generation

DEFAULT_NEW_TOKENS = 128


def prepare(lm: LanguageModel, asked: Any, given: dict[str, Any], *, text: str | None, model: str, quiet: bool) -> Job:
    """A run of what was asked for, once it is known to make sense.

    Args:
        asked: the prompt, as the library takes it.
        given: the options that were set, in the library's words.
        text: the prompt as text; None if it is token ids.
        model: its name, for messages.
    """
    from kvloom.decoding import resolve
    from kvloom.decoding.randomness import fresh_seed
    from kvloom.prompts import read_prompt
    from kvloom.prompts.messages import is_conversation

    if text is not None and lm.tokenizer is None:
        raise InvalidRequest(f"{model} has no tokenizer. Pass token ids with --token-ids.")
    encoder = lm.binding.encoder
    if encoder is not None and encoder.reads_features:
        raise InvalidRequest(f"{model} reads features, not text. Pass them to `generate` from Python.")
    prompt: Any
    if encoder is None:
        prompt = lm.reader.read(asked)
        prompt_ids = prompt.token_ids
    else:
        if is_conversation(asked):
            raise InvalidRequest(f"{model} decodes from text alone. Leave the images out.")
        prompt = prompt_ids = read_prompt(asked, lm.tokenizer, vocab_size=encoder.vocab_size or lm.vocab_size)
    # What an encoder reads is not what the decoder continues, which is its start token.
    before = len(prompt_ids) if encoder is None else 1
    if "max_new_tokens" not in given:
        room = DEFAULT_NEW_TOKENS if lm.longest is None else lm.longest - before
        given = {**given, "max_new_tokens": max(1, min(DEFAULT_NEW_TOKENS, room))}
    resolved = resolve(
        lm.generation_config, None, given, vocab_size=lm.vocab_size, max_position_embeddings=lm.max_tokens
    )
    if resolved.do_sample and resolved.seed is None:
        # Drawn here, so that the summary can name it.
        given = {**given, "seed": fresh_seed()}
        resolved = replace(resolved, seed=given["seed"])
    if "seed" in given and not resolved.do_sample and not quiet:
        note("`--seed` has no effect: without sampling nothing is drawn.")
    meter = Meter(
        prompt_tokens=before,
        new_tokens=given["max_new_tokens"],
        rows=resolved.num_return_sequences if resolved.num_beams == 1 else None,
        bar=not quiet and is_terminal(sys.stderr),
    )
    return Job(
        lm=lm,
        model=model,
        prompt=prompt,
        prompt_ids=prompt_ids,
        text=text,
        given=given,
        resolved=resolved,
        meter=meter,
        quiet=quiet,
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the command."""

    lm: LanguageModel
    model: str
    prompt: Any
    prompt_ids: list[int]
    text: str | None
    given: dict[str, Any]
    resolved: Options
    meter: Meter
    quiet: bool

    @property
    def continued_ids(self) -> list[int]:
        """What the output continues: the prompt, unless an encoder reads it."""
        return self.prompt_ids if self.lm.binding.encoder is None else []

    @property
    def streams(self) -> bool:
        return self.resolved.num_beams == 1 and self.resolved.num_return_sequences == 1

    def stream(self) -> list[Generation]:
        """Write the text as it comes."""
        written = ""
        with self._metered(), self.lm.stream(self.prompt, **self.given) as pieces:
            for piece in pieces:
                if not written:
                    self._begin()
                text = piece.text if self.text is not None else f"{' ' if written else ''}{piece.token_id}"
                show.print_piece(text)
                written += text
        show.finish_line(written)
        assert pieces.result is not None, "the stream was read to its end"
        return [pieces.result]

    def decode(self) -> list[Generation]:
        """All sequences, when they are done."""
        with self._metered():
            results = self.lm.generate(self.prompt, **self.given)
        return list(results) if isinstance(results, list) else [results]

    def print_sequences(self, results: list[Generation]) -> None:
        """What `decode` returned, as text or ids."""
        if len(results) == 1:
            self._begin()
        show.print_sequences(results, as_ids=self.text is None)

    def _begin(self) -> None:
        """The bar makes way for the text; in a terminal the prompt stands before what continues it."""
        if not is_file(sys.stdout):
            # Not even a pipe is safe: `| tee` writes to the terminal in which the bar stands.
            self.meter.stop()
        if is_terminal(sys.stdout) and is_terminal(sys.stderr) and not self.quiet and self.continued_ids:
            show.print_prompt(f"{' '.join(map(str, self.prompt_ids))} " if self.text is None else self.text)

    def to_dict(self, results: list[Generation]) -> dict[str, Any]:
        """For JSON."""
        settings = {name: value for name, value in asdict(self.resolved).items() if value not in (None, ())}
        settings.pop("max_position_embeddings", None)  # the model's, not a setting
        if self.lm.retention is not None:
            settings["retention"] = {"policy": type(self.lm.retention).__name__, **asdict(self.lm.retention)}
        return show.as_json(
            results[0].usage,
            results,
            prompt=self.text,
            prompt_ids=self.prompt_ids,
            settings=settings,
            **self._facts(),
        )

    def print_summary(self, results: list[Generation]) -> None:
        """What it cost, on stderr."""
        show.print_summary(
            results[0].usage,
            results,
            seed=self.resolved.seed if self.resolved.do_sample else None,
            speed=self.meter.speed,
            retention=None if self.lm.retention is None else type(self.lm.retention).__name__,
            **self._facts(),
        )

    def _facts(self) -> dict[str, str]:
        binding = self.lm.binding
        return {
            "model": self.model,
            "dtype": dtype_name(binding.dtype),
            "device": str(binding.device),
        }

    @contextmanager
    def _metered(self) -> Iterator[None]:
        listeners = self.lm.engine.listeners
        listeners.append(self.meter)
        self.meter.start()
        try:
            yield
        finally:
            listeners.remove(self.meter)
            self.meter.stop()
