"""Tests of ``curvlinops.solvers.nystrom`` and of the operator that it returns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlinops import DiagonalLinearOperator, TensorLinearOperator, cg
from curvlinops.low_rank import LowRankLinearOperator
from curvlinops.solvers import nystrom

F64, C128 = torch.float64, torch.complex128


def psd(eigenvalues: Tensor, dtype: torch.dtype = F64) -> Tensor:
    """Return a matrix with these eigenvalues and random eigenvectors."""
    Q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=dtype))
    matrix = (Q * eigenvalues.to(dtype)) @ Q.mH
    return (matrix + matrix.mH) / 2


@given(
    dim=st.integers(1, 30),
    rank=st.integers(1, 30),
    is_complex=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_definition(dim: int, rank: int, is_complex: bool, seed: int) -> None:
    """The approximation is (AΩ)(ΩᴴAΩ)⁻¹(AΩ)ᴴ for the Ω that the generator gives.

    Catches a shift that is not subtracted, and missing conjugates.
    """
    torch.manual_seed(seed)
    rank, dtype = min(rank, dim), C128 if is_complex else F64
    A = psd(torch.linspace(1, 2, dim, dtype=F64), dtype)
    result = nystrom(TensorLinearOperator(A), rank, generator=torch.Generator().manual_seed(seed))
    omega = torch.randn(rank, dim, dtype=dtype, generator=torch.Generator().manual_seed(seed)).T
    Y = A @ omega
    expected = Y @ torch.linalg.lstsq(omega.mH @ Y, Y.mH, driver="gelsd").solution
    # independent of the basis of the range of Ω, but for the condition of Ω
    assert torch.allclose(result.to_dense(), expected, atol=1e-9)
    U = result.eigenvectors
    assert torch.allclose(U.mH @ U, torch.eye(rank, dtype=dtype), atol=1e-12)
    assert torch.equal(result.eigenvalues, result.eigenvalues.sort(descending=True).values)


@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_low_rank_is_exact(scale: float) -> None:
    """An operator of lower rank than that of the sketch is recovered; eigenvalues 0 are none.

    Catches an unshifted Cholesky factorisation, which fails, and an absolute shift.
    """
    spectrum = scale * torch.cat([torch.linspace(1, 2, 8, dtype=F64), torch.zeros(52, dtype=F64)])
    A = psd(spectrum)
    result = nystrom(TensorLinearOperator(A), 12)
    assert torch.allclose(result.to_dense() / scale, A / scale, atol=1e-12)
    assert torch.allclose(result.eigenvalues[:8] / scale, spectrum[:8].flip(0) / scale, atol=1e-12)
    assert (result.eigenvalues >= 0).all()
    assert result.eigenvalues[8:].max() <= 1e-13 * scale


def test_below_and_close() -> None:
    """A - Â is positive semi-definite, and the error is that of the theory.

    Frangella, Tropp & Udell (2023), proposition 2.2: with p = rank / 2, E‖A - Â‖ is at most
    (1 + p / (rank - p - 1)) λ_{p+1} + e² rank / ((rank - p)² - 1) Σ_{j > p} λ_j.
    """
    spectrum = torch.arange(1, 121, dtype=F64) ** -2
    A, rank, p = psd(spectrum), 30, 15
    bound = (1 + p / (rank - p - 1)) * spectrum[p]
    bound = bound + 2.7183**2 * rank / ((rank - p) ** 2 - 1) * spectrum[p:].sum()
    errors = []
    for _ in range(10):
        difference = torch.linalg.eigvalsh(A - nystrom(TensorLinearOperator(A), rank).to_dense())
        assert difference.min() >= -1e-13
        errors.append(difference.max())
    assert spectrum[rank] <= torch.stack(errors).mean() <= bound


@pytest.mark.parametrize("damping", [1e-2, 1e-5])
def test_preconditioner(damping: float) -> None:
    """Preconditioned conjugate gradients need a fraction of the iterations, to the same solution.

    Catches an inverse that forgets what is orthogonal to the eigenvectors.
    """
    A = psd(torch.exp(-torch.arange(300, dtype=F64) / 5))
    damped = TensorLinearOperator(A + damping * torch.eye(300, dtype=F64))
    b = torch.randn(300, 2, dtype=F64)
    inverse = nystrom(TensorLinearOperator(A), 80).inverse(damping)
    _, plain = cg(damped, b, tolerance=1e-10)
    x, info = cg(damped, b, tolerance=1e-10, preconditioner=inverse)
    assert (3 * info.iterations <= plain.iterations).all()
    assert torch.allclose(damped @ x, b, atol=1e-8)


@pytest.mark.parametrize("rank", [3, 7])
@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("rest", [0.0, 0.5])
def test_closed_forms(rest: float, dtype: torch.dtype, rank: int) -> None:
    """Closed forms are those of the dense matrix, also if the vectors span the whole space."""
    U, _ = torch.linalg.qr(torch.randn(7, rank, dtype=dtype))
    A = LowRankLinearOperator(torch.linspace(1, 2, rank, dtype=F64), U, [(2, 2), (3,)], rest)
    eye = torch.eye(7, dtype=dtype)
    dense = A.to_dense()
    P = U @ U.mH
    assert torch.allclose(dense, (U * A.eigenvalues) @ U.mH + rest * (eye - P))
    assert torch.allclose(A.trace(), dense.trace())
    assert torch.allclose(A.diagonal(), dense.diagonal())
    assert torch.allclose(A.frobenius_norm(), torch.linalg.matrix_norm(dense))
    assert torch.allclose(A.det(), torch.linalg.det(dense))
    assert torch.allclose(A.pinv().to_dense(), torch.linalg.pinv(dense, hermitian=True))
    assert torch.allclose((A.sqrt() @ A.sqrt()).to_dense(), dense)
    assert torch.allclose(A.inverse(0.1).to_dense(), torch.linalg.inv(dense + 0.1 * eye))
    for combined, expected in [(2 * A, 2 * dense), (A + A**0, dense + eye)]:
        assert isinstance(combined, LowRankLinearOperator)
        assert torch.allclose(combined.to_dense(), expected)
    assert torch.allclose(A.T.to_dense(), dense.T)
    assert torch.allclose(A.H.to_dense(), dense)
    assert A.to(torch.complex64).to_dense().dtype == torch.complex64
    samples = A.sample(3, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (7, 3)
    if rest == 0 and rank < 7:
        with pytest.raises(RuntimeError, match="Increase the damping"):
            A.inverse()
    else:
        assert torch.allclose(A.inverse().to_dense(), torch.linalg.inv(dense))


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_low_precision(dtype: torch.dtype, tol: float) -> None:
    """A singular operator in low precision is approximated, too: the shift follows the dtype."""
    spectrum = torch.cat([torch.linspace(1, 2, 5, dtype=F64), torch.zeros(45, dtype=F64)])
    A = psd(spectrum)
    result = nystrom(TensorLinearOperator(A.to(dtype)), 10)
    assert result.dtype == dtype
    assert torch.allclose(result.to_dense().double(), A, atol=tol)


def test_bad_input() -> None:
    """Indefinite operators and arguments out of range are refused."""
    A = DiagonalLinearOperator([torch.ones(20, dtype=F64)])
    with pytest.raises(ValueError, match="not positive semi-definite"):
        nystrom(-1 * A, 3)
    with pytest.raises(ValueError, match="not finite"):
        nystrom(float("inf") * A, 3)
    for rank in (0, 21):
        with pytest.raises(ValueError, match="rank must be"):
            nystrom(A, rank)
    for shift in (0.0, -1.0, "other", float("nan")):
        with pytest.raises(ValueError, match="shift must be"):
            nystrom(A, 3, shift=shift)
    with pytest.raises(TypeError, match="wrap a matrix"):
        nystrom(torch.eye(3), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="space to itself"):
        nystrom(TensorLinearOperator(torch.ones(4, 3)), 1)
    assert (nystrom(0 * A, 3).to_dense() == 0).all()
    # the shift is subtracted again
    assert torch.allclose(nystrom(A, 20, shift=0.1).to_dense(), torch.eye(20, dtype=F64))
