"""Tests of ``curvlinops.outer``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import BF16, C128, F64, general

from curvlinops.outer import OuterProductLinearOperator


def test_sum_of_outer_products() -> None:
    """Σ cᵢ aᵢaᵢᵀ, with vectors in the columns and on a space of tensors."""
    c, A = torch.tensor([2, -1], dtype=F64), general(5, 2)
    expected = 2 * torch.outer(A[:, 0], A[:, 0]) - torch.outer(A[:, 1], A[:, 1])
    for vectors in (A, [A], [A[:4].reshape(2, 2, 2), A[4]]):
        operator = OuterProductLinearOperator(c, vectors)
        assert torch.allclose(operator.to_dense(), expected)
        assert torch.allclose(operator.trace(), expected.trace())
        assert torch.allclose(operator.diagonal(), expected.diagonal())
        assert torch.allclose(operator.frobenius_norm(), torch.linalg.matrix_norm(expected))
    assert operator.in_shape == operator.out_shape == [(2, 2), ()]


def test_complex_is_not_conjugated() -> None:
    """ᵀ is the transpose: the matrix is symmetric, not Hermitian."""
    c, A = torch.randn(2, dtype=C128), general(3, 2, C128)
    operator = OuterProductLinearOperator(c, A)
    matrix = operator.to_dense()
    assert torch.allclose(matrix, matrix.T)
    assert torch.allclose(operator.H.to_dense(), matrix.mH)
    assert torch.allclose(operator.T.to_dense(), matrix)
    assert not operator.SELF_ADJOINT
    assert isinstance(operator.H, OuterProductLinearOperator)
    norm = operator.frobenius_norm()
    assert norm.dtype == F64
    assert torch.allclose(norm, torch.linalg.matrix_norm(matrix))


def test_determinant() -> None:
    """0 for fewer vectors than rows, otherwise that of the matrix, also in bfloat16."""
    low = OuterProductLinearOperator(torch.ones(2), torch.rand(3, 2))
    assert low.det() == 0
    assert low.logdet() == -torch.inf
    c, A = torch.tensor([1, -2, 3, 4], dtype=F64), general(3, 4)
    full = OuterProductLinearOperator(c, A)
    assert torch.allclose(full.det(), torch.linalg.det(A @ torch.diag(c) @ A.T))
    half = OuterProductLinearOperator(torch.ones(2, dtype=BF16), 2 * torch.eye(2, dtype=BF16))
    assert half.det().dtype == BF16
    assert half.det().item() == pytest.approx(16, rel=0.05)


def test_norm_does_not_form_the_matrix() -> None:
    """The norm of a long, thin operator costs a Gram matrix of the vectors."""
    A = torch.rand(1_000_000, 2)
    operator = OuterProductLinearOperator(torch.ones(2), A)
    gram = A.T @ A
    assert torch.allclose(operator.frobenius_norm(), (gram**2).sum().sqrt())


def test_norm_of_cancelling_terms() -> None:
    """Rounding below zero is no NaN."""
    a = torch.full((3, 1), 0.1)
    operator = OuterProductLinearOperator(torch.tensor([1.0, -1.0]), a.expand(3, 2).contiguous())
    assert operator.frobenius_norm() < 1e-4


def test_multiple_and_shift() -> None:
    """Trace, diagonal and norm survive, and for real operators the inverse."""
    c, A = torch.rand(2, dtype=F64), general(4, 2)
    operator = 3 * OuterProductLinearOperator(c, A)
    shifted = operator + operator**0
    matrix = 3 * A @ torch.diag(c) @ A.T + torch.eye(4)
    assert torch.allclose(shifted.trace(), matrix.trace())
    assert torch.allclose(shifted.diagonal(), matrix.diagonal())
    assert torch.allclose(shifted.frobenius_norm(), torch.linalg.matrix_norm(matrix))
    assert torch.allclose(shifted.inverse().to_dense(), matrix.inverse())
    complex_symmetric = OuterProductLinearOperator(c.to(C128), general(4, 2, C128))
    with pytest.raises(NotImplementedError, match=r"solve with curvlinops.cg"):
        (complex_symmetric + complex_symmetric**0).inverse()


@pytest.mark.parametrize(
    ("c", "A", "message"),
    [
        (
            torch.ones(2),
            torch.ones(3, 3),
            r"\[2\] need vectors of shapes \[..., 2\], got \[\[3, 3\]\]",
        ),
        (torch.ones(2, 1), torch.ones(3, 2), "Coefficients of shape"),
        (torch.ones(2), [torch.ones(3, 2), torch.ones(())], "need vectors"),
        (torch.ones(2), torch.ones(3, 2, dtype=F64), "must share dtype and device"),
        (torch.ones(2), torch.ones(3, 2, device="meta"), "must share dtype and device"),
        (torch.ones(2), [], "is empty"),
    ],
)
def test_constructor_refuses(c: torch.Tensor, A: Any, message: str) -> None:
    """Numbers of vectors, dtypes and devices that do not fit."""
    with pytest.raises(ValueError, match=message):
        OuterProductLinearOperator(c, A)


@pytest.mark.parametrize("rank", [2, 7, 9])
def test_closed_forms_of_a_shift(rank: int) -> None:
    """δI + Σ cᵢ aᵢ aᵢᵀ, without the matrix, also for as many vectors as rows, or more."""
    c, A = torch.rand(rank, dtype=torch.float64), torch.randn(7, rank, dtype=torch.float64)
    shifted = OuterProductLinearOperator(c, [A[:3], A[3:].reshape(2, 2, rank)])
    shifted = shifted + 0.3 * shifted**0
    dense = (A * c) @ A.T + 0.3 * torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(shifted.logdet(), dense.logdet())
    torch.testing.assert_close(
        shifted.inverse(0.1).to_dense(), (dense + 0.1 * torch.eye(7)).inverse()
    )
    root = shifted.sqrt()
    torch.testing.assert_close((root @ root).to_dense(), dense)
    torch.testing.assert_close(shifted.trace(), dense.trace())
    sizes = [
        tuple(t.shape) for t in shifted.eigh()._state().values() if isinstance(t, torch.Tensor)
    ]
    assert (7, min(rank, 7)) in sizes and (rank >= 7 or (7, 7) not in sizes)
