"""Linear operators for the curvature of neural networks, in PyTorch."""

from curvlinops._algebra import IdentityLinearOperator
from curvlinops._torch_base import PyTorchLinearOperator, record_gradients
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.computers.layers import LayerType, register_layer
from curvlinops.curvature import CurvatureLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.ekfac import EKFACLinearOperator
from curvlinops.ggn import GGNLinearOperator
from curvlinops.ggn_diagonal import GGNDiagonalLinearOperator
from curvlinops.gradient_moments import EFLinearOperator, PerExampleGradientLinearOperator
from curvlinops.hessian import HessianLinearOperator
from curvlinops.jacobian import JacobianLinearOperator, TransposedJacobianLinearOperator
from curvlinops.kfac import KFACLinearOperator
from curvlinops.kfac_utils import (
    FisherType,
    FromCanonicalLinearOperator,
    KFACType,
    ToCanonicalLinearOperator,
)
from curvlinops.kfoc import KFOCLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator
from curvlinops.outer import OuterProductLinearOperator
from curvlinops.risk.losses import register_loss
from curvlinops.solvers import cg
from curvlinops.submatrix import SubmatrixLinearOperator

__all__ = [
    "BlockDiagonalLinearOperator",
    "CurvatureLinearOperator",
    "DiagonalLinearOperator",
    "EFLinearOperator",
    "EKFACLinearOperator",
    "EighDecomposedLinearOperator",
    "FisherType",
    "FromCanonicalLinearOperator",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "IdentityLinearOperator",
    "JacobianLinearOperator",
    "KFACLinearOperator",
    "KFACType",
    "KFOCLinearOperator",
    "KroneckerProductLinearOperator",
    "LayerType",
    "OuterProductLinearOperator",
    "PerExampleGradientLinearOperator",
    "PyTorchLinearOperator",
    "SubmatrixLinearOperator",
    "TensorLinearOperator",
    "ToCanonicalLinearOperator",
    "TransposedJacobianLinearOperator",
    "cg",
    "record_gradients",
    "register_layer",
    "register_loss",
]
