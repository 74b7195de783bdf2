"""Measuring a model on the machine it is to run on: what the cache gains, and how near to the limit a step is."""

from kvloom.bench.speed import Growth, SpeedReport, Work, measure_speed

__all__ = ["Growth", "SpeedReport", "Work", "measure_speed"]
