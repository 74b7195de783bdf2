"""`kvloom.generate`: the call of `model.generate`, on the paged cache. What is taken, and what not: docs/dropin.md."""

from kvloom.dropin.generating import generate

__all__ = ["generate"]
