"""Tests of ``curvlinops.eigsh`` and of the Lanczos process that it shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh

from curvlinops import (
    DiagonalLinearOperator,
    GGNLinearOperator,
    PyTorchLinearOperator,
    TensorLinearOperator,
    eigsh,
)
from curvlinops.solvers._lanczos import LanczosBasis

F64, C128 = torch.float64, torch.complex128
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

SPECTRA = {
    "well": torch.linspace(1, 3, 80, dtype=F64),
    "ill": torch.logspace(-12, 0, 80, dtype=F64),
    "singular": torch.cat([torch.zeros(50, dtype=F64), torch.linspace(1, 2, 30, dtype=F64)]),
    "indefinite": torch.linspace(-1, 2, 80, dtype=F64),
    "clustered": torch.cat([torch.linspace(0, 1, 77, dtype=F64), 2 + 1e-7 * torch.arange(3)]),
    "double": torch.linspace(-1, 2, 40, dtype=F64).repeat(2),
    "negative": -torch.logspace(-3, 2, 80, dtype=F64),
    "tiny": 1e-200 * torch.linspace(-1, 2, 80, dtype=F64),
    "huge": 1e200 * torch.linspace(-1, 2, 80, dtype=F64),
}


def hermitian(eigenvalues: Tensor, dtype: torch.dtype = F64) -> Tensor:
    """Return a matrix with these eigenvalues and random eigenvectors."""
    dim = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=dtype))
    matrix = (Q * eigenvalues.to(dtype)) @ Q.mH
    return (matrix + matrix.mH) / 2


def wanted(eigenvalues: Tensor, k: int, which: str) -> Tensor:
    """Return which eigenvalues SciPy's ``which`` means, ascending, by the definition."""
    values = sorted(eigenvalues.tolist())
    if which == "BE":
        low = k // 2
        return torch.tensor(values[:low] + values[len(values) - (k - low) :], dtype=F64)
    key = {"LM": lambda v: -abs(v), "SM": abs, "LA": lambda v: -v, "SA": lambda v: v}[which]
    return torch.tensor(sorted(sorted(values, key=key)[:k]), dtype=F64)


class Counting(PyTorchLinearOperator):
    """A matrix on a space of tensors that counts products with single vectors."""

    SELF_ADJOINT = True

    def __init__(self, matrix: Tensor, shapes: list[tuple[int, ...]] | None = None):
        shapes = [(matrix.shape[0],)] if shapes is None else shapes
        super().__init__(shapes, shapes)
        self.matrix = matrix
        self.products = 0

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        width = X[0].shape[-1]
        self.products += width
        result = self.matrix @ torch.cat([x.reshape(-1, width) for x in X])
        sizes = [x.numel() // width for x in X]
        return [y.reshape(x.shape) for x, y in zip(X, result.split(sizes), strict=True)]


def check_pairs(A: Tensor, values: Tensor, vectors: Tensor, exact: Tensor, tol: float) -> None:
    """Check eigenpairs by their definition, and that they are the right ones."""
    norm = torch.linalg.matrix_norm(A, 2)
    k = len(exact)
    assert values.shape == (k,) and vectors.shape == (len(A), k)
    assert values.dtype == A.dtype.to_real() and vectors.dtype == A.dtype
    assert torch.equal(values, values.sort().values)
    assert ((values.cpu().double() - exact).abs().max() <= tol * norm.cpu()).all()
    residuals = torch.linalg.vector_norm((A @ vectors - vectors * values) / norm, dim=0)
    assert residuals.max() <= tol
    eye = torch.eye(k, dtype=A.dtype, device=A.device)
    assert (vectors.mH @ vectors - eye).abs().max() <= 10 * tol


# --------------------------------------------------------------------------------------------------
# Eigenpairs
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize(
    ("name", "which"),
    [
        (name, which)
        for name in SPECTRA
        for which in ("LM", "LA", "SA", "BE")
        # not what takes many thousands of products, in SciPy, too: ends that are hardly apart, or
        # that are one eigenvalue, many times
        if which in ("LM", "LA") or name not in ("ill", "singular")
        if (name, which) not in [("negative", "LA"), ("negative", "BE")]
    ],
)
def test_planted(name: str, which: str, dtype: torch.dtype, device: str) -> None:
    """Eigenpairs of planted spectra are exact up to rounding, with all copies of double ones.

    Catches a wrong coupling after a restart, missing reorthogonalisation (spurious copies), inner
    products without conjugate, squares that overflow or underflow.
    """
    matrix = hermitian(SPECTRA[name], dtype).to(device)
    values, vectors = eigsh(TensorLinearOperator(matrix), 5, which)
    assert values.device == vectors.device == matrix.device
    check_pairs(matrix, values, vectors, wanted(SPECTRA[name], 5, which), 2e-14)


@pytest.mark.parametrize("name", ["well", "indefinite"])
def test_smallest_magnitude(name: str) -> None:
    """``"SM"`` works without solves. Catches the smallest instead of the smallest magnitudes."""
    outer = torch.linspace(1, 2, 40, dtype=F64)
    inner = torch.tensor([0.01, -0.02, 0.03], dtype=F64)
    spectrum = SPECTRA[name] if name == "well" else torch.cat([-outer, inner, outer])
    matrix = hermitian(spectrum)
    values, vectors = eigsh(TensorLinearOperator(matrix), 3, "SM", ncv=40)
    check_pairs(matrix, values, vectors, wanted(spectrum, 3, "SM"), 2e-14)


@given(
    dim=st.integers(2, 40),
    share=st.floats(0, 1),
    extra=st.floats(0, 1),
    which=st.sampled_from(["LM", "LA", "SA", "BE"]),
    is_complex=st.booleans(),
    rank=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
def test_all_shapes(
    dim: int, share: float, extra: float, which: str, is_complex: bool, rank: int, seed: int
) -> None:
    """Any k, any ncv (dense where it is D), any rank: invariant subspaces end no search.

    Catches a wrong number of kept vectors, and one that is taken for an answer after a breakdown.
    """
    torch.manual_seed(seed)
    k = 1 + round(share * (dim - 2))
    ncv = k + 1 + round(extra * (dim - k - 1))
    spectrum = torch.linspace(-1, 2, dim, dtype=F64)
    spectrum[: max(dim - rank, 0)] = 0
    matrix = hermitian(spectrum, C128 if is_complex else F64)
    A = Counting(matrix, [(dim,)])
    # with two vectors more than pairs, restarts are too many to reach machine precision
    tolerance = 1e-8 if ncv < min(dim, k + 6) else 0.0
    values, vectors = eigsh(A, k, which, ncv=ncv, tolerance=tolerance, max_iter=2000)
    if ncv == dim:
        assert A.products == dim
    norm = torch.linalg.matrix_norm(matrix, 2).clamp(min=1e-300)
    residuals = torch.linalg.vector_norm(matrix @ vectors - vectors * values, dim=0)
    assert residuals.max() <= max(2 * tolerance, 1e-13) * norm
    exact = wanted(spectrum, k, which)
    if tolerance == 0:
        assert (values - exact).abs().max() <= 1e-13 * norm
    eye = torch.eye(k, dtype=matrix.dtype)
    assert (vectors.mH @ vectors - eye).abs().max() <= 1e-12


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE", "SM"])
@pytest.mark.parametrize(
    "spectrum",
    [
        torch.ones(60, dtype=F64),
        torch.zeros(60, dtype=F64),
        torch.tensor([5.0] * 3 + [4.0] * 3 + [1.0] * 54, dtype=F64),
        torch.tensor([5.0, 5.0] + [0.0] * 58, dtype=F64),
        torch.tensor([-3.0] * 2 + [3.0] * 2 + [0.0] * 56, dtype=F64),
    ],
    ids=["identity", "zero", "three values", "rank 2", "both signs"],
)
def test_multiplicities(spectrum: Tensor, which: str) -> None:
    """Few distinct eigenvalues: each comes as often as it is one.

    Catches stopping when the first invariant subspace has k converged pairs.
    """
    matrix = hermitian(spectrum)
    A = DiagonalLinearOperator([spectrum]) if spectrum.unique().numel() == 1 else None
    values, vectors = eigsh(A or TensorLinearOperator(matrix), 4, which)
    magnitudes = values.abs().sort().values, wanted(spectrum, 4, which).abs().sort().values
    if which in ("LM", "SM"):  # ties in magnitude: either sign
        assert torch.allclose(*magnitudes, atol=1e-13)
    else:
        assert torch.allclose(values, wanted(spectrum, 4, which), atol=1e-13)
    assert torch.allclose(vectors.mH @ vectors, torch.eye(4, dtype=F64), atol=1e-13)


@pytest.mark.parametrize("seed", range(6))
def test_start_in_an_invariant_subspace(seed: int) -> None:
    """The start has no component along the second copy of the largest eigenvalue.

    Its invariant subspace leaves room for two more vectors, which are too few to see the copy.
    Catches stopping there, with another eigenvalue instead of it.
    """
    inside = torch.arange(18, dtype=F64)
    spectrum = torch.cat([inside, torch.tensor([17.0]), torch.linspace(0, 5, 60, dtype=F64)])
    v0 = torch.cat([torch.ones(18, dtype=F64), torch.zeros(61, dtype=F64)])
    generator = torch.Generator().manual_seed(seed)
    A = DiagonalLinearOperator([spectrum])
    values, vectors = eigsh(A, 2, "LA", v0=v0, generator=generator)
    assert torch.allclose(values, torch.tensor([17.0, 17.0], dtype=F64), atol=1e-12)
    assert torch.allclose(A @ vectors, vectors * values, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tol"),
    [(torch.float32, 2e-6), (torch.complex64, 2e-6), (torch.bfloat16, 0.02)],
)
def test_low_precision(dtype: torch.dtype, tol: float) -> None:
    """bfloat16 multiplies in bfloat16 and iterates in float32, and gives orthonormal vectors."""
    wide = hermitian(torch.linspace(-1, 2, 60, dtype=F64), C128 if dtype.is_complex else F64)
    matrix = wide.to(dtype)
    values, vectors = eigsh(TensorLinearOperator(matrix), 4)
    assert values.dtype == dtype.to_real() and vectors.dtype == dtype
    exact = torch.linalg.eigvalsh(matrix.to(wide.dtype))
    assert (values.double() - wanted(exact, 4, "LM")).abs().max() <= tol
    V = vectors.to(wide.dtype)
    assert (V.mH @ V - torch.eye(4)).abs().max() <= tol


def test_list_space() -> None:
    """Operators on spaces of tensors have flat eigenvectors; v0 may have any format."""
    matrix = hermitian(SPECTRA["indefinite"])
    shapes = [(4, 10), (40,)]
    A = Counting(matrix, shapes)
    v0 = torch.randn(80, dtype=F64)
    as_list = [v0[:40].reshape(4, 10), v0[40:]]
    flat, listed = eigsh(A, 3, v0=v0), eigsh(A, 3, v0=as_list)
    check_pairs(matrix, *flat, wanted(SPECTRA["indefinite"], 3, "LM"), 1e-14)
    assert all(torch.equal(a, b) for a, b in zip(flat, listed, strict=True))


def test_values_only_and_generator() -> None:
    """Without vectors come the same eigenvalues; equal generators give equal results."""
    A = TensorLinearOperator(hermitian(SPECTRA["ill"]))
    state = torch.get_rng_state()
    runs = [eigsh(A, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0][1], runs[1][1])
    generator = torch.Generator().manual_seed(1)
    values = eigsh(A, 3, generator=generator, return_eigenvectors=False)
    assert torch.equal(values, runs[0][0])


def test_lanczos_relation() -> None:
    """A V = V T + beta v eᵀ with orthonormal V, before and after restarts, complex too.

    Catches a coupling with the wrong sign or conjugate, and a loss of orthogonality.
    """
    matrix = hermitian(SPECTRA["ill"], C128)
    basis = LanczosBasis(TensorLinearOperator(matrix), 15, torch.randn(80, dtype=C128))
    for kept in (6, 7, 3, 0):
        while basis.length < 15:
            assert basis.extend()
        V = basis.vectors.T  # [D, m + 1]
        right = V[:, :15] @ basis.T.to(C128)
        right[:, -1] += basis.beta * V[:, 15]
        assert torch.allclose(matrix @ V[:, :15], right, atol=1e-14)
        assert torch.allclose(V.mH @ V, torch.eye(16, dtype=C128), atol=1e-14)
        values, vectors, residuals = basis.ritz()
        x = basis.combined(vectors).T
        true = torch.linalg.vector_norm(matrix @ x - x * values, dim=0)
        assert torch.allclose(residuals, true, atol=1e-14)
        if kept:
            basis.restart(values[-kept:], vectors[:, -kept:])


# --------------------------------------------------------------------------------------------------
# SciPy
# --------------------------------------------------------------------------------------------------
def scipy_products(A: Any, v0: Tensor, **kwargs: Any) -> tuple[np.ndarray, int]:
    """Return SciPy's eigenvalues and its number of products."""
    operator, count = A.to_scipy(), [0]

    def multiply(x: np.ndarray) -> np.ndarray:
        count[0] += 1
        return operator @ x

    counting = LinearOperator(operator.shape, matvec=multiply, dtype=operator.dtype)
    values, _ = scipy_eigsh(counting, v0=v0.numpy(), **kwargs)
    return values, count[0]


@pytest.mark.parametrize(("ncv", "tolerance"), [(21, 0.0), (21, 1e-4), (30, 0.0), (30, 1e-8)])
def test_products_on_ggn(ncv: int, tolerance: float) -> None:
    """On a GGN, ten eigenpairs need at most 1.1 times SciPy's products, and are the same.

    Catches restarts that keep too little, and steps that are repeated.
    """
    model = Sequential(Linear(10, 15), Tanh(), Linear(15, 5)).double()
    data = [(torch.randn(64, 10, dtype=F64), torch.randint(0, 5, (64,)))]
    A = GGNLinearOperator(model, CrossEntropyLoss(), dict(model.named_parameters()), data)
    v0 = torch.randn(A.shape[1], dtype=F64)
    expected, theirs = scipy_products(A, v0, k=10, ncv=ncv, tol=tolerance)
    counting = Counting(A.to_dense())
    values, _ = eigsh(A, 10, ncv=ncv, tolerance=tolerance, v0=v0)
    again, _ = eigsh(counting, 10, ncv=ncv, tolerance=tolerance, v0=v0)
    assert torch.allclose(values, again, atol=1e-7)
    assert counting.products <= 1.1 * theirs
    accuracy = 1e-12 if tolerance == 0 else tolerance
    assert np.allclose(values.numpy(), expected, rtol=0, atol=accuracy * expected.max())


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("k", [2, 5])
def test_products_on_hard_spectra(k: int, which: str) -> None:
    """Many restarts, too, take no more than 1.1 times SciPy's products."""
    A = Counting(hermitian(torch.linspace(-1, 2, 200, dtype=F64)))
    v0 = torch.randn(200, dtype=F64)
    expected, theirs = scipy_products(A, v0, k=k, which=which)
    A.products = 0
    values, _ = eigsh(A, k, which, v0=v0)
    assert A.products <= 1.1 * theirs
    assert np.allclose(values.numpy(), expected, atol=1e-12)


# --------------------------------------------------------------------------------------------------
# What goes wrong
# --------------------------------------------------------------------------------------------------
def test_not_converged() -> None:
    """One warning with what is true: as many pairs, with residuals as bad as it says; no NaN."""
    matrix = hermitian(torch.linspace(-1, 2, 200, dtype=F64))
    A = Counting(matrix)
    with pytest.warns(UserWarning, match="^eigsh did not reach") as caught:
        values, vectors = eigsh(A, 5, "LA", max_iter=4)
    (warning,) = caught
    assert warning.filename == __file__
    residuals = torch.linalg.vector_norm(matrix @ vectors - vectors * values, dim=0)
    text = str(warning.message)
    assert f"after {A.products} products" in text
    assert f"up to {residuals.max().item():.1e}" in text
    assert f"{int((residuals > 1e-14).sum())} of 5" in text


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"k": 0}, ValueError, "k must be"),
        ({"k": 1.5}, ValueError, "k must be"),
        ({"k": 30}, TypeError, "fewer than all 30"),
        ({"which": "LR"}, ValueError, "Unknown which = 'LR'"),
        ({"ncv": 6}, ValueError, "k < ncv <= D"),
        ({"ncv": 31}, ValueError, "k < ncv <= D"),
        ({"max_iter": 0}, ValueError, "max_iter"),
        ({"tolerance": -1.0}, ValueError, "tolerance"),
        ({"tolerance": float("nan")}, ValueError, "tolerance"),
        ({"v0": torch.zeros(30)}, ValueError, "v0 must be finite and not zero"),
        ({"v0": torch.full((30,), torch.nan)}, ValueError, "v0 must be finite and not zero"),
        ({"v0": torch.ones(29)}, ValueError, "Shape mismatch"),
        ({"v0": torch.ones(30, 2)}, ValueError, "one vector"),
        ({"v0": torch.ones(30, dtype=F64)}, ValueError, "Dtype mismatch"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    """Arguments out of range are refused, in the words of the argument."""
    with pytest.raises(error, match=match):
        eigsh(DiagonalLinearOperator([torch.arange(30.0)]), **kwargs)


def test_bad_operators() -> None:
    """Matrices, rectangular operators and those with NaN are refused."""
    with pytest.raises(TypeError, match="wrap a matrix in TensorLinearOperator"):
        eigsh(torch.eye(30))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="eigsh needs an operator from a space to itself"):
        eigsh(TensorLinearOperator(torch.ones(30, 29)))
    for dim in (10, 30):
        with pytest.raises(ValueError, match="not finite"):
            eigsh(TensorLinearOperator(torch.full((dim, dim), torch.nan)))
