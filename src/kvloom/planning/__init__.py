"""How much memory a request will take, before anything is allocated: from a model's config alone, without weights.

Nothing here counts by itself. Layers come from the probe that also attaches models, blocks from the formula by
which admission reserves them, bytes from the cache's own layout, scratch from a rehearsed step.
"""

from kvloom.planning.making import plan, plan_for
from kvloom.planning.report import GroupPlan, MemoryPlan
from kvloom.planning.weights import Weights, count_weights

__all__ = ["GroupPlan", "MemoryPlan", "Weights", "count_weights", "plan", "plan_for"]
