"""When a sequence ends: an EOS token, a stop string or the caller's own criterion, or its length.

EOS and length are tensor operations and never wait for the device. Stop strings and other criteria are
transformers' classes; they see the whole sequence, prompt included, as in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import stopping_criteria as hf

from kvloom.decoding.base import FinishReason
from kvloom.decoding.logits import merge
from kvloom.decoding.options import Options
from kvloom.errors import InvalidRequest

Criterion = Callable[..., Any]


@dataclass(frozen=True)
class Stops:
    """What a step means for its candidates.

    Attributes:
        finished: bool[rows], the sequence ends with this token.
        stopped: bool[rows], a stop string or criterion was met; None if the request has none.
        none: whether it is known without looking that no sequence ends.
    """

    finished: Tensor
    stopped: Tensor | None
    none: bool = False


@dataclass(frozen=True)
class Stopping:
    """The conditions that end a sequence.

    Attributes:
        eos_token_ids: ids of which any ends a sequence.
        eos: the same as int64[n] on the device; None if there are none.
        max_length: tokens, prompt included.
        criteria: further conditions, called with `(int64[rows, length], None)`.
    """

    eos_token_ids: frozenset[int]
    eos: Tensor | None
    max_length: int
    criteria: tuple[Criterion, ...]

    def check(self, tokens: Tensor, *, length: int, sequences: Callable[[], Tensor]) -> Stops:
        """Which sequences end with their last token, int64[rows]. Changes nothing.

        Args:
            length: of the sequences, that token included.
            sequences: int64[rows, length], which are asked for only if there are criteria.
        """
        if length >= self.max_length or self.eos is None:
            finished = torch.full(tokens.shape, length >= self.max_length, device=tokens.device)
        else:
            finished = torch.isin(tokens, self.eos)
        if not self.criteria:
            known = length < self.max_length and self.eos is None
            # On the CPU looking means no waiting.
            return Stops(finished, None, none=known or (finished.device.type == "cpu" and not bool(finished.any())))
        stopped = torch.zeros_like(finished)
        for criterion in self.criteria:
            stopped = stopped | _as_rows(criterion(sequences(), None), stopped)
        return Stops(finished | stopped, stopped)

    def reason(self, last_token: int, stopped: bool) -> FinishReason:
        """Why a finished sequence ended; EOS is named first, length last."""
        if last_token in self.eos_token_ids:
            return "eos"
        return "stop" if stopped else "length"


def make_stopping(
    options: Options,
    *,
    prompt_tokens: int,
    device: torch.device,
    tokenizer: Any = None,
    custom: Iterable[Criterion] | None = None,
) -> Stopping:
    """The stopping conditions of one request.

    A criterion of the caller of a type that the options also ask for takes its place, as in transformers.

    Raises:
        InvalidRequest: stop strings without a tokenizer, or that its vocabulary cannot spell;
            criteria that are not a list of callables; a `MaxLengthCriteria` beyond the maximum length.
    """
    max_length = options.lengths(prompt_tokens).maximum
    _require_criteria(custom, max_length)
    merged = merge(_defaults(options, tokenizer), custom or ())
    ids = [token for criterion in merged if _ends_at_eos(criterion) for token in criterion.eos_token_id.tolist()]
    return Stopping(
        eos_token_ids=frozenset(ids),
        eos=torch.tensor(ids, dtype=torch.int64, device=device) if ids else None,
        max_length=max_length,
        criteria=tuple(criterion for criterion in merged if not _ends_at_eos(criterion)),
    )


def _defaults(options: Options, tokenizer: Any) -> Iterable[Criterion]:
    if options.max_time is not None:
        yield hf.MaxTimeCriteria(max_time=options.max_time)
    if options.stop_strings:
        yield _stop_strings(options.stop_strings, tokenizer)
    if options.eos_token_id:
        yield hf.EosTokenCriteria(eos_token_id=list(options.eos_token_id))


def _stop_strings(strings: tuple[str, ...], tokenizer: Any) -> hf.StopStringCriteria:
    if tokenizer is None:
        raise InvalidRequest(
            "`stop_strings` needs the text of each token, and there is no tokenizer. "
            "Pass one to `attach`, or stop at token ids with `eos_token_id`."
        )
    try:
        return hf.StopStringCriteria(stop_strings=list(strings), tokenizer=tokenizer)
    except ValueError as error:
        message = f"the tokenizer's vocabulary cannot spell the `stop_strings` {list(strings)}."
        raise InvalidRequest(message) from error


def _ends_at_eos(criterion: Criterion) -> bool:
    return type(criterion) is hf.EosTokenCriteria


def _require_criteria(custom: Iterable[Criterion] | None, max_length: int) -> None:
    if custom is None:
        return
    if not isinstance(custom, list | tuple) or not all(callable(criterion) for criterion in custom):
        raise InvalidRequest(
            f"`stopping_criteria` must be a list of callables, but is {custom!r}. Put a single one into a list."
        )
    for criterion in custom:
        if isinstance(criterion, hf.MaxLengthCriteria) and criterion.max_length > max_length:
            raise InvalidRequest(
                f"a MaxLengthCriteria of {criterion.max_length} tokens exceeds the maximum of {max_length} "
                "that memory is planned for. Raise `max_new_tokens` instead."
            )


def _as_rows(answer: Any, rows: Tensor) -> Tensor:
    """A criterion's answer as bool[rows]: it may be one bool for all, bool[rows] or bool[rows, 1]."""
    answers: Tensor = torch.as_tensor(answer, dtype=torch.bool, device=rows.device).reshape(-1)
    if answers.numel() not in (1, rows.numel()):
        raise InvalidRequest(
            f"a stopping criterion answered for {answers.numel()} sequences; there are {rows.numel()}. "
            "Return one answer for each row of `input_ids`."
        )
    return answers.expand_as(rows)
