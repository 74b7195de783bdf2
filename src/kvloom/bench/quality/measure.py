"""What a smaller cache costs: policies and codecs beside the full cache, on the same texts and questions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvloom.bench.quality.decode import UNCOUNTED, Decoded, Subject
from kvloom.bench.quality.report import Answer, Outcome, QualityReport
from kvloom.bench.quality.settings import POLICIES, Setting, all_settings
from kvloom.bench.quality.texts import Passage, RecallText, cut_passages, plant_facts, read_text
from kvloom.cache.codec import CODECS
from kvloom.cache.retention.base import check_count
from kvloom.engine import Engine
from kvloom.errors import InvalidRequest
from kvloom.language_model.model import LanguageModel
from kvloom.units import dtype_name

KEEPS = (0.5, 0.25, 0.125)
CONTEXT_TOKENS = 768


def measure_quality(
    lm: LanguageModel,
    *,
    text: str | Path | None = None,
    policies: Iterable[str] = tuple(POLICIES),
    keeps: Sequence[float] = KEEPS,
    codecs: Iterable[str] = CODECS,
    prompt_tokens: int | None = None,
    new_tokens: int = 32,
    passages: int = 4,
    recall_texts: int = 8,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> QualityReport:
    """Measure what retention policies and codecs cost, beside the full cache and beside policies that know nothing.

    Passages of a held-out text are computed, cut down, and decoded on as they go on (teacher-forced). Texts with two
    planted facts are computed and cut down before either fact is asked for.

    Args:
        text: a file of text that the model was not trained on; by default a tale that comes with KVLoom.
        policies: names from `POLICIES`.
        keeps: the shares of a context's tokens that may stay, each between 0 and 1.
        codecs: how keys and values are kept, each with every policy.
        prompt_tokens: length of the contexts; by default 768, or three quarters of a shorter context of the model.
        new_tokens: at how many positions of each passage distributions are compared.
        passages, recall_texts: how many; fewer passages if the text ends before.
        seed: of the planted facts and of random choices.
        on_progress: called with what runs next, how many settings are done, and how many there are.

    Returns:
        a `QualityReport`, the full cache's `Outcome` first.

    Raises:
        InvalidRequest: names, shares, lengths or a text that make no sense for this model. CacheFull: the budget is
            too small.
    """
    settings = all_settings(policies, keeps, codecs)
    for name, count in {"new_tokens": new_tokens, "passages": passages, "recall_texts": recall_texts}.items():
        check_count(name, count, least=1)
    context_tokens = _context_tokens(lm, prompt_tokens, new_tokens)
    held_out = read_text(text)
    probe = _Probe(
        cut_passages(
            held_out, lm.tokenizer, count=passages, context_tokens=context_tokens, new_tokens=new_tokens + UNCOUNTED
        ),
        plant_facts(held_out, lm.tokenizer, count=recall_texts, context_tokens=context_tokens, seed=seed),
        seed,
    )
    reference: Run | None = None
    outcomes: list[Outcome] = []
    refused: list[tuple[Setting, str]] = []
    for index, setting in enumerate(settings):
        if on_progress is not None:
            on_progress(str(setting), index, len(settings))
        try:
            run = probe.run(model_under(lm, setting), setting)
        except InvalidRequest as error:
            if reference is None:
                raise
            refused.append((setting, str(error)))
            continue
        # Of the distributions only the reference's are kept: a large vocabulary makes them large.
        reference = reference or run
        outcomes.append(compare(setting, run, reference, probe.targets))
    assert reference is not None, "the first setting is the full cache"
    return QualityReport(
        dtype=dtype_name(lm.binding.dtype),
        device=str(lm.binding.device),
        threads=torch.get_num_threads(),
        context_tokens=context_tokens,
        passages=len(probe.passages),
        positions=len(probe.targets),
        recall_texts=recall_texts,
        seed=seed,
        nll=float(_surprise(reference.log_probabilities, probe.targets).mean()),
        outcomes=tuple(outcomes),
        refused=tuple(refused),
    )


def _context_tokens(lm: LanguageModel, prompt_tokens: int | None, new_tokens: int) -> int:
    """How long contexts are: so that what follows them fits the model."""
    if lm.engine.cache is None:
        raise InvalidRequest(
            "this model keeps no keys and values, so there is nothing to keep less of. Measure its speed instead."
        )
    if lm.tokenizer is None:
        raise InvalidRequest("quality is measured on text, and this model has no tokenizer. Attach one.")
    longest = lm.max_tokens or 1 << 30
    wanted = min(CONTEXT_TOKENS, longest * 3 // 4) if prompt_tokens is None else prompt_tokens
    check_count("prompt_tokens", wanted, least=1)
    if wanted + new_tokens + UNCOUNTED > longest:
        raise InvalidRequest(
            f"`prompt_tokens={wanted}` and `new_tokens={new_tokens}` exceed the model's context of {longest:,}. "
            "Lower one of them."
        )
    return wanted


def model_under(lm: LanguageModel, setting: Setting) -> LanguageModel:
    """The same weights on a cold cache that a setting needs: nothing of the user's is found or touched."""
    cache = lm.engine.cache
    assert cache is not None, "checked by _context_tokens"
    engine = Engine(
        lm.binding,
        budget_bytes=cache.store.allocated_bytes,
        block_tokens=cache.layout.block_tokens,
        codec=setting.codec,
        block_bounds=setting.reads_by_bounds,
    )
    return LanguageModel(engine, lm.tokenizer, None)


@dataclass(frozen=True)
class Run:
    """What was seen under one setting.

    Attributes:
        log_probabilities: float32[positions, vocab].
        answers: one for each question.
    """

    log_probabilities: Tensor
    answers: tuple[Answer, ...]
    cache_bytes: int
    step_seconds: float


@dataclass(frozen=True)
class _Probe:
    """The texts and questions that every setting meets."""

    passages: list[Passage]
    recall_texts: list[RecallText]
    seed: int

    @property
    def targets(self) -> Tensor:
        """int64[positions], the true next token at each position that is compared."""
        return torch.tensor([token for own in self.passages for token in own.continuation_ids[UNCOUNTED:]])

    def run(self, lm: LanguageModel, setting: Setting) -> Run:
        """Decode all of them under a setting."""
        subject = Subject(lm, setting, seed=self.seed)
        decoded = [
            subject.decode(own.context_ids, [own.continuation_ids], index=index)[0]
            for index, own in enumerate(self.passages)
        ]
        answers = [answer for index, own in enumerate(self.recall_texts) for answer in _ask(subject, own, index)]
        return Run(
            torch.cat([own.logits.log_softmax(-1) for own in decoded]),
            tuple(answers),
            round(statistics.mean(own.cache_bytes for own in decoded)),
            statistics.median(seconds for own in decoded for seconds in own.seconds),
        )


def _ask(subject: Subject, text: RecallText, index: int) -> list[Answer]:
    """Ask each question of a text, behind the same context."""
    longest = max(len(own.answer_ids) for own in text.questions)
    asked = subject.decode(text.context_ids, [own.token_ids for own in text.questions], index=index, free=longest)
    return [
        Answer(own.depth, _last(decoded, longest)[: len(own.answer_ids)] == own.answer_ids)
        for own, decoded in zip(text.questions, asked, strict=True)
    ]


def _last(decoded: Decoded, count: int) -> list[int]:
    return decoded.new_ids[-count:]


def compare(setting: Setting, run: Run, full: Run, targets: Tensor) -> Outcome:
    """What a setting costs beside the full cache."""
    recallable = [index for index, own in enumerate(full.answers) if own.right]
    divergences = (full.log_probabilities.exp() * (full.log_probabilities - run.log_probabilities)).sum(-1)
    agree = run.log_probabilities.argmax(-1) == full.log_probabilities.argmax(-1)
    change = _surprise(run.log_probabilities, targets) - _surprise(full.log_probabilities, targets)
    return Outcome(
        setting=setting,
        kl=float(divergences.mean()),
        agreement=float(agree.float().mean()),
        nll_change=float(change.mean()),
        answers=run.answers,
        recalled=sum(run.answers[index].right for index in recallable),
        recallable=len(recallable),
        cache_bytes=run.cache_bytes,
        step_seconds=run.step_seconds,
    )


def _surprise(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """float32[positions]: the negative log-likelihood of the true tokens, in nats."""
    return -log_probabilities.gather(1, targets[:, None].to(log_probabilities.device))[:, 0]
