"""Kernels in C++ for CPUs: they know shapes and pointers, neither cache nor models."""

from kvloom.native.library import Absent, Library, native

__all__ = ["Absent", "Library", "native"]
