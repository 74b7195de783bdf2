"""Conversations in the chat-message format of transformers: to text by the chat template, to inputs by the processor.

A conversation is a list of messages, ``{"role": "user", "content": ...}``; the content is text, or a list of blocks:
``{"type": "text", "text": ...}``, ``{"type": "image", "image": ...}`` (an image, or its "url", "path" or "base64"),
``{"type": "video", "video": ...}`` (frames, or a "url" or "path").
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from kvloom.errors import InvalidRequest, first_line
from kvloom.text import refuse_half_characters

SOURCES = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}
"""Where a block says what it shows; the first that is there counts."""

STAND_IN = "kvloom-stand-in"
"""An answer in a conversation that is rendered only to see what a template writes around answers."""

MOST_PATH_CHARACTERS = 4_096
"""Longer text is an image in base64, not a path."""

Messages = Sequence[Mapping[str, Any]]


def is_conversation(prompt: object) -> bool:
    """Whether a prompt is a list of messages."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, (str, bytes, bytearray))
        and bool(prompt)
        and isinstance(prompt[0], Mapping)
        and "role" in prompt[0]
    )


class Chat:
    """Turns conversations into inputs.

    Args:
        tokenizer: of the model; None if there is none.
        processor: of an image-text model; None if there is none.
        refusals: for kinds of media that the model does not take, why.
    """

    def __init__(self, tokenizer: Any, processor: Any, *, refusals: Mapping[Any, str]) -> None:
        self._tokenizer = tokenizer
        self._processor = processor
        self._refusals = refusals

    def read(self, messages: Messages, *, before: Sequence[int] | None, cue: bool) -> Mapping[str, Any]:
        """The inputs of a conversation: `input_ids` and, where it shows something, what the processor makes of that.

        Args:
            before: token ids that the messages continue; they may end within an answer, which is then closed.
            cue: whether the model shall answer (`add_generation_prompt`).

        Raises:
            InvalidRequest: messages of a wrong form, no chat template, media that cannot be read.
        """
        messages = [_checked(message, number) for number, message in enumerate(messages, start=1)]
        shown = {kind: _sources(messages, kind) for kind in SOURCES}
        self._check_processor(shown)
        text, closing = self._render(messages, cue), ""
        if before is not None:
            text, closing = self._continuation(messages, cue)
        inputs = self._encode(text, shown, at_start=before is None)
        if before is not None:
            drop = self._overlap(before, closing)
            inputs = {**inputs, "input_ids": inputs["input_ids"][drop:]}
        return inputs

    # ---- the template --------------------------------------------------------------------------------------

    def _render(self, messages: Messages, cue: bool) -> str:
        host = self._processor if getattr(self._processor, "chat_template", None) else self._tokenizer
        if host is None:
            raise InvalidRequest("messages need a chat template, and no tokenizer was attached. Pass token ids.")
        if not host.chat_template:
            raise InvalidRequest(
                "messages need a chat template, and the tokenizer has none. Pass the prompt as text, or set "
                "`chat_template` on the tokenizer."
            )
        if self._processor is None:
            messages = [{**message, "content": _plain(message["content"])} for message in messages]
        try:
            return str(host.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue))
        except Exception as error:  # a template says whatever it likes
            raise InvalidRequest(f"the chat template refuses the messages: {first_line(error)}") from error

    def _continuation(self, messages: Messages, cue: bool) -> tuple[str, str]:
        """What a template writes behind an answer: its closing and the messages; and the closing alone."""
        blocks = any(not isinstance(message["content"], str) for message in messages)
        earlier = [
            {"role": role, "content": [{"type": "text", "text": text}] if blocks else text}
            for role, text in (("user", "?"), ("assistant", STAND_IN))
        ]
        _, found, text = self._render([*earlier, *messages], cue).partition(STAND_IN)
        closing = self._render(earlier, False).partition(STAND_IN)[2]
        if not found:
            raise InvalidRequest(
                "the chat template leaves out earlier answers, so messages cannot follow a context. "
                "Pass all of them without one."
            )
        return text, closing if text.startswith(closing) else ""

    def _overlap(self, before: Sequence[int], closing: str) -> int:
        """How many tokens of an answer's closing stand at the end of `before` already, such as its EOS token."""
        tokens = list(self._tokenizer(closing, add_special_tokens=False).input_ids)
        return next((n for n in range(len(tokens), 0, -1) if list(before[-n:]) == tokens[:n]), 0)

    # ---- tokens and pixels ---------------------------------------------------------------------------------

    def _encode(self, text: str, shown: dict[str, list[Any]], *, at_start: bool) -> Mapping[str, Any]:
        refuse_half_characters(text)
        if self._processor is None:
            return {"input_ids": list(self._tokenizer(text, add_special_tokens=False).input_ids)}
        bos = self._tokenizer.bos_token
        special = {} if at_start and not (bos and text.startswith(bos)) else {"add_special_tokens": False}
        if not any(shown.values()):
            return {"input_ids": list(self._tokenizer(text, **special).input_ids)}
        images = [load_image(image, f"image {number}") for number, image in enumerate(shown["image"], start=1)]
        try:
            inputs = self._processor(
                text=[text],
                images=[images] if images else None,
                videos=[shown["video"]] if shown["video"] else None,
                return_tensors="pt",
                **special,
            )
        except Exception as error:  # processors raise errors of all kinds about what they are given
            raise InvalidRequest(f"the processor refuses the messages: {first_line(error)}") from error
        return {**inputs, "input_ids": inputs["input_ids"][0].tolist()}

    def check_takes(self, kind: str) -> None:
        """Refuse a kind of media that the model, or its processor, cannot take."""
        self._check_processor({"image": [], "video": [], kind: [None]})

    def _check_processor(self, shown: dict[str, list[Any]]) -> None:
        kinds = [kind for kind, sources in shown.items() if sources]
        if not kinds:
            return
        for kind in kinds:
            if kind in self._refusals:
                raise InvalidRequest(self._refusals[kind])
        if self._processor is None:
            raise InvalidRequest(
                f"the messages hold {_a(kinds[0])}, but no processor was attached to make inputs of it. "
                "Attach the model with its processor, kvloom.attach(model, processor)."
            )
        if shown["video"] and getattr(self._processor, "video_processor", None) is None:
            raise InvalidRequest(
                "the messages hold a video, but the processor has no part for videos, which transformers makes with "
                "torchvision alone. Install torchvision, or pass the frames as images (`--frames FOLDER`)."
            )
        for number, video in enumerate(shown["video"], start=1):
            if isinstance(video, (str, os.PathLike)) and "://" not in str(video) and not os.path.exists(video):
                raise InvalidRequest(f"video {number} cannot be read: there is no file `{video}`. Check the path.")


def _checked(message: Any, number: int) -> dict[str, Any]:
    """A message of the right form; blocks that say what they show keep their place."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"message {number} has no role. Write it as {{'role': 'user', 'content': ...}}.")
    content = message.get("content")
    if isinstance(content, str):
        return dict(message)
    if not isinstance(content, Sequence) or not all(isinstance(block, Mapping) for block in content):
        raise InvalidRequest(
            f"the content of message {number} is neither text nor a list of blocks with a type. Pass text, "
            "or blocks such as {'type': 'text', 'text': ...}."
        )
    for block in content:
        kind = block.get("type")
        if kind == "text" and isinstance(block.get("text"), str):
            continue
        if kind not in SOURCES:
            raise InvalidRequest(f"message {number} has a block of type {kind!r}. Pass text, image or video.")
        if _source(block) is None:
            keys = ", ".join(f"`{key}`" for key in SOURCES[kind])
            raise InvalidRequest(f"{_a(kind)} block of message {number} shows nothing. Give one of {keys}.")
    return {**message, "content": [dict(block) for block in content]}


def _sources(messages: Messages, kind: str) -> list[Any]:
    blocks = [block for message in messages if not isinstance(message["content"], str) for block in message["content"]]
    return [_source(block) for block in blocks if block["type"] == kind]


def _source(block: Mapping[str, Any]) -> Any:
    return next((block[key] for key in SOURCES[block["type"]] if block.get(key) is not None), None)


def _plain(content: Any) -> str:
    """Content as text, which is what the templates of text models take."""
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


def load_image(source: Any, what: str) -> Any:
    """An image from where it lies; images that are loaded already are taken as they are.

    Args:
        what: the image in the words of an error message.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    from transformers.image_utils import load_image as load

    try:
        return load(os.fspath(source))
    except Exception as error:  # no such file, no image, no network: all of it means the same here
        raise InvalidRequest(f"{what} cannot be read: {_why_unreadable(os.fspath(source), error)}") from error


def _why_unreadable(source: str, error: Exception) -> str:
    name = source if len(source) <= 80 else f"{source[:77]}..."
    if "://" in source:
        return f"`{name}` is not an image ({first_line(error)})."
    if len(source) < MOST_PATH_CHARACTERS and os.path.exists(source):
        return f"`{name}` is not an image, or is damaged."
    return f"there is no file `{name}`."


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
