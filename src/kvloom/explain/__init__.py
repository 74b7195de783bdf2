"""Why keys and values are cached and queries are not, shown on a model's real attention."""

from kvloom.explain.observe import Observation, observe
from kvloom.explain.page import write_page

__all__ = ["Observation", "observe", "write_page"]
