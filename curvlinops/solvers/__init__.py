"""Iterative solvers: pure functions of linear operators, which return what happened."""

from curvlinops.solvers._info import SolverInfo
from curvlinops.solvers.cg import cg

__all__ = ["SolverInfo", "cg"]
