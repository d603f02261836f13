"""Tests of ``curvlinops.submatrix``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from zoo import C128, ZOO, Named, general, positive

from curvlinops.dense import TensorLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.submatrix import SubmatrixLinearOperator


@pytest.mark.parametrize(
    "indices",
    [
        lambda i: i,
        tuple,
        torch.tensor,
        lambda i: torch.tensor(i, dtype=torch.int32),
        np.array,
        iter,
        lambda i: [np.int64(j) for j in i],
    ],
)
def test_indices_of_all_kinds(indices: Any) -> None:
    """Lists, tuples, tensors and arrays of integers; order counts, negative ones count back."""
    matrix = general(4, 5)
    A = SubmatrixLinearOperator(Named(matrix), indices([3, 0]), indices([-1, 2, 0]))
    assert torch.allclose(A.to_dense(), matrix[[3, 0]][:, [4, 2, 0]])
    assert A.in_shape == [(3,)]
    assert A.out_shape == [(2,)]
    assert torch.allclose(A.H.to_dense(), matrix[[3, 0]][:, [4, 2, 0]].T)
    assert isinstance(A.H, SubmatrixLinearOperator)


def test_range() -> None:
    """A range selects a block."""
    matrix = general(4, 5)
    A = SubmatrixLinearOperator(TensorLinearOperator(matrix), range(2), range(1, 5))
    assert torch.allclose(A.to_dense(), matrix[:2, 1:5])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "row indices must be a non-empty list of integers"),
        ([0.0], "must be a non-empty list of integers"),
        ([True, False], "must be a non-empty list of integers"),
        (torch.tensor([[0]]), "must be a non-empty list of integers"),
        ([4], "A row index is out of range for 4 rows, 4: it must be between -4 and 3"),
        ([-5], "out of range"),
        ([1, 1], "The row indices must not repeat"),
        ([3, -1], "must not repeat, got \\[3\\] several times"),
    ],
)
def test_wrong_indices(indices: Any, message: str) -> None:
    """Indices of rows and columns are checked; set_submatrix then changes nothing."""
    matrix = general(4, 4)
    A = TensorLinearOperator(matrix)
    with pytest.raises(ValueError, match=message):
        SubmatrixLinearOperator(A, indices, [0])
    with pytest.raises(ValueError, match=message.replace("row", "column")):
        SubmatrixLinearOperator(A, [0], indices)
    submatrix = SubmatrixLinearOperator(A, [0, 2], [1])
    with pytest.raises(ValueError, match=message):
        submatrix.set_submatrix(indices, [1, 2])
    assert torch.allclose(submatrix.to_dense(), matrix[[0, 2]][:, [1]])


def test_set_submatrix() -> None:
    """Other rows and columns of the same operator; shape and self-adjointness follow."""
    D = DiagonalLinearOperator([torch.arange(4.0)])
    A = SubmatrixLinearOperator(D, [1, 2], [1, 2])
    assert A.SELF_ADJOINT
    A.set_submatrix([3, 1], [0, 1, 3])
    assert A.shape == (2, 3)
    assert not A.SELF_ADJOINT
    assert torch.equal(A.to_dense(), torch.tensor([[0.0, 0, 3], [0, 1, 0]]))
    A.set_submatrix([3, 1], [1, 3])  # the same ones in another order are no principal sub-matrix
    assert not A.SELF_ADJOINT
    assert torch.equal(A.H @ torch.tensor([1.0, 0]), torch.tensor([0.0, 3]))
    A.set_submatrix([3, -3], [-1, 1])  # but these are
    assert A.SELF_ADJOINT
    assert torch.equal(A.diagonal(), torch.tensor([3.0, 1]))


def test_closed_forms_of_principal_submatrices() -> None:
    """Trace and diagonal follow from the operator's diagonal; nothing else does."""
    A, matrix = ZOO["kronecker_positive"]()
    principal = SubmatrixLinearOperator(A, [5, 1, 7], [5, 1, 7])
    assert torch.allclose(principal.diagonal(), matrix.diagonal()[[5, 1, 7]])
    assert torch.allclose(principal.trace(), matrix.diagonal()[[5, 1, 7]].sum())
    for form in ("slogdet", "inverse", "eigh", "frobenius_norm"):
        with pytest.raises(NotImplementedError, match=f"closed form of {form}"):
            getattr(principal, form)()
    with pytest.raises(NotImplementedError, match="closed form of diagonal"):
        SubmatrixLinearOperator(A, [0, 1], [1, 0]).trace()


def test_transpose_of_complex() -> None:
    """Rows and columns change places, entries are not conjugated."""
    matrix = general(3, 4, C128)
    A = SubmatrixLinearOperator(TensorLinearOperator(matrix), [0, 2], [3])
    assert torch.allclose(A.T.to_dense(), matrix[[0, 2]][:, [3]].T)
    assert isinstance(A.T, SubmatrixLinearOperator)


def test_submatrix_of_submatrix() -> None:
    """Indices are those of the inner sub-matrix."""
    matrix = positive(5)
    inner = SubmatrixLinearOperator(TensorLinearOperator(matrix), [4, 2, 1], [0, 3, 4])
    outer = SubmatrixLinearOperator(inner, [2, 0], [1])
    assert torch.allclose(outer.to_dense(), matrix[[1, 4]][:, [3]])
