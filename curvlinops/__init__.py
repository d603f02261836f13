"""Linear operators for the curvature of neural networks, in PyTorch."""

from curvlinops._algebra import IdentityLinearOperator
from curvlinops._torch_base import PyTorchLinearOperator, record_gradients
from curvlinops.accumulators import EKFACAccumulator, KFACAccumulator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.computers.layers import LayerType, register_layer
from curvlinops.curvature import CurvatureLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.distributed import ShardSampler
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.ekfac import EKFACLinearOperator
from curvlinops.estimators import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    hutchinson_diag,
    hutchinson_squared_fro,
    hutchinson_trace,
    hutchpp_trace,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
    xdiag,
    xtrace,
)
from curvlinops.ggn import GGNLinearOperator
from curvlinops.ggn_diagonal import GGNDiagonalLinearOperator
from curvlinops.gradient_moments import EFLinearOperator, PerExampleGradientLinearOperator
from curvlinops.hessian import HessianLinearOperator
from curvlinops.inverse import (
    CGInverseLinearOperator,
    LSMRInverseLinearOperator,
    NeumannInverseLinearOperator,
)
from curvlinops.jacobian import JacobianLinearOperator, TransposedJacobianLinearOperator
from curvlinops.kfac import KFACLinearOperator
from curvlinops.kfac_utils import (
    FisherType,
    FromCanonicalLinearOperator,
    KFACType,
    Precision,
    ToCanonicalLinearOperator,
)
from curvlinops.kfoc import KFOCLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator
from curvlinops.low_rank import LowRankLinearOperator
from curvlinops.outer import OuterProductLinearOperator
from curvlinops.risk.losses import register_loss
from curvlinops.solvers import cg, eigsh, lsmr, minres, svds
from curvlinops.submatrix import SubmatrixLinearOperator

__all__ = [
    "BlockDiagonalLinearOperator",
    "CGInverseLinearOperator",
    "CurvatureLinearOperator",
    "DiagonalLinearOperator",
    "EFLinearOperator",
    "EKFACAccumulator",
    "EKFACLinearOperator",
    "EighDecomposedLinearOperator",
    "FisherType",
    "FromCanonicalLinearOperator",
    "GGNDiagonalLinearOperator",
    "GGNLinearOperator",
    "HessianLinearOperator",
    "IdentityLinearOperator",
    "JacobianLinearOperator",
    "KFACAccumulator",
    "KFACLinearOperator",
    "KFACType",
    "KFOCLinearOperator",
    "KroneckerProductLinearOperator",
    "LSMRInverseLinearOperator",
    "LanczosApproximateLogSpectrumCached",
    "LanczosApproximateSpectrumCached",
    "LayerType",
    "LowRankLinearOperator",
    "NeumannInverseLinearOperator",
    "OuterProductLinearOperator",
    "PerExampleGradientLinearOperator",
    "Precision",
    "PyTorchLinearOperator",
    "ShardSampler",
    "SubmatrixLinearOperator",
    "TensorLinearOperator",
    "ToCanonicalLinearOperator",
    "TransposedJacobianLinearOperator",
    "cg",
    "eigsh",
    "hutchinson_diag",
    "hutchinson_squared_fro",
    "hutchinson_trace",
    "hutchpp_trace",
    "lanczos_approximate_log_spectrum",
    "lanczos_approximate_spectrum",
    "lsmr",
    "minres",
    "record_gradients",
    "register_layer",
    "register_loss",
    "svds",
    "xdiag",
    "xtrace",
]
