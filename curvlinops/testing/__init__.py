"""The conformance kit: proofs to run on operators and models of one's own.

:func:`check_operator` checks all that a linear operator must do. :func:`check_curvature` compares
every exact matrix of a model with autograd. :func:`check_kfac` finds out what must hold for KFAC
and EKFAC of a model, checks that, and reports how far each block is from the exact one. They raise
an ``AssertionError`` that names the first property that fails, and by how much.
"""

from curvlinops.testing._curvature import check_curvature
from curvlinops.testing._curvature_report import CurvatureProperty, CurvatureReport
from curvlinops.testing._kfac import check_kfac
from curvlinops.testing._kfac_report import KFACReport
from curvlinops.testing.operators import check_operator

__all__ = [
    "CurvatureProperty",
    "CurvatureReport",
    "KFACReport",
    "check_curvature",
    "check_kfac",
    "check_operator",
]
