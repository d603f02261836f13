"""Tests of ``curvlinops.svds``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import svds as scipy_svds
from torch import Tensor

from curvlinops import PyTorchLinearOperator, TensorLinearOperator, svds

F64, C128 = torch.float64, torch.complex128


def planted(rows: int, columns: int, singular_values: Tensor, dtype: torch.dtype = F64) -> Tensor:
    """Return a matrix with these singular values, and random singular vectors."""
    U, _ = torch.linalg.qr(torch.randn(rows, len(singular_values), dtype=dtype))
    V, _ = torch.linalg.qr(torch.randn(columns, len(singular_values), dtype=dtype))
    return (U * singular_values.to(dtype)) @ V.mH


def check_triplets(A: Tensor, U: Tensor, s: Tensor, Vh: Tensor, exact: Tensor, tol: float) -> None:
    """Check triplets by their definition, and that they are the right ones (``exact`` ascending).

    The residuals are relative to the norm of A.
    """
    k, norm = len(exact), torch.linalg.matrix_norm(A, 2)
    assert U.shape == (A.shape[0], k) and s.shape == (k,) and Vh.shape == (k, A.shape[1])
    assert U.dtype == Vh.dtype == A.dtype and s.dtype == A.dtype.to_real()
    assert (s - exact).abs().max() <= tol * norm
    eye = torch.eye(k, dtype=A.dtype)
    assert (U.mH @ U - eye).abs().max() <= tol
    assert (Vh @ Vh.mH - eye).abs().max() <= tol
    assert (A @ Vh.mH - U * s).abs().max() <= tol * norm
    assert (A.mH @ U - Vh.mH * s).abs().max() <= tol * norm


@given(
    rows=st.integers(2, 45),
    columns=st.integers(2, 45),
    share=st.floats(0, 1),
    rank_share=st.floats(0.1, 1),
    is_complex=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_all_shapes(
    rows: int, columns: int, share: float, rank_share: float, is_complex: bool, seed: int
) -> None:
    """Tall and wide, real and complex, of any rank: triplets are exact, zeros too.

    Catches the Gramian of the larger space (zeros that are no singular values), U and V mixed up,
    missing conjugates, and left vectors that are divided by zero.
    """
    torch.manual_seed(seed)
    smaller = min(rows, columns)
    k = 1 + round(share * (min(smaller, 10) - 2))
    values = torch.linspace(2, 1, smaller, dtype=F64)
    values[max(1, round(rank_share * smaller)) :] = 0
    A = planted(rows, columns, values, C128 if is_complex else F64)
    U, s, Vh = svds(TensorLinearOperator(A), k)
    # vectors of singular values 0 are as accurate as a root of the machine epsilon
    rank_deficient = bool((values[:k] == 0).any())
    check_triplets(A, U, s, Vh, values[:k].flip(0), 1e-7 if rank_deficient else 1e-12)


def test_small_singular_values() -> None:
    """Values down to the root of the machine epsilon have errors of the machine epsilon.

    Catches roots of the Gramian's eigenvalues: these have errors of 1e-10 here.
    """
    values = torch.logspace(0, -7, 40, dtype=F64)
    A = planted(60, 40, values)
    U, s, Vh = svds(TensorLinearOperator(A), 30, ncv=39)
    exact = torch.linalg.svdvals(A)[:30].flip(0)
    assert (s - exact).abs().max() <= 4e-15
    assert (A @ Vh.mH - U * s).abs().max() <= 4e-15
    assert ((s - exact).abs() / exact).max() <= 1e-8


def test_smallest() -> None:
    """``"SM"`` gives the smallest ones, ascending."""
    values = torch.linspace(3, 1, 40, dtype=F64)
    A = planted(40, 50, values)
    check_triplets(A, *svds(TensorLinearOperator(A), 3, "SM"), values[-3:].flip(0), 1e-12)


class Reshaped(PyTorchLinearOperator):
    """A matrix between spaces of two tensors each."""

    def __init__(self, matrix: Tensor):
        rows, columns = matrix.shape
        super().__init__([(2, 3), (columns - 6,)], [(rows - 4,), (2, 2)])
        self.matrix = matrix

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        flat = self.matrix @ torch.cat([X[0].flatten(0, 1), X[1]])
        return [flat[:-4], flat[-4:].unflatten(0, (2, 2))]

    def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
        flat = self.matrix.mH @ torch.cat([X[0], X[1].flatten(0, 1)])
        return [flat[:6].unflatten(0, (2, 3)), flat[6:]]


@pytest.mark.parametrize(("rows", "columns"), [(50, 40), (40, 50)])
def test_scipy_and_list_spaces(rows: int, columns: int) -> None:
    """Values and vectors (up to signs) are SciPy's; spaces of tensors have flat vectors."""
    A = planted(rows, columns, torch.linspace(5, 1, 40, dtype=F64))
    ours = svds(Reshaped(A), 4)
    theirs = scipy_svds(A.numpy(), 4)
    for a, b in zip(ours, theirs, strict=True):
        assert np.allclose(np.abs(a.numpy()), np.abs(b), atol=1e-10)
    # v0 is in the smaller space, in any format
    v0 = [torch.ones(2, 3, dtype=F64), torch.ones(34, dtype=F64)]
    if columns > rows:
        v0 = [torch.ones(36, dtype=F64), torch.ones(2, 2, dtype=F64)]
    values = svds(Reshaped(A), 4, v0=v0, return_singular_vectors=False)
    assert torch.allclose(values, ours[1], atol=1e-12)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_low_precision(dtype: torch.dtype, tol: float) -> None:
    """Results have the operator's dtype."""
    A = planted(60, 40, torch.linspace(5, 1, 40, dtype=F64))
    U, s, Vh = svds(TensorLinearOperator(A.to(dtype)), 3)
    assert U.dtype == s.dtype == Vh.dtype == dtype
    assert torch.allclose(s.double(), torch.linalg.svdvals(A)[:3].flip(0), atol=4 * tol)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"k": 0}, ValueError, "k must be"),
        ({"k": 25}, ValueError, "fewer than all 25"),
        ({"which": "LA"}, ValueError, "Unknown which"),
        ({"ncv": 26}, ValueError, "ncv"),
        ({"v0": torch.ones(30)}, ValueError, "Shape mismatch"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    """Arguments out of range are refused; a matrix must be an operator."""
    with pytest.raises(error, match=match):
        svds(TensorLinearOperator(torch.ones(30, 25)), **kwargs)
    with pytest.raises(TypeError, match="wrap a matrix"):
        svds(torch.ones(30, 25))  # type: ignore[call-overload]


def test_not_converged() -> None:
    """One warning, at the caller, and triplets without NaN."""
    A = planted(200, 150, torch.linspace(2, 1, 150, dtype=F64))
    with pytest.warns(UserWarning, match="^svds did not reach") as caught:
        U, s, Vh = svds(TensorLinearOperator(A), 3, max_iter=2)
    assert [w.filename for w in caught] == [__file__]
    assert all(bool(t.isfinite().all()) for t in (U, s, Vh))
