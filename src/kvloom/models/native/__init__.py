"""Models, or decoder layers of them, that run in the native kernels."""

from kvloom.models.native.path import NativePath

__all__ = ["NativePath"]
