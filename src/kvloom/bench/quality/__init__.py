"""What a smaller cache costs: retention policies and codecs, measured on held-out text and on facts to be recalled."""

from kvloom.bench.quality.measure import measure_quality
from kvloom.bench.quality.report import Answer, Outcome, QualityReport
from kvloom.bench.quality.settings import CONTROLS, POLICIES, Setting

__all__ = ["CONTROLS", "POLICIES", "Answer", "Outcome", "QualityReport", "Setting", "measure_quality"]
