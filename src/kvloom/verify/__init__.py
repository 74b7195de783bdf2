"""Cached output equals uncached output: `verify` proves it on a user's own model.

The reference is the model's own forward pass over whole sequences, in which nothing is ours; or, where every operation
is native, whole sequences through the same kernels, which are then compared with that forward pass. Six checks compare
it with the cache, and the cache with itself: cold and warm, whole and in chunks, alone and in a batch. Where
the cache is lossy, a recomputation on the same kind of cache is the reference, and its distance from the model is
reported.
"""

from kvloom.verify.report import Check, Cost, Divergence, Report, Verdict
from kvloom.verify.verifying import verify

__all__ = ["Check", "Cost", "Divergence", "Report", "Verdict", "verify"]
