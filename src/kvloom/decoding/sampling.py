"""Greedy decoding and sampling: each row chooses its next token by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvloom.decoding.base import HostStep, Hypothesis, Step
from kvloom.decoding.history import History
from kvloom.decoding.logits import split_off_limits
from kvloom.decoding.logprobs import Logprobs
from kvloom.decoding.randomness import Uniforms, sample_seed
from kvloom.decoding.shared import Shared, filled
from kvloom.decoding.trace import Record, Trace
from kvloom.native.draw import Limits, draw


@dataclass(frozen=True)
class SamplingStep(Step):
    """A `Step` with what the next one needs.

    Attributes:
        record: what the trace keeps of it.
    """

    record: Record


class GreedyOrSampling:
    """Greedy decoding (one sequence) or sampling (`num_return_sequences` independent ones).

    The first decision fans out from row 0. Rows finish independently: `rows` counts those that go on, in the
    order of the samples. Processors see the rows that go on, prompt and new tokens of each.

    Sampling inverts the cumulative distribution with one uniform number a row and step, drawn from the sample's own
    generator (`native.draw`). So a sample does not depend on its batch mates, and differs between devices
    only as far as their logits do.
    """

    def __init__(self, prompt_ids: list[int], shared: Shared, *, samples: int = 1) -> None:
        """A decoder of `samples` sequences; greedy if `shared.seed` is None."""
        self.seed = shared.seed
        self._prompt_ids = list(prompt_ids)
        self._limits = Limits()
        if shared.seed is not None and not shared.observer.output_scores:
            # Scores that nobody asks for need not be written down to be drawn from.
            processors, self._limits = split_off_limits(shared.processors)
            shared = replace(shared, processors=processors)
        self._shared = shared
        self._trace = Trace(shared.observer)
        self._history: History | None = None
        if shared.reads_sequences:
            prompt = torch.tensor([prompt_ids], dtype=torch.int64, device=shared.device)
            self._history = History(prompt.expand(samples, -1))
        self._live = list(range(samples))
        self._live_index = self._places = torch.arange(samples, device=shared.device)
        self._ends: dict[int, tuple[int, int]] = {}
        self._uniforms = self._make_uniforms(shared.seed, samples)

    def _make_uniforms(self, seed: int | None, samples: int) -> Uniforms | None:
        if seed is None:
            return None
        return Uniforms([sample_seed(seed, index) for index in range(samples)], self._shared.device)

    @property
    def done(self) -> bool:
        """Whether every sequence has ended."""
        return not self._live

    @property
    def fill(self) -> int:
        """PAD, or the first EOS where there is no PAD; -1 where there is neither."""
        return self._shared.fill

    @property
    def rows(self) -> int:
        """1 for the first decision, then the number of sequences that go on."""
        return len(self._live) if len(self._trace) or self.done else 1

    @torch.no_grad()
    def decide(self, logits: Tensor) -> Step:
        """Choose a token for each row of `logits`, float[rows, vocab]. Changes no state."""
        assert logits.shape[0] == self.rows, f"{logits.shape[0]} rows of logits for {self.rows} sequences"
        parents = self._parents()
        raw = self._shared.observer.logprobs(logits)
        scores = None if self._takes_the_likeliest else self._processed(self._fan_out(logits))
        tokens, logprobs = self._choose(scores, raw, parents)
        length = len(self._prompt_ids) + len(self._trace) + 1
        stops = self._shared.stopping.check(tokens, length=length, sequences=lambda: self._read().followed_by(tokens))
        extras = self._shared.observer.extras(logits, raw, scores)
        return SamplingStep(
            tokens=tokens,
            parents=parents,
            finished=stops.finished,
            logprobs=logprobs,
            record=Record(tokens, parents, logprobs, stops.stopped, extras),
        )

    def _parents(self) -> Tensor:
        """int64[rows_after]: each row continues itself, except that all samples start from the prompt."""
        return self._places if len(self._trace) else torch.zeros_like(self._places)

    def _fan_out(self, rows: Tensor) -> Tensor:
        """The first row for each sample in the first step; then each sample has one of its own."""
        return rows if len(self._trace) else rows.expand(len(self._live), *rows.shape[1:])

    def _read(self) -> History:
        """Prompt and new tokens of the rows."""
        assert self._history is not None, "tokens are kept for those who read sequences"
        return self._history

    def _processed(self, scores: Tensor) -> Tensor:
        if not self._shared.processors:
            return scores.float() if self._shared.observer.output_scores else scores
        # A processor may write into the scores; the logits are the engine's.
        own = scores.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return self._shared.process(self._read().rows.contiguous(), own)

    @property
    def _takes_the_likeliest(self) -> bool:
        """Whether the logits alone decide, so that no scores need be written down."""
        observer = self._shared.observer
        untouched = self._uniforms is None and not self._shared.processors and not observer.mend
        return untouched and not observer.output_scores

    def _choose(self, scores: Tensor | None, raw: Logprobs, parents: Tensor) -> tuple[Tensor, Tensor]:
        """The token of each row, int64[rows], and its log-probability; NaN where no token was possible at all."""
        if scores is None:
            likeliest, logprobs = raw.likeliest
            return self._fan_out(likeliest), self._fan_out(logprobs)
        if self._uniforms is None:
            tokens = scores.argmax(dim=-1)
            possible = scores.gather(1, tokens[:, None])[:, 0] > -torch.inf
        else:
            uniforms = self._uniforms.at(len(self._trace))[self._live_index]
            tokens, possible = draw(scores, uniforms, self._limits, self._shared.observer.library)
        return tokens, torch.where(possible, raw.of(parents, tokens), torch.nan)

    def advance(self, step: Step, host: HostStep) -> None:
        """Take over `step`, which the engine has applied; finished rows leave."""
        assert isinstance(step, SamplingStep), "advance takes a step that this decoder decided"
        position = len(self._trace)
        kept = [row for row, finished in enumerate(host.finished) if not finished]
        self._ends |= {self._live[row]: (position, row) for row, finished in enumerate(host.finished) if finished}
        index = self._places
        if len(kept) < len(host.finished):
            index = torch.tensor(kept, dtype=torch.int64, device=step.tokens.device)
            self._live_index, self._places = self._live_index[index], self._places[: len(kept)]
            self._live = [self._live[row] for row in kept]
        if self._history is not None:
            self._history.advance(step.tokens, None if index is self._places else index)
        self._trace.append(step.record, index)

    def results(self) -> list[Hypothesis]:
        """The sequences of a request that is done, in the order of the samples."""
        assert self.done, "results are read when every sequence has ended"
        paths = self._trace.paths([self._ends[sample] for sample in sorted(self._ends)])
        return [
            Hypothesis(
                token_ids=path.token_ids,
                logprobs=path.logprobs,
                finish_reason=self._shared.stopping.reason(path.token_ids[-1], path.stopped),
                rows=path.rows,
                top_logprobs=path.top_logprobs,
                logits=path.logits,
                scores=path.scores,
            )
            for path in paths
        ]

    def sequences(self) -> Tensor:
        """int64[num_return_sequences, prompt + longest], short ones filled with PAD as transformers does."""
        return filled(self._prompt_ids, [found.token_ids for found in self.results()], self.fill)
