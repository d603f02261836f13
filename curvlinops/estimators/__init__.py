"""Estimators from products with random vectors: trace, diagonal, norm, spectrum."""

from curvlinops.estimators.diagonal import hutchinson_diag, xdiag
from curvlinops.estimators.norm import hutchinson_squared_fro
from curvlinops.estimators.quadrature import slq_logdet, slq_trace
from curvlinops.estimators.spectrum import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
)
from curvlinops.estimators.trace import hutchinson_trace, hutchpp_trace, xtrace

__all__ = [
    "LanczosApproximateLogSpectrumCached",
    "LanczosApproximateSpectrumCached",
    "hutchinson_diag",
    "hutchinson_squared_fro",
    "hutchinson_trace",
    "hutchpp_trace",
    "lanczos_approximate_log_spectrum",
    "lanczos_approximate_spectrum",
    "slq_logdet",
    "slq_trace",
    "xdiag",
    "xtrace",
]
