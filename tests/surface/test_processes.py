"""One model in several threads, and in processes that are forked from the one that holds it."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import kvloom
import tiny
from kvloom.errors import ForkedMidway
from thread_counts import on_threads

PROMPTS = [list(range(first, first + 20)) for first in range(1, 90, 11)]
SECONDS = 120

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here"
)


def in_forked_processes(work: Any, count: int = 2) -> list[Any]:
    """What `work()` returns in so many forked processes; fails if one of them hangs."""
    forking = multiprocessing.get_context("fork")
    answers = forking.SimpleQueue()
    processes = [forking.Process(target=lambda: answers.put(work())) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, "a forked process hangs"
    assert [process.exitcode for process in processes] == [0] * count
    return [answers.get() for _ in processes]


def test_forked_processes_decode_on_one_thread_each_and_say_what_their_parent_says() -> None:
    with on_threads(2):
        lm = kvloom.attach(tiny.tiny_model("llama"))
        context = lm.prefill(PROMPTS[0])

        def work() -> Any:
            results = lm.generate(PROMPTS[1:4], context=context, max_new_tokens=6)
            return [own.token_ids for own in results], torch.get_num_threads()

        expected, _ = work()
        assert in_forked_processes(work) == [(expected, 1)] * 2
        assert work() == (expected, 2)


def test_a_process_that_is_forked_while_another_thread_decodes_is_refused_instead_of_waiting_for_ever() -> None:
    lm = kvloom.attach(tiny.tiny_model("llama"))
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        go_on.wait(SECONDS)

    def work() -> str:
        try:
            lm.generate(PROMPTS[0], max_new_tokens=2)
        except ForkedMidway as error:
            return str(error)
        return "not refused"

    lm.engine.listeners.append(wait)
    other = threading.Thread(target=lambda: lm.generate(PROMPTS[1], max_new_tokens=1))
    other.start()
    assert inside.wait(SECONDS)
    try:
        (answer,) = in_forked_processes(work, count=1)
    finally:
        go_on.set()
        other.join()
    assert "Fork between two calls" in answer
    lm.engine.listeners.clear()
    assert lm.generate(PROMPTS[0], max_new_tokens=2).token_ids


def test_threads_that_call_one_model_get_what_each_would_get_alone_while_another_model_is_attached() -> None:
    lm = kvloom.attach(tiny.tiny_model("gemma2"), budget_bytes=1_500_000)
    alone = [lm.beam_search(prompt, num_beams=3, max_new_tokens=6)[0].token_ids for prompt in PROMPTS]
    streamed = [[piece.token_id for piece in lm.stream(prompt, max_new_tokens=6)] for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        beams = pool.map(lambda prompt: lm.beam_search(prompt, num_beams=3, max_new_tokens=6)[0].token_ids, PROMPTS)
        streams = pool.map(lambda prompt: [own.token_id for own in lm.stream(prompt, max_new_tokens=6)], PROMPTS)
        others = pool.map(lambda name: kvloom.attach(tiny.tiny_model(name)).max_tokens, ["llama", "gpt2"])
        assert list(beams) == alone
        assert list(streams) == streamed
        assert list(others) == [tiny.MAX_POSITIONS] * 2
    lm.engine.contexts._guard.catch_up_now()
    assert all(group.pool.referenced == len(group.index.idle()) for group in lm.engine.cache.groups)
