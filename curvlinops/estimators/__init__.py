"""Estimators from products with random vectors: trace, diagonal, norm."""

from curvlinops.estimators.diagonal import hutchinson_diag, xdiag
from curvlinops.estimators.norm import hutchinson_squared_fro
from curvlinops.estimators.trace import hutchinson_trace, hutchpp_trace, xtrace

__all__ = [
    "hutchinson_diag",
    "hutchinson_squared_fro",
    "hutchinson_trace",
    "hutchpp_trace",
    "xdiag",
    "xtrace",
]
