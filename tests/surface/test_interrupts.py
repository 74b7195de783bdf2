"""Ctrl-C at any line: nothing leaks, and the model goes on as if it had never come."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import kvloom
import tiny

PACKAGE = str(Path(kvloom.__file__).parent)
PROMPT = list(range(1, 38))
OTHER = list(range(60, 80))
POINTS = 6


class Ticker:
    """Counts the lines of the package that run, and sends this process a SIGINT at one of them."""

    def __init__(self, line: int | None = None) -> None:
        self.lines, self._line = 0, line

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self._line:
                signal.raise_signal(signal.SIGINT)
        return self

    def watch(self, work: Callable[[], object]) -> None:
        """Do the work, interrupted or not."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(before)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """As in a terminal: what runs in the background of a shell ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def held_by_users(lm: kvloom.LanguageModel) -> list[int]:
    """For each layer group, blocks that tables hold: all but those that are free or only known to the prefix index."""
    gc.collect()
    lm.engine.contexts._guard.catch_up_now()
    return [group.pool.referenced - len(group.index.idle()) for group in lm.engine.cache.groups]


def interrupt_everywhere(lm: kvloom.LanguageModel, work: Callable[[], object], check: Callable[[], object]) -> None:
    """Do the work again and again, interrupted a little later each time."""
    expected, handler = check(), signal.getsignal(signal.SIGINT)
    work()
    counted = Ticker()
    counted.watch(work)
    came = 0
    for point in range(POINTS):
        # Not at regular distances, which would meet the same lines of each step.
        line = 1 + (point * counted.lines) // POINTS + (point * 7) % 13
        try:
            Ticker(line).watch(work)
        except KeyboardInterrupt:
            came += 1
        assert held_by_users(lm) == [0] * len(lm.engine.cache.groups), f"interrupted at line {line}"
        assert not len(lm.engine._requests) and not lm.engine._guard._exclusive._depth
        assert signal.getsignal(signal.SIGINT) is handler
    assert check() == expected
    assert came > POINTS / 2


@pytest.mark.parametrize(("family", "codec"), [("llama", "native"), ("llama", "int8")])
def test_ctrl_c_at_any_line_of_a_call_leaks_nothing_and_changes_nothing(family: str, codec: Any) -> None:
    model = tiny.tiny_model(family)
    lm = kvloom.attach(model, budget_bytes=1_500_000, codec=codec)
    ids = torch.tensor([OTHER])
    own = model(ids).logits

    def work() -> None:
        with lm.prefill(PROMPT) as context, context.fork() as fork:
            lm.beam_search([OTHER, PROMPT[:20]], num_beams=2, max_new_tokens=2)
            lm.generate(OTHER, context=fork, do_sample=True, num_return_sequences=2, max_new_tokens=2, seed=1)
            lm.score([[5, 6, 7], [8]], context=fork)
            next(lm.stream(OTHER, max_new_tokens=2))

    interrupt_everywhere(lm, work, lambda: lm.generate([OTHER, PROMPT], max_new_tokens=4)[1].logprobs)
    assert torch.equal(model(ids).logits, own)


def test_ctrl_c_while_a_source_is_encoded_leaks_nothing() -> None:
    model = tiny.tiny_model("t5")
    lm = kvloom.attach(model, budget_bytes=1_500_000)
    sources = iter(range(10_000))

    def work() -> None:
        lm.beam_search(tiny.random_ids(model, tokens=20, seed=next(sources)), num_beams=2, max_new_tokens=3)

    interrupt_everywhere(lm, work, lambda: lm.generate(OTHER, max_new_tokens=4).logprobs)


def test_ctrl_c_between_saving_and_restoring_leaks_nothing_and_leaves_a_whole_file(tmp_path: Path) -> None:
    lm = kvloom.attach(tiny.tiny_model("llama"), budget_bytes=1_000_000)
    path = tmp_path / "context.kv"
    lm.prefill(PROMPT).save(path)

    def work() -> None:
        with lm.prefill(PROMPT) as context:
            context.save(path)
        lm.restore(path).close()

    def check() -> Any:
        with lm.restore(path) as context:
            return lm.generate(OTHER, context=context, max_new_tokens=4).logprobs

    interrupt_everywhere(lm, work, check)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_ctrl_c_while_a_model_is_attached_leaves_it_as_it_was() -> None:
    model = tiny.tiny_model("gemma2")
    ids = torch.tensor([OTHER])
    own = model(ids).logits
    counted = Ticker()
    counted.watch(lambda: kvloom.attach(model, exclusive=True, budget_bytes=500_000).engine.shut_down())
    for point in range(POINTS // 2):
        try:
            Ticker(1 + point * counted.lines // (POINTS // 2)).watch(
                lambda: kvloom.attach(model, exclusive=True, budget_bytes=500_000).engine.shut_down()
            )
        except KeyboardInterrupt:
            gc.collect()
        assert torch.equal(model(ids).logits, own), f"point {point}"
