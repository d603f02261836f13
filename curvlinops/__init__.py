"""Linear operators for the curvature of neural networks, in PyTorch."""

from curvlinops._algebra import IdentityLinearOperator
from curvlinops._torch_base import PyTorchLinearOperator, record_gradients
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.curvature import CurvatureLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.ggn import GGNLinearOperator
from curvlinops.hessian import HessianLinearOperator
from curvlinops.kfac import KFACLinearOperator
from curvlinops.kfac_utils import (
    FisherType,
    FromCanonicalLinearOperator,
    KFACType,
    ToCanonicalLinearOperator,
)
from curvlinops.kronecker import KroneckerProductLinearOperator
from curvlinops.outer import OuterProductLinearOperator
from curvlinops.solvers import cg
from curvlinops.submatrix import SubmatrixLinearOperator

__all__ = [
    "BlockDiagonalLinearOperator",
    "CurvatureLinearOperator",
    "DiagonalLinearOperator",
    "EighDecomposedLinearOperator",
    "FisherType",
    "FromCanonicalLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "IdentityLinearOperator",
    "KFACLinearOperator",
    "KFACType",
    "KroneckerProductLinearOperator",
    "OuterProductLinearOperator",
    "PyTorchLinearOperator",
    "SubmatrixLinearOperator",
    "TensorLinearOperator",
    "ToCanonicalLinearOperator",
    "cg",
    "record_gradients",
]
