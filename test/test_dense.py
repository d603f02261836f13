"""Tests of ``curvlinops.dense`` and of the dense linear algebra in ``curvlinops._tensors``."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from zoo import BF16, C64, C128, F32, F64, general, indefinite, positive, unitary

from curvlinops import _tensors
from curvlinops.dense import TensorLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator


def nearly_singular() -> Tensor:
    """A positive definite float32 matrix whose Cholesky decomposition fails in float32 only."""
    while True:
        root = torch.randn(6, 3)
        matrix = root @ root.T + 1e-7 * torch.eye(6)
        infos = [torch.linalg.cholesky_ex(m).info.item() for m in (matrix, matrix.double())]
        if infos[0] != 0 and infos[1] == 0:
            return matrix


def fails_in_single(
    name: str, monkeypatch: pytest.MonkeyPatch, result: object
) -> list[torch.dtype]:
    """Let a function of ``torch.linalg`` fail below double precision; return its inputs' dtypes."""
    function, seen = getattr(torch.linalg, name), []

    def wrapped(matrix: Tensor) -> object:
        seen.append(matrix.dtype)
        if matrix.dtype in (F64, C128):
            return function(matrix)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(torch.linalg, name, wrapped)
    return seen


@pytest.mark.parametrize("matrix", [torch.ones(3), torch.ones(2, 2, 2), [[1.0]], None])
def test_needs_a_matrix(matrix: object) -> None:
    """Other things are refused; the error says what was given."""
    with pytest.raises(ValueError, match="A dense operator needs a tensor with two axes, got"):
        TensorLinearOperator(matrix)  # type: ignore[arg-type]


def test_dense_by_dense_is_not_folded() -> None:
    """A product of tall and wide matrices stays two matrices."""
    A, B = TensorLinearOperator(general(4, 1)), TensorLinearOperator(general(1, 4))
    assert len(A @ B) == 2
    assert len((A + A).operators) == 2


@pytest.mark.parametrize("dtype", [F32, F64, C64, C128])
@pytest.mark.parametrize("make", [positive, indefinite, lambda d, dtype: general(d, d, dtype)])
def test_inverse(make: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """The damped inverse of any invertible matrix, in the matrix's dtype and without warnings."""
    matrix = make(4, dtype)
    for damping in (0.0, 0.25, torch.tensor(0.25)):
        inverse = TensorLinearOperator(matrix).inverse(damping)
        assert inverse.dtype == dtype
        expected = torch.linalg.inv(matrix + damping * torch.eye(4))
        assert torch.allclose(inverse.matrix, expected, rtol=1e-3, atol=1e-4)


def test_inverse_of_singular_matrix() -> None:
    """Singular matrices are refused with the damping; damping makes them invertible."""
    A = TensorLinearOperator(torch.ones(3, 3, dtype=F64))
    with pytest.raises(
        RuntimeError, match=r"dense 3 × 3 operator: with damping 0.0 it is singular"
    ):
        A.inverse()
    expected = torch.linalg.inv(torch.ones(3, 3, dtype=F64) + torch.eye(3))
    assert torch.allclose(A.inverse(1.0).matrix, expected)


def test_inverse_with_complex_damping() -> None:
    """A Hermitian matrix with complex damping is not Hermitian: no Cholesky."""
    matrix = positive(3, C128)
    inverse = TensorLinearOperator(matrix).inverse(2j)
    assert torch.allclose(inverse.matrix, torch.linalg.inv(matrix + 2j * torch.eye(3)))


def test_does_not_change_the_matrix() -> None:
    """Damping is added to a copy."""
    matrix = positive(3)
    copied = matrix.clone()
    TensorLinearOperator(matrix).inverse(1.0)
    _tensors.add_to_diagonal(matrix, 1.0)
    assert torch.equal(matrix, copied)


def test_eigh() -> None:
    """Hermitian matrices are decomposed, others are refused by name."""
    for dtype in (F64, C128):
        matrix = indefinite(3, dtype)
        A = TensorLinearOperator(matrix).eigh()
        assert isinstance(A, EighDecomposedLinearOperator)
        assert torch.allclose(A.to_dense(), matrix)
        assert A.eigenvalues.dtype == F64
    with pytest.raises(ValueError, match=r"eigendecompose <3×3 operator Dense.*not Hermitian"):
        TensorLinearOperator(general(3, 3)).eigh()
    # symmetric, but not Hermitian
    matrix = general(3, 3, C128)
    with pytest.raises(ValueError, match="not Hermitian"):
        TensorLinearOperator(matrix + matrix.T).eigh()
    with pytest.raises(ValueError, match="non-finite entries"):
        TensorLinearOperator(torch.full((2, 2), torch.nan)).eigh()


# --------------------------------------------------------------------------------------------------
# Precision
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_half_precision_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    """Silently; results have the matrix's dtype and its precision."""
    matrix = positive(4).to(dtype)
    A, wide = TensorLinearOperator(matrix), matrix.double()
    tolerance = 8 * torch.finfo(dtype).eps
    for value, expected in (
        (A.inverse(0.5).matrix, torch.linalg.inv(wide + torch.eye(4) / 2)),
        (A.slogdet()[1], wide.logdet()),
        (A.det(), wide.det()),
        (A.frobenius_norm(), torch.linalg.matrix_norm(wide)),
        (A.eigh().eigenvalues, torch.linalg.eigvalsh(wide)),
        (A.sqrt().to_dense() @ A.sqrt().to_dense(), wide),
    ):
        assert value.dtype == dtype
        assert torch.allclose(value.double(), expected, rtol=tolerance, atol=tolerance)


def test_rounding_does_not_count_as_asymmetry() -> None:
    """A matrix that is symmetric up to the rounding of its own dtype is decomposed."""
    for dtype in (BF16, F32, F64):
        matrix = positive(4).to(dtype)
        matrix[0, 1] *= 1 + torch.finfo(dtype).eps
        assert _tensors.is_hermitian(matrix)
        TensorLinearOperator(matrix).eigh()
        # inverted by Cholesky: of one triangle, so symmetric
        inverse = _tensors.inverse(matrix, name="it")
        assert torch.equal(inverse, inverse.mT)
        matrix[0, 1] += 0.5
        assert not _tensors.is_hermitian(matrix)


def test_is_hermitian() -> None:
    """Square matrices that equal their adjoint, zero among them."""
    assert _tensors.is_hermitian(torch.zeros(2, 2))
    assert _tensors.is_hermitian(indefinite(3, C64))
    assert not _tensors.is_hermitian(torch.ones(2, 3))
    assert not _tensors.is_hermitian(1j * positive(2, C128))
    assert not _tensors.is_hermitian(torch.full((2, 2), torch.nan))
    gram = torch.rand(200, 300)
    assert _tensors.is_hermitian(gram @ gram.T)


def test_failure_in_single_precision_warns_and_retries() -> None:
    """Cholesky that fails in float32 is retried in float64, and the warning names the matrix."""
    matrix = nearly_singular()
    with pytest.warns(UserWarning, match=r"Inverting the factor with damping 0.0 failed in .*32"):
        inverse = _tensors.inverse(matrix, name="the factor")
    assert inverse.dtype == F32
    assert torch.allclose(inverse, torch.linalg.inv(matrix.double()).float(), rtol=1e-3)


def test_retry_can_be_switched_off() -> None:
    """Then the failure in float32 is an error at once, without a warning."""
    with pytest.raises(RuntimeError, match=r"Cannot invert it: with damping 0\.0 it is not pos"):
        _tensors.inverse(nearly_singular(), name="it", retry_double_precision=False)


@pytest.mark.parametrize("dtype", [F64, C128])
def test_failure_in_double_precision_is_an_error(dtype: torch.dtype) -> None:
    """The error names the matrix, the damping and the remedy; there is no warning before."""
    message = r"Cannot invert the factor: with damping 0.25 it is not positive definite. Increase"
    with pytest.raises(RuntimeError, match=message):
        _tensors.inverse(-positive(3, dtype), 0.25, name="the factor")


def test_failure_in_both_precisions() -> None:
    """The warning of the retry is followed by the error."""
    with (
        pytest.warns(UserWarning, match="retrying in torch.float64"),
        pytest.raises(RuntimeError, match="not positive definite"),
    ):
        _tensors.inverse(-positive(3, F32), name="it")


def test_eigh_failure_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eigendecomposition that does not converge in float32 is retried in float64."""
    seen = fails_in_single("eigh", monkeypatch, torch.linalg.LinAlgError("no convergence"))
    matrix = indefinite(3, F32)
    with pytest.warns(UserWarning, match="Eigendecomposing it failed in torch.float32; retrying"):
        values, vectors = _tensors.eigh(matrix, name="it")
    assert seen == [F32, F64]
    assert (values.dtype, vectors.dtype) == (F32, F32)
    assert torch.allclose(vectors @ torch.diag(values) @ vectors.T, matrix, atol=1e-5)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _tensors.eigh(matrix, name="it")


def test_eigh_failure_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing wider to try."""

    def fails(matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(torch.linalg.LinAlgError, match="no convergence"):
        _tensors.eigh(positive(3), name="it")


# --------------------------------------------------------------------------------------------------
# Powers of eigenvalues
# --------------------------------------------------------------------------------------------------
def test_real_power() -> None:
    """Rounding below zero counts as zero; what is truly negative has no real root."""
    values = torch.tensor([4.0, 1.0, 0.0, -1e-16], dtype=F64)
    assert torch.equal(
        _tensors.real_power(values, 0.5, name="it"), torch.tensor([2, 1, 0, 0]).to(F64)
    )
    assert torch.equal(_tensors.real_power(-values, 2, name="it"), values**2)
    assert torch.equal(_tensors.real_power(-values[:2], -1.0, name="it"), -1 / values[:2])
    with pytest.raises(ValueError, match=r"power 0.5 of it is not real.*eigenvalue is -1.000e\+00"):
        _tensors.real_power(torch.tensor([4.0, -1.0]), 0.5, name="it")
    for exponent in (-1, -0.5):
        with pytest.raises(
            ValueError, match=f"power {exponent} of it does not exist: it is singul"
        ):
            _tensors.real_power(torch.tensor([4.0, 0.0]), exponent, name="it")


def test_power_of_dense() -> None:
    """Powers go through the eigendecomposition."""
    matrix = positive(3)
    A = TensorLinearOperator(matrix)
    assert torch.allclose(A.power(3).to_dense(), matrix @ matrix @ matrix)
    assert torch.allclose(A.power(-0.5).to_dense(), torch.linalg.inv(A.sqrt().to_dense()))
    Q = unitary(3)
    assert torch.allclose(
        TensorLinearOperator(Q @ torch.diag(torch.tensor([1.0, 4, 9]).to(F64)) @ Q.T)
        .sqrt()
        .to_dense(),
        Q @ torch.diag(torch.tensor([1.0, 2, 3]).to(F64)) @ Q.T,
    )
