"""What was found about a setting, and how it reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvloom.bench.quality.settings import Setting


@dataclass(frozen=True)
class Answer:
    """Whether one question was answered right, and how deep in its text the fact stood (0 to 1)."""

    depth: float
    right: bool


@dataclass(frozen=True)
class Outcome:
    """What a setting costs and saves.

    Attributes:
        kl: mean Kullback-Leibler divergence of the next token's distribution from the full cache's, in nats.
        agreement: share of positions at which the likeliest token is the full cache's.
        nll_change: mean change of the true token's negative log-likelihood, in nats.
        answers: of the recall questions, in order.
        recalled: of the questions that the full cache answers, how many this setting answers; out of `recallable`.
        cache_bytes: keys and values held after the last step, mean over passages.
        step_seconds: median over all decode steps.
    """

    setting: Setting
    kl: float
    agreement: float
    nll_change: float
    answers: tuple[Answer, ...]
    recalled: int
    recallable: int
    cache_bytes: int
    step_seconds: float

    @property
    def recall(self) -> float | None:
        """Recall given that the full cache recalls; None if it recalls nothing."""
        return self.recalled / self.recallable if self.recallable else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        fields = asdict(self)
        return {**fields.pop("setting"), **fields, "recall": self.recall}


@dataclass(frozen=True)
class QualityReport:
    """What `measure_quality` found.

    Attributes:
        context_tokens: of each passage; recall texts have at most as many.
        positions: at how many positions distributions were compared, over all passages.
        nll: the full cache's mean negative log-likelihood there, in nats.
        outcomes: the full cache's first.
        refused: settings that this model cannot honour, and why.
    """

    dtype: str
    device: str
    threads: int
    context_tokens: int
    passages: int
    positions: int
    recall_texts: int
    seed: int
    nll: float
    outcomes: tuple[Outcome, ...]
    refused: tuple[tuple[Setting, str], ...] = ()

    @property
    def reference(self) -> Outcome:
        """The full cache's outcome."""
        return self.outcomes[0]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            **asdict(self),
            "outcomes": [own.to_dict() for own in self.outcomes],
            "refused": [{**asdict(setting), "reason": reason} for setting, reason in self.refused],
        }
