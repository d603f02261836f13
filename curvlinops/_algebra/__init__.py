"""Lazy algebra: adjoint, conjugate, scalar multiple, sum, shift by a multiple of I, product.

Scalars and shifts are pulled outwards, so that what is left meets the rules that types register
about each other: ``(s A) (t B) = st (A B)``, ``(A + δI) + B = (A + B) + δI``.
"""

from curvlinops._algebra.identity import IdentityLinearOperator, identity_like
from curvlinops._algebra.products import _ChainPyTorchLinearOperator
from curvlinops._algebra.scaling import ScaledLinearOperator
from curvlinops._algebra.sums import ShiftedLinearOperator, SumLinearOperator
from curvlinops._algebra.wrappers import _AdjointLinearOperator, _ConjugateLinearOperator

__all__ = [
    "IdentityLinearOperator",
    "ScaledLinearOperator",
    "ShiftedLinearOperator",
    "SumLinearOperator",
    "_AdjointLinearOperator",
    "_ChainPyTorchLinearOperator",
    "_ConjugateLinearOperator",
    "identity_like",
]
