"""A stream: one sequence, token by token."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

from kvloom.engine import Engine, Request
from kvloom.language_model.calls import Calls
from kvloom.language_model.results import Generation, Piece
from kvloom.text import Detokenizer


class Stream(Iterator[Piece]):
    """The pieces of one sequence, as they are generated; see `LanguageModel.stream`.

    Pieces that were handed out are not kept. What grows with a stream is what `result` is made of: ids and
    log-probabilities.

    Args:
        request: not queued yet.

    Attributes:
        result: the `Generation`, once the stream is exhausted; None before.
    """

    def __init__(self, engine: Engine, tokenizer: Any, calls: Calls, request: Request) -> None:
        self.result: Generation | None = None
        self._engine = engine
        self._tokenizer = tokenizer
        self._calls = calls
        self._request = request
        self._handed_out = 0
        self._pieces = self._run()
        request.untaken = deque()
        calls.submit([request])

    def __next__(self) -> Piece:
        piece = next(self._pieces)
        self._handed_out += 1
        return piece

    def close(self) -> None:
        """Stop generating and free what was held. Called by itself when the stream is dropped."""
        self._pieces.close()
        if self.result is None:
            self._engine.abort(self._request)

    def _run(self) -> Generator[Piece, None, None]:
        request, engine = self._request, self._engine
        untaken = request.untaken
        assert untaken is not None, "a stream takes its request's tokens"
        texts = None if self._tokenizer is None else Detokenizer(self._tokenizer, request.prompt_ids)
        try:
            while not request.done or untaken:
                if not untaken:
                    engine.step()
                    continue
                token_id, logprob = untaken.popleft()
                text = "" if texts is None else texts.push(token_id)
                if not request.done or untaken:
                    yield Piece(text, token_id, logprob)
            engine.run([request])  # raises what the request failed with
            self.result = self._calls.results(request)[0]
            rest = "" if texts is None else texts.finish()
            yield Piece(text + rest, token_id, logprob, self.result.finish_reason)
        except BaseException:
            if self.result is None:
                engine.abort(request)
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.result is not None:
            state = f"ended by {self.result.finish_reason}"
        elif self._request.done:
            state = "closed"
        else:
            state = f"of at most {self._request.max_new_tokens:,}"
        return f"Stream({self._handed_out:,} new tokens, {state})"
