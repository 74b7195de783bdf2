"""The options of decoding: what each may be, which are refused, and how those of one request are resolved."""

from kvloom.decoding.options.checks import CHECKS
from kvloom.decoding.options.options import Lengths, Options
from kvloom.decoding.options.refusals import ALREADY_SO, REFUSED
from kvloom.decoding.options.resolving import resolve

__all__ = ["ALREADY_SO", "CHECKS", "REFUSED", "Lengths", "Options", "resolve"]
