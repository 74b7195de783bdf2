"""Every cell of docs/composition.md is tried: it works, or it is refused with the sentence that stands there.

"Works" means that the output is that of the same call without a cache, computed alone. What a codec or a retention
policy changes on purpose is compared with the same codec, or policy, alone and cold.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import kvloom
import tiny
from kvloom import InvalidRequest, LanguageModel
from tiny_vision import Picture, prompt, tiny_vision_model

PAGE = Path(__file__).parents[2] / "docs/composition.md"
METHODS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "seed": 3, "top_k": 0, "num_return_sequences": 2},
    "beam search": {"num_beams": 3, "num_return_sequences": 2},
}
FEATURES = ("ragged batch", "shared prefix", "context reuse", "int8 cache", "bounded cache")
START = 2
FIXED: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None}


class Text:
    """Prompts that are text; `more` follows a context of the second."""

    model = "llama"

    def attach(self, **options: Any) -> LanguageModel:
        return kvloom.attach(tiny.tiny_model(self.model), **options)

    def prompts(self, lm: LanguageModel) -> list[Any]:
        return [tiny.random_ids(lm.binding.model, tokens=tokens, seed=tokens) for tokens in (7, 36, 21)]

    def begin(self, lm: LanguageModel) -> tuple[kvloom.Context, Any, dict[str, Any], Any, dict[str, Any]]:
        """A context, what follows it, and the same as one prompt."""
        whole = self.prompts(lm)[1]
        return lm.prefill(whole[:20]), whole[20:], {}, whole, {}

    def options(self, count: int) -> dict[str, Any]:
        return {}


class Images(Text):
    """Prompts with an image each."""

    def attach(self, **options: Any) -> LanguageModel:
        return kvloom.attach(tiny_vision_model("qwen2_vl"), **options)

    def prompts(self, lm: LanguageModel) -> list[Any]:
        model = lm.binding.model
        shown = [(4, Picture(4, 6), 3), (20, Picture(4, 8, seed=1), 9), (2, Picture(4, 4, seed=2), 13)]
        return [prompt(model, *parts, seed=seed) for seed, parts in enumerate(shown)]

    def begin(self, lm: LanguageModel) -> tuple[kvloom.Context, Any, dict[str, Any], Any, dict[str, Any]]:
        model = lm.binding.model
        whole = prompt(model, 5, Picture(4, 6), 4, [9, 8, 7], Picture(4, 4, seed=3), [6, 5])
        first, second = prompt(model, 5, Picture(4, 6), 4), prompt(model, [9, 8, 7], Picture(4, 4, seed=3), [6, 5])
        return lm.prefill(first), second, {}, whole, {}


class Sources(Text):
    """Sources of unlike lengths, and what the decoder begins with."""

    model = "bart"

    def begin(self, lm: LanguageModel) -> tuple[kvloom.Context, Any, dict[str, Any], Any, dict[str, Any]]:
        source, begun = self.prompts(lm)[1], [START, *tiny.random_ids(lm.binding.model, tokens=20)]
        context = lm.prefill(source, decoder_input_ids=begun[:9])
        return context, begun[9:], {}, source, {"decoder_input_ids": begun}

    def options(self, count: int) -> dict[str, Any]:
        begun = [START, *range(10, 30)]
        return {"decoder_input_ids": [begun[: 1 + 9 * index] for index in range(count)]}


KINDS: dict[str, Text] = {"text": Text(), "images and text": Images(), "encoder-decoder": Sources()}


@cache
def attached(kind: str, **options: Any) -> LanguageModel:
    return KINDS[kind].attach(**options)


def sequences(found: Any) -> list[list[int]]:
    """The token ids of one prompt's sequences."""
    return [own.token_ids for own in (found if isinstance(found, list) else [found])]


def alone(kind: str, lm: LanguageModel, prompts: list[Any], **options: Any) -> list[list[list[int]]]:
    """Each prompt by itself."""
    each = KINDS[kind].options(len(prompts))
    own = [{name: values[index] for name, values in each.items()} for index in range(len(prompts))]
    return [sequences(lm.generate(one, **FIXED, **more, **options)) for one, more in zip(prompts, own, strict=True)]


def together(kind: str, lm: LanguageModel, prompts: list[Any], **options: Any) -> list[list[list[int]]]:
    return [sequences(own) for own in lm.generate(prompts, **FIXED, **KINDS[kind].options(len(prompts)), **options)]


def ragged_batch(kind: str, method: dict[str, Any]) -> None:
    lm = attached(kind)
    prompts = KINDS[kind].prompts(lm)
    got = together(kind, lm, prompts, **method)
    assert got == alone(kind, lm, prompts, use_cache=False, **method)
    assert len({str(own) for own in got}) > 1, "not all prompts go on alike"


def shared_prefix(kind: str, method: dict[str, Any]) -> None:
    lm = KINDS[kind].attach()
    *_, whole, more = KINDS[kind].begin(lm)
    lm.generate(whole, **more, **FIXED)
    again = lm.generate(whole, **more, **FIXED, **method)
    usage = (again[0] if isinstance(again, list) else again).usage
    assert usage.cached_prompt_tokens >= 16 and usage.computed_source_tokens == 0
    assert sequences(again) == sequences(lm.generate(whole, use_cache=False, **more, **FIXED, **method))


def context_reuse(kind: str, method: dict[str, Any]) -> None:
    lm = attached(kind)
    context, after, options, whole, more = KINDS[kind].begin(lm)
    got = lm.generate(after, context=context, **options, **FIXED, **method)
    usage = (got[0] if isinstance(got, list) else got).usage
    assert usage.cached_prompt_tokens >= context.tokens
    assert sequences(got) == sequences(lm.generate(whole, use_cache=False, **more, **FIXED, **method))


def int8_cache(kind: str, method: dict[str, Any]) -> None:
    lm = attached(kind, codec="int8")
    prompts = KINDS[kind].prompts(lm)
    got = together(kind, lm, prompts, **method)
    assert got == alone(kind, KINDS[kind].attach(codec="int8"), prompts, **method)
    first = {"max_new_tokens": 1, "output_logits": True, "eos_token_id": None}
    each = KINDS[kind].options(3)
    outs = [own.generate(prompts, **first, **each) for own in (lm, attached(kind))]
    for mine, plain in zip(*outs, strict=True):
        difference = (mine.logits - plain.logits).abs().max()
        assert difference < 0.05 * plain.logits.abs().max(), "a codec loses little"


def bounded_cache(kind: str, method: dict[str, Any]) -> None:
    policy = kvloom.SinkWindow(sink_tokens=2, window_tokens=12)
    lm = KINDS[kind].attach(block_tokens=4)
    prompts = KINDS[kind].prompts(lm)
    got = together(kind, lm, prompts, retention=policy, **method)
    cold = KINDS[kind].attach(block_tokens=4)
    assert got == alone(kind, cold, prompts, retention=policy, **method)
    last = {name: values[-1] for name, values in KINDS[kind].options(3).items()}
    found = lm.generate(prompts[-1], retention=policy, **last, **FIXED, **method)
    assert (found[0] if isinstance(found, list) else found).usage.dropped_tokens > 0


TRIED: dict[str, Callable[[str, dict[str, Any]], None]] = {
    "ragged batch": ragged_batch,
    "shared prefix": shared_prefix,
    "context reuse": context_reuse,
    "int8 cache": int8_cache,
    "bounded cache": bounded_cache,
}


def cells() -> dict[tuple[str, str, str], str]:
    """What the page says of each (kind, feature, method)."""
    found = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        kind, rows = section.split("\n", 1)[0].lower(), re.findall(r"^\| (.+?) \|$", section, flags=re.MULTILINE)
        table = [[cell.strip() for cell in row.split("|")] for row in rows if not row.startswith("---")]
        if kind in KINDS:
            for feature, *states in table[1:]:
                found |= {(kind, feature, method): state for method, state in zip(table[0][1:], states, strict=True)}
    return found


CELLS = cells()


def test_the_page_has_every_cell() -> None:
    assert CELLS.keys() == {(kind, feature, method) for kind in KINDS for feature in FEATURES for method in METHODS}


@pytest.mark.parametrize(("kind", "feature", "method"), sorted(CELLS), ids=lambda own: own.replace(" ", "-"))
def test_a_cell_is_what_the_page_says(kind: str, feature: str, method: str) -> None:
    torch.manual_seed(0)
    state = CELLS[kind, feature, method]
    if state == "works":
        TRIED[feature](kind, METHODS[method])
        return
    with pytest.raises(InvalidRequest) as refused:
        TRIED[feature](kind, METHODS[method])
    assert state == f"refused: {refused.value}"
