"""Linear layers: Jacobians, conventions for vectors of matrices, and linear regression.

Row-major, as in the package, vec(X) stacks the rows of X: (A ⊗ B) vec(X) = vec(A X Bᵀ), and the
derivative of W x by vec(W) is I ⊗ xᵀ. Column-major, cvec(X) = vec(Xᵀ) stacks columns:
(B ⊗ A) cvec(X) = cvec(A X Bᵀ), and the derivative is xᵀ ⊗ I.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from property_cases import BACKENDS, JOINT, REDUCTIONS, C, Problem, draw, grid, problem
from torch import Tensor, nn
from torch.func import jacrev

from curvlinops import (
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
    KroneckerProductLinearOperator,
    TransposedJacobianLinearOperator,
)
from curvlinops.kfac_utils import FromCanonicalLinearOperator

D = 2  # inputs
SHARED: dict[str, tuple[int, ...]] = {"vectors": (), "sequences": (4,), "grids": (2, 3)}
each_shape = pytest.mark.parametrize("shape", SHARED.values(), ids=SHARED)
each_bias = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])


def commutation(rows: int, columns: int) -> Tensor:
    """Return P with cvec(X) = P vec(X) for X ``[rows, columns]``."""
    order = torch.arange(rows * columns).reshape(rows, columns).T.flatten()
    return torch.eye(rows * columns, dtype=torch.float64)[order]


def regression(shape: tuple[int, ...], bias: bool, reduction: str = "sum") -> Problem:
    """Return a linear model with square loss and two unequal batches."""
    inputs = [draw(n, *shape, D, seed=n) for n in (3, 2)]
    return problem(nn.Linear(D, C, bias=bias), "mse", reduction, inputs)


def extended(case: Problem, bias: bool) -> Tensor:
    """Return all inputs ``[positions, D (+ 1)]``, with ones for a bias."""
    rows = case.X.reshape(-1, D)
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1) if bias else rows


def canonical(case: Problem, bias: bool) -> FromCanonicalLinearOperator:
    """Return the map from ``[W b]``, row-major, to the parameters."""
    group = {"W": "weight", "b": "bias"} if bias else {"W": "weight"}
    shapes = {name: p.shape for name, p in case.params.items()}
    return FromCanonicalLinearOperator(shapes, [group], case.X.device, case.X.dtype)


# ---- conventions ---------------------------------------------------------------------------------
def test_vectors_of_matrices() -> None:
    """Kronecker products act on row-major vectors; with column-major ones, factors swap."""
    A, B, X = draw(4, 2), draw(5, 3), draw(2, 3)
    K = KroneckerProductLinearOperator(A, B)
    Y = A @ X @ B.T
    torch.testing.assert_close(K @ X.flatten(), Y.flatten())
    torch.testing.assert_close(KroneckerProductLinearOperator(B, A) @ X.T.flatten(), Y.T.flatten())
    # which are different things
    assert (K @ X.T.flatten() - Y.flatten()).norm() > 0.1
    P, Q = commutation(4, 5), commutation(2, 3)
    torch.testing.assert_close(Q @ X.flatten(), X.T.flatten())
    torch.testing.assert_close(P @ K.to_dense() @ Q.T, torch.kron(B, A))


def test_derivative_of_a_product() -> None:
    """By the weight: I ⊗ xᵀ row-major and xᵀ ⊗ I column-major; autograd, and the operator."""
    x, W = draw(D, seed=2), draw(C, D, seed=3)
    J = JacobianLinearOperator(lambda p, X: X @ p["W"].T, {"W": W}, [(x[None], None)])
    row_major = torch.kron(torch.eye(C, dtype=x.dtype), x[None])
    torch.testing.assert_close(jacrev(lambda W: W @ x)(W).reshape(C, -1), row_major)
    torch.testing.assert_close(J.to_dense(), row_major)
    column_major = torch.kron(x[None], torch.eye(C, dtype=x.dtype))
    torch.testing.assert_close(J.to_dense() @ commutation(C, D).T, column_major)
    assert (row_major - column_major).norm() > 0.1


# ---- Jacobians -----------------------------------------------------------------------------------
@each_bias
@each_shape
def test_jacobian_with_merged_bias(shape: tuple[int, ...], bias: bool) -> None:
    """By [W b], each position has rows I ⊗ [x; 1]ᵀ. Catches a bias in front, and swapped axes."""
    case = regression(shape, bias)
    rows = [torch.kron(torch.eye(C, dtype=torch.float64), a[None]) for a in extended(case, bias)]
    expected = torch.cat(rows)
    P = canonical(case, bias)
    J = JacobianLinearOperator(case.model, case.params, case.data)
    torch.testing.assert_close((J @ P).to_dense(), expected)
    torch.testing.assert_close(case.jacobian @ P.to_dense(), expected)
    torch.testing.assert_close(J.to_dense(), case.jacobian)
    JT = TransposedJacobianLinearOperator(case.model, case.params, case.data)
    torch.testing.assert_close((P.T @ JT).to_dense(), expected.T)


# ---- linear regression ---------------------------------------------------------------------------
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_bias
@each_shape
def test_ggn_of_linear_regression(shape: tuple[int, ...], bias: bool, reduction: str) -> None:
    """2 c I ⊗ Σ x xᵀ, which is the Hessian. Catches ½, a mean over examples, or Σ x xᵀ ⊗ I."""
    case = regression(shape, bias, reduction)
    a, P = extended(case, bias), canonical(case, bias)
    c = 1.0 if reduction == "sum" else 1 / (len(a) * C)
    expected = torch.kron(2 * c * torch.eye(C, dtype=a.dtype), a.T @ a)
    for cls in (GGNLinearOperator, HessianLinearOperator):
        A = P.T @ case.build(cls) @ P
        torch.testing.assert_close(A.to_dense(), expected)
    torch.testing.assert_close(P.to_dense().T @ case.ggn @ P.to_dense(), expected)
    # column-major, the factors swap
    order = commutation(C, a.shape[1])
    swapped = torch.kron(a.T @ a, 2 * c * torch.eye(C, dtype=a.dtype))
    torch.testing.assert_close(order @ A.to_dense() @ order.T, swapped)


@grid(
    "shape backend cls",
    SHARED.values(),
    BACKENDS,
    [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator],
    fast=[*product(SHARED.values(), ["hooks"], [KFACLinearOperator]),
          ((4,), "make_fx", KFACLinearOperator), ((), "hooks", EKFACLinearOperator),
          ((), "hooks", KFOCLinearOperator)],
)  # fmt: skip
def test_kronecker_factors_of_linear_regression(
    shape: tuple[int, ...], backend: str, cls: type
) -> None:
    """2 c I ⊗ Σ [x; 1][x; 1]ᵀ, or 2 c I ⊗ Σ x xᵀ and 2 c M I; KFAC's factors in closed form."""
    for reduction, joint in product(REDUCTIONS, JOINT):
        case = regression(shape, True, reduction)
        a, eye = extended(case, joint), torch.eye(C, dtype=torch.float64)
        M = len(a)
        c = 1.0 if reduction == "sum" else 1 / (M * C)
        K = case.build(
            cls,
            fisher_type="type-2",
            separate_weight_and_bias=not joint,
            backend=backend,
            loss_terms="exact",
        )
        blocks = {"weight": torch.kron(2 * c * eye, a.T @ a), "bias": 2 * c * M * eye}
        for name in ("weight",) if joint else blocks:
            close = {"rtol": 1e-7, "atol": 1e-9}  # KFOC iterates
            torch.testing.assert_close(K.block(name).to_dense(), blocks[name], **close)
        if cls is KFACLinearOperator:
            B, A = K.factors("weight")
            torch.testing.assert_close(A, a.T @ a / M)
            torch.testing.assert_close(B, 2 * c * M * eye)
