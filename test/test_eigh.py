"""Tests of ``curvlinops.eigh``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import C128, F32, F64, ZOO, from_canonical, kron, positive, unitary

from curvlinops._algebra import IdentityLinearOperator, ScaledLinearOperator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator


def compose(values: Tensor, vectors: Tensor) -> Tensor:
    return vectors @ torch.diag(values.to(vectors.dtype)) @ vectors.mH


@pytest.mark.parametrize(
    ("eigenvalues", "eigenvectors", "message"),
    [
        (torch.ones(2, 1), torch.eye(2), r"Eigenvalues must be 1D, got shape \[2, 1\]"),
        (torch.ones(()), torch.eye(1), "Eigenvalues must be 1D"),
        (torch.ones(2), torch.ones(2), r"Eigenvectors must be 2D, got shape \[2\]"),
        (torch.ones(2), torch.ones(1, 2, 2), "Eigenvectors must be 2D"),
        (torch.ones(2), torch.ones(2, 3), r"Eigenvectors must be square, got \[2, 3\]"),
        (
            torch.ones(6),
            KroneckerProductLinearOperator(torch.ones(2, 3), torch.ones(3, 1)),
            "Eigenvectors must be square",
        ),
        (torch.ones(3), torch.eye(2), r"Incompatible shapes: 3 eigenvalues.*\[2, 2\]"),
        (torch.ones(2), torch.eye(2, dtype=F64), "Dtype mismatch.*float32.*float64"),
        (torch.ones(2), torch.eye(2, dtype=C128), "Dtype mismatch.*float32.*complex128"),
        (torch.ones(2).to(C128), torch.eye(2, dtype=F64), "Dtype mismatch"),
        (torch.ones(2), torch.eye(2, device="meta"), "Device mismatch.*cpu.*meta"),
    ],
)
def test_constructor_refuses(eigenvalues: Tensor, eigenvectors: Any, message: str) -> None:
    """Shapes, dtypes and devices that do not fit."""
    with pytest.raises(ValueError, match=message):
        EighDecomposedLinearOperator(eigenvalues, eigenvectors)


def test_eigenvalues_can_be_set() -> None:
    """Products and closed forms follow; what does not fit is refused and changes nothing."""
    Q = unitary(3)
    A = EighDecomposedLinearOperator(torch.ones(3, dtype=F64), Q)
    values = torch.tensor([1, -2, 3], dtype=F64)
    A.eigenvalues = values
    matrix = compose(values, Q)
    assert A.eigenvalues is values
    assert torch.allclose(A.to_dense(), matrix)
    assert torch.allclose(A.trace(), matrix.trace())
    assert A.slogdet()[0] == -1
    for wrong, message in (
        (torch.ones(2, dtype=F64), "Incompatible shapes"),
        (torch.ones(3, 1, dtype=F64), "must be 1D"),
        (torch.ones(3, dtype=F32), "Dtype mismatch"),
    ):
        with pytest.raises(ValueError, match=message):
            A.eigenvalues = wrong
    assert A.eigenvalues is values


def test_setting_complex_eigenvalues() -> None:
    """An operator stops being self-adjoint when its eigenvalues become complex."""
    Q = unitary(2, C128)
    A = EighDecomposedLinearOperator(torch.ones(2, dtype=F64), Q)
    assert A.SELF_ADJOINT
    assert A.H is A
    A.eigenvalues = torch.tensor([1j, 2], dtype=C128)
    assert torch.allclose(A.H.to_dense(), compose(torch.tensor([-1j, 2], dtype=C128), Q))


def test_closed_under_shift_scale_inverse_power() -> None:
    """The eigenvectors are kept, not decomposed again or copied."""
    values, Q = torch.tensor([1, 0.5, 2, 4], dtype=F64), unitary(4)
    A = EighDecomposedLinearOperator(values, Q)
    for operator, expected in (
        (A + 2 * A**0, values + 2),
        (3 * A**0 - A, 3 - values),
        (-3 * A, -3 * values),
        (torch.tensor(3.0) * A, 3 * values),
        (A / 2, values / 2),
        (A.inverse(), 1 / values),
        (A.inverse(0.5), 1 / (values + 0.5)),
        (A.inverse(0.5, use_heuristic_damping=True), 1 / (values + 0.5)),
        (A.inverse(0.5, use_exact_damping=True), 1 / (values + 0.5)),
        (A.sqrt(), values**0.5),
        (A.power(-2), values**-2.0),
        (A.eigh(), values),
    ):
        assert type(operator) is EighDecomposedLinearOperator
        assert operator.eigenvectors is Q
        assert torch.allclose(operator.eigenvalues, expected)


def test_complex_multiple() -> None:
    """Of complex eigenvectors it has complex eigenvalues; of real ones it stays lazy."""
    values = torch.tensor([1, 2], dtype=F64)
    multiple = 2j * EighDecomposedLinearOperator(values, unitary(2, C128))
    assert torch.equal(multiple.eigenvalues, 2j * values)
    assert isinstance(2j * EighDecomposedLinearOperator(values, unitary(2)), ScaledLinearOperator)


def test_complex_eigenvectors() -> None:
    """Q diag(λ) Qᴴ has the conjugate on the right, and the transpose conjugates Q."""
    values, Q = torch.rand(3, dtype=F64), unitary(3, C128)
    A = EighDecomposedLinearOperator(values, Q)
    matrix = compose(values, Q)
    assert not torch.allclose(matrix, Q @ torch.diag(values.to(C128)) @ Q.T)
    assert torch.allclose(A.to_dense(), matrix)
    assert torch.allclose(A.T.to_dense(), matrix.T)
    assert A.dtype == C128
    assert A.trace().dtype == C128
    assert A.frobenius_norm().dtype == F64


@pytest.mark.parametrize("damping", [0.0, -2.0])
def test_inverse_of_singular(damping: float) -> None:
    """An eigenvalue that is zero with damping is refused."""
    A = EighDecomposedLinearOperator(torch.tensor([0.0, 2]), torch.eye(2))
    with pytest.raises(
        RuntimeError, match=f"Cannot invert.*with damping {damping} it has eigenvalues"
    ):
        A.inverse(damping)
    assert A.logdet() == -torch.inf
    with pytest.raises(ValueError, match="singular"):
        A.power(-1)


def test_kronecker_eigenvectors_are_not_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and closed forms, the diagonal among them, use the factors."""
    Q1, Q2 = unitary(2), unitary(3)
    values = torch.rand(6, dtype=F64) + 0.5
    basis = KroneckerProductLinearOperator(Q1, Q2)
    monkeypatch.setattr(KroneckerProductLinearOperator, "to_dense", None)
    A = EighDecomposedLinearOperator(values, basis)
    matrix = compose(values, kron(Q1, Q2))
    assert torch.allclose(A @ torch.eye(6, dtype=F64), matrix)
    assert torch.allclose(A.diagonal(), matrix.diagonal())
    assert torch.allclose(
        A.inverse(0.5).diagonal(), torch.linalg.inv(matrix + torch.eye(6) / 2).diagonal()
    )


@pytest.mark.parametrize(
    "name", ["kronecker_with_identity", "kronecker_with_diagonal", "kronecker_positive_complex"]
)
def test_diagonal_of_special_factors(name: str) -> None:
    """Identity factors and complex factors have real squares."""
    A, matrix = ZOO[name]()
    assert torch.allclose(A.eigh().diagonal(), matrix.diagonal())
    assert A.eigh().diagonal().dtype == matrix.dtype


def test_operator_basis() -> None:
    """Any square operator may hold the eigenvectors; its output space is the operator's."""
    P, matrix = from_canonical()
    values = torch.rand(8, dtype=F64)
    A = EighDecomposedLinearOperator(values, P)
    assert A.in_shape == A.out_shape == P.out_shape
    assert torch.allclose(A.to_dense(), compose(values, matrix))
    assert torch.allclose(A.diagonal(), compose(values, matrix).diagonal())
    assert A._in_names == A._out_names == ["bias", "weight", "scale"]
    blocks = BlockDiagonalLinearOperator(
        [TensorLinearOperator(unitary(2)), TensorLinearOperator(unitary(3))]
    )
    B = EighDecomposedLinearOperator(values[:5], blocks)
    assert torch.allclose(B.to_dense(), compose(values[:5], blocks.to_dense()))


def test_identity_basis() -> None:
    """The identity as eigenvectors makes a diagonal operator."""
    A = EighDecomposedLinearOperator(
        torch.arange(3).to(F64), IdentityLinearOperator([(3,)], dtype=F64)
    )
    assert torch.equal(A.to_dense(), torch.diag(torch.arange(3).to(F64)))
    assert torch.equal(A.diagonal(), torch.arange(3).to(F64))


def test_diagonal_of_an_unknown_basis() -> None:
    """Without squares of the entries there is no diagonal, but all else."""
    product = TensorLinearOperator(unitary(2)) @ TensorLinearOperator(unitary(2))
    A = EighDecomposedLinearOperator(torch.ones(2, dtype=F64), product)
    assert torch.allclose(A.to_dense(), torch.eye(2, dtype=F64))
    with pytest.raises(NotImplementedError, match="closed form of diagonal"):
        A.diagonal()


def test_eigenvalues_in_any_order() -> None:
    """They need not be sorted, and the operator does not sort them."""
    matrix = positive(4)
    values, vectors = torch.linalg.eigh(matrix)
    order = [2, 0, 3, 1]
    A = EighDecomposedLinearOperator(values[order], vectors[:, order])
    assert torch.allclose(A.to_dense(), matrix)
    assert torch.equal(A.eigenvalues, values[order])
