"""The squared magnitudes of an operator's entries, which the diagonal of ``Q diag(λ) Qᴴ`` needs.

Unitary matrices hide mistakes here: a diagonal one has entries of magnitude 1, and a permutation
zeros and ones. So these are not unitary.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo import C128, F64

from curvlinops import (
    BlockDiagonalLinearOperator,
    DiagonalLinearOperator,
    KroneckerProductLinearOperator,
)
from curvlinops._algebra import IdentityLinearOperator
from curvlinops._operator import PyTorchLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.kfac_utils import ToCanonicalLinearOperator


def entries(*shape: int, dtype: torch.dtype = C128) -> Tensor:
    """Return random numbers, none of which has magnitude 0 or 1."""
    numbers = torch.randn(shape, dtype=dtype)
    return numbers + 2 * numbers.sgn()


def squares(op: PyTorchLinearOperator) -> Tensor:
    """Return the squares by their definition."""
    return op.to_dense().abs() ** 2


def cases(dtype: torch.dtype) -> dict[str, PyTorchLinearOperator]:
    dense = TensorLinearOperator(entries(2, 3, dtype=dtype))
    diagonal = DiagonalLinearOperator([entries(2, dtype=dtype), entries(2, 1, dtype=dtype)])
    kron = KroneckerProductLinearOperator(
        entries(2, 3, dtype=dtype),
        DiagonalLinearOperator([entries(2, dtype=dtype)]),
        IdentityLinearOperator([(2,)], dtype=dtype, device=torch.device("cpu")),
    )
    return {
        "dense": dense,
        "diagonal": diagonal,
        "kronecker": kron,
        "blocks": BlockDiagonalLinearOperator([dense, kron], flat=True),
        "multiple": -3.0 * kron,
    }


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("name", ["dense", "diagonal", "kronecker", "blocks", "multiple"])
def test_definition(name: str, dtype: torch.dtype) -> None:
    """Catches other powers, forgotten magnitudes, and factors that are left as they are."""
    op = cases(dtype)[name]
    result = op._entrywise_squares()
    actual = result.to_dense()
    assert actual.dtype == F64
    torch.testing.assert_close(actual, squares(op))


@pytest.mark.parametrize("dtype", [None, F64, C128])
def test_permutations(dtype: torch.dtype | None) -> None:
    """The squares of a permutation are real, or of any type if it is."""
    shapes = {"bias": (2,), "weight": (2, 3)}
    device = None if dtype is None else "cpu"
    P = ToCanonicalLinearOperator(shapes, [{"W": "weight", "b": "bias"}], device, dtype)
    for op in (P, P.adjoint()):
        result = op._entrywise_squares()
        assert result.dtype == (None if dtype is None else F64)
        x = torch.rand(8, dtype=F64)
        torch.testing.assert_close(result @ x, (op if dtype is None else op.to(F64)) @ x)
