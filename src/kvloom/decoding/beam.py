"""Beam search and beam sampling with the arithmetic of transformers 5.23.

Scores are float32 sums of processed log-probabilities. A step looks at several candidates for each beam, so
that enough of them go on when others end. Of the candidates that end, only those among the first `num_beams`
become finished hypotheses; the best `num_beams` that do not end are the next beams. Finished hypotheses are
ranked by score / new_tokens^length_penalty. The order of the additions is transformers' as well: the score
of what cannot happen is lowered by 1e9, and which of two such scores wins is a matter of rounding.

transformers searches for a batch of prompts at once, and so must freeze the prompts that are done until the
last one is. Here each prompt has a search of its own, which ends when it is done; there is nothing to freeze.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.decoding.base import HostStep, Hypothesis, Step
from kvloom.decoding.beam_state import IMPOSSIBLE, BeamRules, Beams, BeamStep, Candidates, Finished, Seen
from kvloom.decoding.logprobs import Logprobs
from kvloom.decoding.randomness import generator_for
from kvloom.decoding.shared import Shared, filled
from kvloom.decoding.stopping import Stops
from kvloom.decoding.trace import Path, Record, Trace
from kvloom.native.logits import Continuations


class BeamSearch:
    """Beam search over one prompt; with a seed, beam sampling.

    The first decision takes one row of logits and names row 0 as the parent of all beams. From then on the
    rows are the running beams. A finished hypothesis leaves them at once; `finished` of a step is False for
    every row until the whole search ends, and then True for every row.

    Beam sampling draws its candidates without replacement by an exponential race (Efraimidis and Spirakis,
    2006), as `torch.multinomial` does, with noise made on the CPU: where the logits are the same, a seed
    gives what transformers gives on the CPU after `torch.manual_seed(seed)`.
    """

    def __init__(self, prompt_ids: list[int], shared: Shared, *, rules: BeamRules) -> None:
        """A search by `rules`; beam sampling if `shared` has a seed."""
        self.seed = shared.seed
        self._prompt_ids = list(prompt_ids)
        self._shared = shared
        self._rules = rules
        self._trace = Trace(shared.observer)
        self._generator = None if shared.seed is None else generator_for(shared.seed)
        self._beams = _start(prompt_ids, rules.num_beams, shared)
        self._goes_on = torch.zeros((), dtype=torch.bool, device=shared.device)
        self._done = False

    @property
    def done(self) -> bool:
        """Whether the search has ended."""
        return self._done

    @property
    def rows(self) -> int:
        """1 for the first decision, then `num_beams`."""
        if self._done:
            return 0
        return self._rules.num_beams if len(self._trace) else 1

    @property
    def steps(self) -> int:
        """How many decisions have been taken over."""
        return len(self._trace)

    @torch.no_grad()
    def decide(self, logits: Tensor) -> Step:
        """Choose the next beams from `logits`, float[rows, vocab]. Changes no state."""
        assert logits.shape[0] == self.rows, f"{logits.shape[0]} rows of logits for {self.rows} beams"
        raw = self._shared.observer.logprobs(logits)
        generator = None if self._generator is None else self._generator.clone_state()
        processed = None if self._needs_no_scores(logits) else self._processed(logits, raw)
        found = self._draw(processed, raw, generator)
        candidates, stops = self._candidates(found)
        # Before the first decision all beams are the one row of the prompt.
        parents = found.rows if len(self._trace) else torch.zeros_like(found.rows)
        quiet = processed is None and stops.none and self._beams.none_finished
        beams, kept, over = self._next(candidates, quiet=quiet)
        extras = self._shared.observer.extras(logits, raw, processed)
        return BeamStep(
            tokens=found.tokens[kept],
            parents=parents[kept],
            finished=over.expand(kept.shape[0]),
            logprobs=found.logprobs[kept],
            beams=beams,
            record=Record(found.tokens, parents, found.logprobs, stops.stopped, extras),
            kept=kept,
            generator=generator,
        )

    def _needs_no_scores(self, logits: Tensor) -> bool:
        """Whether the best continuations can be found without writing down all scores."""
        observer = self._shared.observer
        untouched = self.seed is None and not self._shared.processors and not observer.mend
        return untouched and self._rules.candidates <= logits.shape[1] and not observer.output_scores

    def _draw(self, processed: Tensor | None, raw: Logprobs, generator: torch.Generator | None) -> Continuations:
        """The candidates: which tokens follow which beams."""
        if processed is None:
            return raw.best(self._beams.scores, self._rules.candidates)
        flat = (processed + self._beams.scores[:, None]).reshape(-1)
        chosen = _draw(flat, self._rules.candidates, generator)
        scores, vocab = flat[chosen], processed.shape[1]
        beams, tokens = chosen // vocab, chosen % vocab
        # A score that is not a number orders nothing: the engine must hear of it.
        known = raw.of(beams if len(self._trace) else torch.zeros_like(beams), tokens).where(~scores.isnan(), torch.nan)
        return Continuations(scores, beams, tokens, known)

    def _processed(self, logits: Tensor, raw: Logprobs) -> Tensor:
        """float32[num_beams, vocab]: what the processors make of each beam's log-probabilities."""
        logprobs = torch.log_softmax(logits.float(), dim=-1) if self._shared.observer.mend else raw.all
        logprobs = logprobs.expand(self._rules.num_beams, -1)
        if self._shared.processors:
            # A processor may write into what it is given.
            return self._shared.process(_there(self._beams.sequences), logprobs.clone())
        return logprobs

    def _candidates(self, found: Continuations) -> tuple[Candidates, Stops]:
        """The candidates of this step with their sequences, if anybody reads these, and which of them end."""
        sequences = None
        if self._beams.sequences is not None:
            sequences = torch.cat([self._beams.sequences[found.rows], found.tokens[:, None]], dim=1)
        length = len(self._prompt_ids) + len(self._trace) + 1
        stops = self._shared.stopping.check(found.tokens, length=length, sequences=lambda: _there(sequences))
        return Candidates(found.scores, sequences, stops.finished), stops

    def _next(self, candidates: Candidates, *, quiet: bool) -> tuple[Beams, Tensor, Tensor]:
        """The state after this step, which candidates run on, int64[num_beams], and whether the search is over.

        Args:
            quiet: whether no candidate ends, nor any has before: then there is little to be done.
        """
        running = candidates.scores if quiet else candidates.scores + candidates.ends.float() * IMPOSSIBLE
        best = running.topk(self._rules.num_beams)
        sequences = None if candidates.sequences is None else candidates.sequences[best.indices]
        if quiet:
            return Beams(sequences, best.values, self._beams.finished, none_finished=True), best.indices, self._goes_on
        beams = Beams(sequences, best.values, self._beams.finished.best_with(self._ended(candidates)))
        return beams, best.indices, self._over(beams, candidates)

    def _ended(self, candidates: Candidates) -> Finished:
        """The candidates as hypotheses, out of the running unless they end here and are good enough."""
        rules, step = self._rules, len(self._trace)
        order = torch.arange(rules.candidates, device=candidates.scores.device)
        real = candidates.ends & (order < rules.num_beams)
        scores = candidates.scores / rules.divisor(step + 1) + (~real).float() * IMPOSSIBLE
        return Finished(scores, real, torch.full_like(order, step), order)

    def _over(self, beams: Beams, candidates: Candidates) -> Tensor:
        """bool[]: nothing better can come, enough has been found, or nothing can go on."""
        enough = beams.finished.real.all() & (self._rules.early_stopping is True)
        return ~self._can_improve(beams) | enough | candidates.ends.all()

    def _can_improve(self, beams: Beams) -> Tensor:
        """bool[]: whether the best beam, at the length it may hope for, beats a finished hypothesis."""
        finished = beams.finished
        length = self._rules.hopeful_length(len(self._trace) + 1)
        best = beams.scores[0] / self._rules.divisor(length)
        return (best > torch.where(finished.real, finished.scores.min(), IMPOSSIBLE)).any()

    def advance(self, step: Step, host: HostStep) -> None:
        """Take over `step`, which the engine has applied."""
        assert isinstance(step, BeamStep), "advance takes a step that this decoder decided"
        self._trace.append(step.record, step.kept)
        self._beams = step.beams
        self._generator = step.generator
        self._done = all(host.finished)

    def results(self) -> list[Hypothesis]:
        """The best `num_return_sequences` hypotheses, best first.

        If processors forbid so much that fewer exist, the last ones are what transformers returns then: they
        score -1e9 or less, and may be empty.
        """
        assert self._done, "results are read when the search has ended"
        finished, wanted = self._beams.finished, self._rules.num_return_sequences
        ends = torch.stack([finished.steps, finished.candidates], dim=1)[:wanted].tolist()
        paths = self._trace.paths([(step, candidate) for step, candidate in ends])
        scores = finished.scores[:wanted].tolist()
        return [self._hypothesis(path, score) for path, score in zip(paths, scores, strict=True)]

    def _hypothesis(self, path: Path, score: float) -> Hypothesis:
        last = path.token_ids[-1] if path.token_ids else -1
        return Hypothesis(
            token_ids=path.token_ids,
            logprobs=path.logprobs,
            finish_reason=self._shared.stopping.reason(last, path.stopped),
            rows=path.rows,
            score=score,
            top_logprobs=path.top_logprobs,
            logits=path.logits,
            scores=path.scores,
        )

    def rows_seen(self) -> Seen:
        """Logits and scores of all running beams, of each step, as far as they were asked for."""
        beams = self._rules.num_beams
        return Seen([rows.float().expand(beams, -1) for rows in self._trace.logits], self._trace.scores)

    @property
    def fill(self) -> int:
        """PAD or EOS, as transformers chooses; -1 where there is no EOS."""
        return self._shared.fill

    def sequences(self) -> Tensor:
        """int64[num_return_sequences, prompt + longest], short ones filled as transformers does."""
        return filled(self._prompt_ids, [found.token_ids for found in self.results()], self.fill)


def _start(prompt_ids: list[int], num_beams: int, shared: Shared) -> Beams:
    device = shared.device
    sequences = torch.tensor([prompt_ids] * num_beams, dtype=torch.int64, device=device)
    # All beams start alike: only the first may be continued, or they would all choose the same tokens.
    scores = torch.full((num_beams,), IMPOSSIBLE, dtype=torch.float32, device=device)
    scores[0] = 0.0
    return Beams(
        sequences=sequences if shared.reads_sequences else None,
        scores=scores,
        finished=Finished.none(num_beams, device),
        none_finished=True,
    )


def _there(sequences: Tensor | None) -> Tensor:
    assert sequences is not None, "tokens are kept for those who read sequences"
    return sequences


def _draw(scores: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """int64[count] indices into `scores`: the best, or, with a generator, drawn without replacement."""
    if generator is None:
        return scores.topk(count).indices
    probabilities = torch.softmax(scores, dim=-1)
    noise = torch.empty(scores.shape, dtype=scores.dtype).exponential_(generator=generator)
    return (probabilities / noise.to(scores.device)).topk(count).indices
