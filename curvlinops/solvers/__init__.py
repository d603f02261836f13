"""Iterative solvers: pure functions of linear operators, which return what happened."""

from curvlinops.solvers._info import SolverInfo
from curvlinops.solvers.cg import cg
from curvlinops.solvers.lsmr import lsmr
from curvlinops.solvers.minres import minres

__all__ = [
    "SolverInfo",
    "cg",
    "lsmr",
    "minres",
]
