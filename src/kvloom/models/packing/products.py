"""Modules that multiply rows with a matrix and add a bias, by whatever name: those whose weight can be packed."""

from __future__ import annotations

from torch import Tensor, nn

KEEPS_TRANSPOSED = {
    "torch.nn.modules.linear.Linear": False,
    "transformers.pytorch_utils.Conv1D": True,
    "transformers.models.falcon.modeling_falcon.FalconLinear": False,
}
"""Classes that are rows @ matrix.T + bias and nothing else, and whether their weight is the matrix transposed.

By name, so that none is imported for being known; and none is known by a trial, since what quantizers put in the
place of a linear layer comes as near to the product as rounding does.
"""


def is_product(module: nn.Module) -> bool:
    """Whether it is of such a class itself, not of one that inherits from it."""
    return _class_name(module) in KEEPS_TRANSPOSED


def keeps_transposed(module: nn.Module) -> bool:
    """Whether the weight of a product is [inner, outputs]."""
    return KEEPS_TRANSPOSED[_class_name(module)]


def as_matrix(weight: Tensor, *, transposed: bool) -> Tensor:
    """[outputs, inner] of a weight, or the weight of a matrix: a view."""
    return weight.T if transposed else weight


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
