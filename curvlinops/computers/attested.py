"""Factors that are sums of outer products by construction, so that it need not be checked."""

from __future__ import annotations

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# How often they had been changed when this was known.
_VERSIONS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def attest(matrix: Tensor) -> None:
    """Note that a matrix is symmetric and positive semi-definite, if it is finite."""
    if not matrix.is_inference():  # changes of which are not counted
        _VERSIONS[matrix] = matrix._version


def is_attested(matrix: Tensor) -> bool:
    """Return whether this was noted of a matrix that was not changed since."""
    return not matrix.is_inference() and _VERSIONS.get(matrix) == matrix._version


__all__ = ["attest", "is_attested"]
