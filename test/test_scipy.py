"""Tests of ``curvlinops._scipy``: operators in SciPy's solvers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, cg, eigs, eigsh, expm_multiply, gmres, lsmr, svds
from torch import Tensor
from zoo import (
    BF16,
    C64,
    C128,
    F32,
    F64,
    ZOO,
    Cumsum,
    canonical_blocks,
    general,
    indefinite,
    kron,
    positive,
)

from curvlinops._algebra import IdentityLinearOperator
from curvlinops._torch_base import PyTorchLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator


def kronecker(dtype: torch.dtype = F64) -> tuple[LinearOperator, np.ndarray]:
    """A positive definite 12 × 12 operator for SciPy, and its matrix."""
    factors = positive(3, dtype), positive(4, dtype)
    return KroneckerProductLinearOperator(*factors).to_scipy(), kron(*factors).numpy()


# --------------------------------------------------------------------------------------------------
# Solvers
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [F64, C128])
def test_eigsh(dtype: torch.dtype) -> None:
    """Largest eigenvalues and their eigenvectors."""
    A, matrix = kronecker(dtype)
    v0 = np.ones(12, dtype=matrix.dtype)
    values, vectors = eigsh(A, k=3, which="LA", v0=v0)
    assert np.allclose(np.sort(values), np.linalg.eigvalsh(matrix)[-3:])
    assert np.allclose(matrix @ vectors, vectors * values)


def test_eigs() -> None:
    """Eigenvalues of a matrix that is not symmetric, which SciPy multiplies with real vectors."""
    matrix = general(9, 9)
    values = eigs(
        TensorLinearOperator(matrix).to_scipy(), k=3, return_eigenvectors=False, v0=np.ones(9)
    )
    expected = sorted(np.abs(np.linalg.eigvals(matrix.numpy())))[-3:]
    assert np.allclose(sorted(np.abs(values))[1:], expected[1:])


@pytest.mark.parametrize("dtype", [F64, C128])
def test_svds(dtype: torch.dtype) -> None:
    """Singular values of a rectangular operator, which needs products on both sides."""
    matrix = general(8, 12, dtype)
    A = TensorLinearOperator(matrix).to_scipy()
    u, values, vh = svds(A, k=3, v0=np.ones(8, dtype=matrix.numpy().dtype))
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert np.allclose(np.sort(values), np.sort(expected[:3]))
    assert np.allclose(matrix.numpy() @ vh.conj().T, u * values)


@pytest.mark.parametrize("dtype", [F64, C128])
def test_cg(dtype: torch.dtype) -> None:
    """A positive definite system, real or complex."""
    A, matrix = kronecker(dtype)
    b = np.arange(12.0) * (1 if dtype == F64 else 1 - 2j)
    x, info = cg(A, b, atol=0.0, maxiter=500)
    assert info == 0
    assert np.allclose(matrix @ x, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [F64, C128])
def test_gmres(dtype: torch.dtype) -> None:
    """A system that is not symmetric."""
    matrix = general(8, 8, dtype) + 4 * torch.eye(8)
    b = np.arange(8.0) + 0 * matrix.numpy()[0]
    x, info = gmres(TensorLinearOperator(matrix).to_scipy(), b, atol=0.0)
    assert info == 0
    assert np.allclose(matrix.numpy() @ x, b, rtol=1e-3, atol=1e-3)


def test_lsmr() -> None:
    """A least-squares problem, with both products."""
    matrix = general(12, 5)
    b = np.arange(12.0)
    x = lsmr(TensorLinearOperator(matrix).to_scipy(), b, atol=1e-12, btol=1e-12)[0]
    assert np.allclose(x, np.linalg.lstsq(matrix.numpy(), b, rcond=None)[0])


@pytest.mark.parametrize("columns", [None, 2])
def test_expm_multiply(columns: int | None) -> None:
    """The exponential, which needs sums and multiples of the SciPy operator, and a trace."""
    matrix = indefinite(6)
    A = TensorLinearOperator(matrix).to_scipy()
    b = np.arange(6.0) if columns is None else np.arange(12.0).reshape(6, 2)
    result = expm_multiply(A, b, traceA=float(matrix.trace()))
    assert np.allclose(result, torch.linalg.matrix_exp(matrix).numpy() @ b)


def test_scipy_algebra() -> None:
    """SciPy's own compositions work."""
    A, matrix = kronecker()
    x = np.arange(12.0)
    assert np.allclose((2 * A + A @ A - A.H) @ x, (2 * matrix + matrix @ matrix - matrix.T) @ x)
    assert np.allclose(A.T @ x, matrix.T @ x)
    assert np.allclose((A**2) @ x, matrix @ matrix @ x)


# --------------------------------------------------------------------------------------------------
# Types and shapes
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (F32, np.float32),
        (F64, np.float64),
        (C64, np.complex64),
        (C128, np.complex128),
        (BF16, np.float32),
        (torch.float16, np.float32),
    ],
)
def test_dtype(dtype: torch.dtype, expected: Any) -> None:
    """The operator's own, or float32 where NumPy has no such type; or that which is asked for."""
    A = DiagonalLinearOperator([torch.tensor([1, 2, 4]).to(dtype)])
    exported = A.to_scipy()
    assert exported.dtype == expected
    assert (exported @ np.ones(3, dtype=expected)).dtype == expected
    assert np.array_equal(exported @ np.ones(3, dtype=expected), [1, 2, 4])
    chosen = A.to_scipy(np.complex128)
    assert chosen.dtype == np.complex128
    assert (chosen @ np.ones(3, dtype=np.float32)).dtype == np.complex128
    assert A.to_scipy("complex64").dtype == np.complex64


def test_other_dtypes_of_the_vector() -> None:
    """Vectors of any numeric type are multiplied in the operator's precision."""
    matrix = general(3, 3)
    A = TensorLinearOperator(matrix).to_scipy()
    for dtype in (np.float32, np.int64, np.int8, bool, np.complex64):
        x = np.array([1, 0, 2]).astype(dtype)
        result = A @ x
        assert np.allclose(result, matrix.numpy() @ x)
        assert result.dtype == np.result_type(np.float64, x.dtype)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_complex_vectors_of_real_operators(dtype: torch.dtype) -> None:
    """Real and imaginary parts are multiplied, none is dropped."""
    matrix = torch.tensor([[1.0, 2, 0.5], [4, -1, 0]]).to(dtype)
    A = TensorLinearOperator(matrix).to_scipy()
    x, y = np.array([1 + 2j, -1j, 4]), np.array([1j, 2 - 1j])
    wide = matrix.double().numpy()
    assert np.allclose(A @ x, wide @ x)
    assert np.allclose(A.rmatvec(y), wide.T @ y)
    assert np.allclose(A @ np.stack([x, 2 * x], axis=1), wide @ np.stack([x, 2 * x], axis=1))


def test_complex_operator_conjugates_in_the_adjoint() -> None:
    """rmatvec and rmatmat are of the adjoint, not of the transpose."""
    matrix = general(3, 2, C128)
    A = TensorLinearOperator(matrix).to_scipy()
    y = np.array([1 + 1j, 2, -3j])
    expected = matrix.numpy().conj().T
    assert np.allclose(A.rmatvec(y), expected @ y)
    assert np.allclose(A.rmatmat(y[:, None]), expected @ y[:, None])
    assert np.allclose(A.H @ y, expected @ y)
    assert np.allclose(A.T @ y, matrix.numpy().T @ y)


def test_shapes_of_vectors() -> None:
    """[N] gives [M], [N, 1] gives [M, 1], [N, K] gives [M, K], as for every SciPy operator."""
    A = TensorLinearOperator(general(2, 3)).to_scipy()
    for shape, expected in (((3,), (2,)), ((3, 1), (2, 1)), ((3, 4), (2, 4))):
        assert (A @ np.ones(shape)).shape == expected
    assert A.matvec(np.ones((3, 1))).shape == (2, 1)
    with pytest.raises(ValueError, match="dimension mismatch"):
        A @ np.ones(2)


def test_memory_layouts() -> None:
    """Strided, reversed, read-only and Fortran-ordered arrays; the input stays as it is."""
    matrix = general(3, 3)
    A = TensorLinearOperator(matrix).to_scipy()
    base = np.arange(12.0).reshape(6, 2)
    read_only = np.arange(3.0)
    read_only.flags.writeable = False
    for x in (base[::2], base[::-2], np.asfortranarray(base[:3]), base[:3, 1], read_only):
        copied = x.copy()
        assert np.allclose(A @ x, matrix.numpy() @ copied)
        assert np.array_equal(x, copied)


def test_result_is_a_new_array() -> None:
    """Also for the identity: writing into a result does not change the vector."""
    A = IdentityLinearOperator([(3,)], dtype=F64).to_scipy()
    x = np.ones(3)
    y = A @ x
    y[:] = 0
    assert x.sum() == 3


def test_spaces_of_several_tensors() -> None:
    """Vectors are flat, in the order of the parameters."""
    (P, B, PT), matrices = canonical_blocks()
    A = (P @ B @ PT).to_scipy()
    x = np.arange(8.0)
    assert A.shape == (8, 8)
    assert np.allclose(A @ x, torch.linalg.multi_dot(matrices).numpy() @ x)


def test_operator_without_dtype() -> None:
    """It computes in torch's default dtype, or in that which is asked for."""
    A = Cumsum([(3,)], [(3,)])
    assert A.to_scipy().dtype == np.float32
    assert A.to_scipy(np.float64).dtype == np.float64
    x = np.array([1 / 3, 0, 0])
    assert np.array_equal(A.to_scipy(np.float64) @ x, np.cumsum(x))
    assert np.array_equal(A.to_scipy(np.complex128) @ (1j * x), np.cumsum(1j * x))


def test_operator_without_adjoint() -> None:
    """It can be exported, and multiplied from one side."""

    class OneSided(PyTorchLinearOperator):
        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [2 * X[0]]

    A = OneSided([(2,)], [(2,)]).to_scipy()
    assert np.array_equal(A @ np.ones(2, np.float32), [2, 2])
    with pytest.raises(NotImplementedError, match="implement _adjoint_matmat"):
        A.rmatvec(np.ones(2, np.float32))


def test_only_vectors_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix is never turned into an array."""
    A, _ = ZOO["kronecker_positive"]()
    monkeypatch.setattr(type(A), "to_dense", None)
    exported = A.to_scipy()
    sizes: list[int] = []
    cpu = Tensor.cpu

    def records(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(tensor.numel())
        return cpu(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "cpu", records)
    exported @ np.ones(12)
    exported.rmatmat(np.ones((12, 3)))
    assert sizes == [12, 36]
