"""Iterative solvers: pure functions of linear operators, which return what happened."""

from curvlinops.solvers._info import SolverInfo
from curvlinops.solvers.cg import cg
from curvlinops.solvers.eigsh import eigsh
from curvlinops.solvers.lsmr import lsmr
from curvlinops.solvers.minres import minres
from curvlinops.solvers.nystrom import nystrom
from curvlinops.solvers.svds import svds

__all__ = [
    "SolverInfo",
    "cg",
    "eigsh",
    "lsmr",
    "minres",
    "nystrom",
    "svds",
]
