"""Floor 3: attention over the paged store. `plan` says what is read, `torch_ops` reads it, `reference` defines it."""

from kvloom.attention.plan import GroupPlan, Plan, Span, build_plan

__all__ = ["GroupPlan", "Plan", "Span", "build_plan"]
