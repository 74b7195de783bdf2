"""A conversation: turns on one growing context, of which each turn computes its new tokens only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvloom.conversation import saved
from kvloom.conversation.turn import Turn
from kvloom.errors import InvalidRequest, PromptTooLong, SnapshotError
from kvloom.language_model.context import Context
from kvloom.language_model.model import LanguageModel
from kvloom.language_model.results import Generation
from kvloom.prompts import Prompt
from kvloom.prompts.messages import load_image
from kvloom.text import encode_continuation, encode_start

NO_TEMPLATE = "this model has no chat template, so there is no place for an image. Leave it out."


def _stop_when(asked: Callable[[], bool]) -> Callable[..., Tensor]:
    """A stopping criterion: the answer ends, as if it were complete, once somebody asks for that."""

    def criterion(input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), asked(), dtype=torch.bool, device=input_ids.device)

    return criterion


@dataclass
class Conversation:
    """One branch of a conversation.

    With a chat template, what is said is wrapped as the template says; without one it stands in the text as it is, and
    the model goes on from there.

    Attributes:
        lm: the model; it needs a tokenizer.
        system: a system message, before the first turn; only where there is a template.
        options: of decoding, as for `LanguageModel.generate`.
        turns: so far.
        context: the tokens of all turns, with keys and values; None before the first.
        last: the last answer, with its usage.
    """

    lm: LanguageModel
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    context: Context | None = None
    last: Generation | None = None

    def __post_init__(self) -> None:
        if self.lm.tokenizer is None:
            raise InvalidRequest("a conversation is text, and this model has no tokenizer. Attach the model with one.")
        if self.lm.binding.encoder is not None:
            raise InvalidRequest(
                "a conversation goes on; an encoder-decoder model decodes from one source each time. Use generate()."
            )
        if self.system is not None and not self.has_template:
            raise InvalidRequest(
                "this model has no chat template, so there is no place for a system message. Leave it out."
            )

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer, or the processor, knows how a conversation is written."""
        return any(getattr(own, "chat_template", None) for own in (self.lm.tokenizer, self.lm.processor))

    @property
    def tokens(self) -> int:
        """Length of the context."""
        return 0 if self.context is None else self.context.tokens

    def say(self, text: str, *, images: Sequence[Any] = (), stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Say something, and hand out the answer as it comes; whole characters only.

        Args:
            images: what is shown with it: paths, or images of PIL. Needs an image-text model.
            stop: asked after each token; once it is true the answer ends there, and the conversation goes on from it.

        Raises:
            InvalidRequest: images that the model does not take, or that cannot be read.
            PromptTooLong, CacheFull: the conversation no longer fits; it is as before the turn.
        """
        turn = Turn(text, "", self.tokens, tuple(images))
        whole = self._written(turn)
        context = self._shared(whole)
        new = self.lm.reader.rest(whole, 0 if context is None else context.tokens)
        options = {**self.options, "max_new_tokens": self._room(len(whole.token_ids))}
        answer = ""
        with self.lm.stream(new, context=context, stopping_criteria=[_stop_when(stop)], **options) as pieces:
            for piece in pieces:
                answer += piece.text
                yield piece.text
        assert pieces.result is not None, "the stream was read to its end"
        self.last = pieces.result
        self.context = pieces.result.context
        self.turns.append(replace(turn, answer=answer))

    def readable_image(self, path: str) -> str:
        """The absolute path of an image that can be shown to this model; raises `InvalidRequest` if it cannot be."""
        self.lm.reader.check_takes("image")
        if not self.has_template:
            raise InvalidRequest(NO_TEMPLATE)
        found = path if "://" in path else str(Path(path).expanduser().resolve())
        load_image(found, "the image")
        return found

    def undo(self) -> Turn:
        """Take back the last turn; its tokens are cut off the context."""
        if not self.turns:
            raise InvalidRequest("there is no turn to take back: nothing has been said yet.")
        turn = self.turns.pop()
        self.context = self.context.truncate(turn.tokens_before) if self.context and turn.tokens_before else None
        self.last = None
        return turn

    def fork(self) -> Conversation:
        """A branch that goes on from here; it shares what is computed."""
        return replace(self, turns=list(self.turns), context=self.context and self.context.fork())

    def save(self, file: Path) -> None:
        """Write the turns into `file`, JSON, and keys and values into `file`.kv beside it."""
        told = {
            "format": saved.FORMAT,
            "system": self.system,
            "turns": [saved.told(turn) for turn in self.turns],
            "token_ids": [] if self.context is None else list(self.context.token_ids),
        }
        if file.exists() and not file.is_file():
            raise InvalidRequest(
                f"`{file}` is not a regular file, so a conversation cannot take its place. Name another."
            )
        if self.context is not None and self.lm.engine.cache is not None:
            self.context.save(saved.beside(file))
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            aside.write_text(json.dumps(told, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)

    def load(self, file: Path) -> str | None:
        """Go on from a saved conversation; this one is given up.

        Returns:
            None if keys and values came from the file, else why they are computed anew with the next turn.
        """
        told = saved.read(file)
        turns = [Turn(**{**turn, "images": tuple(turn.get("images", ()))}) for turn in told["turns"]]
        if told["system"] is not None and not self.has_template:
            raise InvalidRequest(
                f"`{file}` has a system message, and this model has no chat template to write it. Load it with "
                "the model that saved it."
            )
        reason, context = None, None
        if turns:
            try:
                context = self.lm.restore(saved.beside(file))
            except (SnapshotError, InvalidRequest) as error:
                reason = str(error)
            if context is not None and list(context.token_ids) != told["token_ids"]:
                reason, context = f"`{saved.beside(file)}` belongs to another conversation.", None
        self.system, self.turns, self.context, self.last = told["system"], turns, context, None
        return reason

    def _written(self, now: Turn) -> Prompt:
        """All turns and what is said now, up to where the answer begins."""
        tokenizer = self.lm.tokenizer
        if self.has_template:
            messages: list[dict[str, Any]] = [] if self.system is None else [{"role": "system", "content": self.system}]
            for turn in self.turns:
                messages += [{"role": "user", "content": turn.content}, {"role": "assistant", "content": turn.answer}]
            messages.append({"role": "user", "content": now.content})
            return self._as_computed(self.lm.reader.read(messages), now)
        if now.images:
            raise InvalidRequest(NO_TEMPLATE)
        if self.context is not None:
            return Prompt([*self.context.token_ids, *encode_continuation(tokenizer, now.said)])
        before = "".join(f"{turn.said}{turn.answer}" for turn in self.turns)
        return Prompt(encode_start(tokenizer, before + now.said))

    def _as_computed(self, whole: Prompt, now: Turn) -> Prompt:
        """The same text with the context's own tokens, where the tokenizer would write an answer in others."""
        context = self.context
        if context is None or whole.token_ids[: context.tokens] == list(context.token_ids):
            return whole
        try:
            said = self.lm.reader.read([{"role": "user", "content": now.content}], before=context.token_ids)
        except InvalidRequest:  # the template has no way to go on behind an answer
            return whole
        behind = said.behind(context.token_ids, context.media)
        return behind if self._canonical(behind) == self._canonical(whole) else whole

    def _canonical(self, prompt: Prompt) -> list[int]:
        """What the tokenizer makes of a prompt's text; some normalise characters, too."""
        tokenizer = self.lm.tokenizer
        return list(tokenizer(tokenizer.decode(prompt.token_ids), add_special_tokens=False).input_ids)

    def _shared(self, whole: Prompt) -> Context | None:
        """The context, cut to what the new text begins with: templates may write an earlier turn in another way."""
        if self.context is None:
            return None
        known, token_ids = self.context.token_ids, whole.token_ids
        limit = min(len(known), len(token_ids) - 1)
        same = next((index for index in range(limit) if known[index] != token_ids[index]), limit)
        if self.context.media is not None:
            same = self.context.media.shared_with(whole.media, same)
        return self.context.truncate(same) if same else None

    def _room(self, tokens: int) -> int:
        """New tokens that may follow."""
        limit = self.lm.longest
        wanted: int | None = self.options.get("max_new_tokens")
        if limit is None:
            return wanted or 512
        if tokens >= limit:
            raise PromptTooLong(
                f"the conversation has {tokens:,} tokens, and the model's context of {limit:,} leaves no room for an "
                "answer. Take turns back, or start again."
            )
        return min(wanted or limit, limit - tokens)
