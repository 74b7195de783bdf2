"""Floor 6: the one place that knows cache, model and decoders. `Engine.step` schedules, runs, decides, applies."""

from kvloom.engine.engine import Engine
from kvloom.engine.events import Event, RequestFinished, StepDone
from kvloom.engine.request import Request, Row, Usage

__all__ = ["Engine", "Event", "Request", "RequestFinished", "Row", "StepDone", "Usage"]
