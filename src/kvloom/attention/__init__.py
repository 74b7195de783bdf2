"""Floor 3: attention over the paged store. `plan` says what is read, `native` and `torch_ops` read it, `reference`
defines it."""

from kvloom.attention.plan import GroupPlan, Plan, build_plan
from kvloom.attention.spans import Span
from kvloom.attention.views import View, Views, Wanted

__all__ = ["GroupPlan", "Plan", "Span", "View", "Views", "Wanted", "build_plan"]
