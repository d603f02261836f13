"""Tests of ``curvlinops.kronecker``."""

from __future__ import annotations

from itertools import permutations
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from zoo import (
    BF16,
    C128,
    F32,
    F64,
    ZOO,
    count_calls,
    general,
    indefinite,
    kron,
    positive,
)

from curvlinops import _tensors
from curvlinops._algebra import IdentityLinearOperator
from curvlinops._torch_base import _ChainPyTorchLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator

Kron = KroneckerProductLinearOperator


def inv(matrix: Tensor, damping: float = 0.0) -> Tensor:
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype))


# --------------------------------------------------------------------------------------------------
# Factors
# --------------------------------------------------------------------------------------------------
def test_is_a_sequence() -> None:
    """Factors are iterated, indexed and counted as they were given."""
    A, B, D = positive(2), positive(3), DiagonalLinearOperator([torch.ones(4, dtype=F64)])
    K = Kron(A, B, D)
    assert len(K) == 3
    assert all(a is b for a, b in zip(K, (A, B, D), strict=True))
    assert K[0] is A
    assert K[-1] is D
    assert K[1:] == [B, D]
    assert K.shape == (24, 24)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ((), "needs at least one factor"),
        ((torch.ones(2),), r"must be 2-d tensors, got shape \[2\]"),
        ((torch.ones(2, 2), torch.ones(1, 1, 1)), r"must be 2-d tensors, got shape \[1, 1, 1\]"),
        (
            (torch.ones(2, 2), [[1.0]]),
            "must be 2-d tensors, or diagonal or identity operators, got l",
        ),
        ((TensorLinearOperator(torch.ones(2, 2)),), "got TensorLinearOperator"),
        ((torch.ones(2, 2), torch.ones(2, 2, dtype=F64)), "Dtype mismatch in a Kronecker product"),
        ((torch.ones(2, 2), torch.ones(2, 2, device="meta")), "Device mismatch in a Kronecker"),
        ((torch.ones(2, 2), DiagonalLinearOperator([torch.ones(2, dtype=F64)])), "Dtype mismatch"),
    ],
)
def test_constructor_refuses(factors: Any, message: str) -> None:
    """What is no factor, and factors that do not go together."""
    with pytest.raises(ValueError, match=message):
        Kron(*factors)


def test_item_assignment() -> None:
    """A factor is replaced, and nothing computed before is kept."""
    A, B = positive(2), positive(3)
    K = Kron(A, B)
    K.trace(), K.logdet(), K.eigh(), K.inverse(), K @ torch.ones(6, dtype=F64)
    new = positive(3)
    K[1] = new
    assert K[1] is new
    matrix = kron(A, new)
    assert torch.allclose(K.to_dense(), matrix)
    assert torch.allclose(K.trace(), matrix.trace())
    assert torch.allclose(K.logdet(), matrix.logdet())
    assert torch.allclose(K.eigh().to_dense(), matrix)
    assert torch.allclose(K.inverse().to_dense(), inv(matrix))
    K[-1] = DiagonalLinearOperator([torch.ones(3, dtype=F64)])
    assert torch.allclose(K.to_dense(), kron(A, torch.eye(3, dtype=F64)))
    A.mul_(2)  # factors are not copied
    assert torch.allclose(K.trace(), 3 * A.trace())


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.ones(3, 3, dtype=F64), "Shape mismatch in a Kronecker product"),
        (torch.ones(2, 3, dtype=F64), "Shape mismatch"),
        (torch.ones(2, 2), "Dtype mismatch"),
        (torch.ones(2, 2, dtype=F64, device="meta"), "Device mismatch"),
        (torch.ones(2, dtype=F64), "must be 2-d tensors"),
        ("factor", "got str"),
    ],
)
def test_item_assignment_is_checked(factor: Any, message: str) -> None:
    """What does not fit is refused, and the factor stays."""
    A, B = positive(2), positive(3)
    K = Kron(A, B)
    with pytest.raises(ValueError, match=message):
        K[0] = factor
    assert K[0] is A
    with pytest.raises(IndexError):
        K[2] = B


# --------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------
@settings(max_examples=30)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    columns=st.integers(1, 3),
    diagonal=st.integers(0, 3),
)
def test_products(shapes: list[tuple[int, int]], columns: int, diagonal: int) -> None:
    """Factors of any shapes, one of them possibly diagonal, on both sides."""
    factors: list[Any] = [general(*shape) for shape in shapes]
    matrices = list(factors)
    if diagonal < len(factors) and shapes[diagonal][0] == shapes[diagonal][1]:
        values = general(1, shapes[diagonal][0])[0]
        factors[diagonal] = DiagonalLinearOperator([values])
        matrices[diagonal] = torch.diag(values)
    K, matrix = Kron(*factors), kron(*matrices)
    x = torch.randn(matrix.shape[1], columns, dtype=F64)
    y = torch.randn(columns, matrix.shape[0], dtype=F64)
    assert torch.allclose(K @ x, matrix @ x)
    assert torch.allclose(y @ K, y @ matrix)
    assert torch.allclose(K.H @ y.T, matrix.T @ y.T)


def test_complex_factors() -> None:
    """The adjoint conjugates the factors, the transpose does not."""
    A, B = general(2, 3, C128), general(1, 2, C128)
    K, matrix = Kron(A, B), kron(A, B)
    for operator, expected in ((K, matrix), (K.H, matrix.mH), (K.T, matrix.mT)):
        assert isinstance(operator, Kron)
        assert torch.allclose(operator.to_dense(), expected)


def test_product_is_never_formed() -> None:
    """A product whose matrix would need a terabyte is multiplied, inverted and traced."""
    A, B = positive(500), positive(700)
    K = Kron(A, B)
    assert K.shape == (350_000, 350_000)
    X = torch.randn(500, 700, dtype=F64)
    assert torch.allclose(K @ X.flatten(), (A @ X @ B.T).flatten())
    assert torch.allclose(K.trace(), A.trace() * B.trace())
    assert torch.allclose(K.inverse() @ (K @ X.flatten()), X.flatten())


def flops(shapes: tuple[tuple[int, int], ...], columns: int) -> int:
    """Flops of applying matrices along the axes of a tensor, one after the other."""
    size, total = columns * prod(n for _, n in shapes), 0
    for m, n in shapes:
        total += 2 * size * m
        size = size // n * m
    return total


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 30), (30, 2)],
        [(30, 2), (2, 30)],
        [(20, 20), (2, 30)],
        [(5, 7), (7, 5), (6, 6)],
        [(4, 40), (3, 2), (10, 9)],
        [(4, 40), (1, 2)],  # the one that shrinks less goes first
        [(3, 1), (1, 4), (2, 2), (5, 3)],
    ],
)
def test_cheapest_order(shapes: list[tuple[int, int]], columns: int) -> None:
    """Factors that shrink the vector go first: the flops are the fewest of all orders.

    Catches a fixed order, one for matrices that is wrong for rectangular factors, and copies of a
    factor for every column.
    """
    K = Kron(*(general(*shape) for shape in shapes))
    x = torch.randn(K.shape[1], columns, dtype=F64)
    with FlopCounterMode(display=False) as counter:
        result = K @ x
    cheapest = min(flops(order, columns) for order in permutations(shapes))
    assert counter.get_total_flops() == cheapest
    assert torch.allclose(result, kron(*K) @ x)


def test_diagonal_and_identity_factors_cost_no_matrix_product() -> None:
    """They are applied entry by entry, or not at all."""
    values = torch.rand(40, dtype=F64)
    D, eye = DiagonalLinearOperator([values]), IdentityLinearOperator([(30,)], dtype=F64)
    B = general(3, 2)
    with FlopCounterMode(display=False) as counter:
        result = Kron(D, B, eye) @ torch.ones(2400, dtype=F64)
    assert counter.get_total_flops() == 2 * 2400 * 3
    expected = kron(torch.diag(values), B, torch.eye(30, dtype=F64)) @ torch.ones(2400, dtype=F64)
    assert torch.allclose(result, expected)


# --------------------------------------------------------------------------------------------------
# Products of Kronecker products
# --------------------------------------------------------------------------------------------------
def test_products_fold() -> None:
    """(A⊗B)(C⊗D) = AC⊗BD, also for rectangular and complex factors, and in chains."""
    A, B, C, D = general(2, 3, C128), general(4, 2, C128), general(3, 1, C128), general(2, 5, C128)
    folded = Kron(A, B) @ Kron(C, D)
    assert isinstance(folded, Kron)
    assert torch.allclose(folded[0], A @ C)
    assert torch.allclose(folded[1], B @ D)
    assert torch.allclose(folded.to_dense(), kron(A, B) @ kron(C, D))
    K = Kron(positive(2), positive(3))
    for operator in (K @ K.inverse(), K**3, (2 * K) @ K @ (K / 2)):
        inner = operator if isinstance(operator, Kron) else operator.operator
        assert isinstance(inner, Kron)
    assert torch.allclose((K @ K.inverse()).to_dense(), torch.eye(6, dtype=F64))


def test_products_do_not_fold_where_factors_do_not_fit() -> None:
    """Equal dimensions of the products are not enough, nor first factors that fit."""
    A = general(2, 2)
    left, right = Kron(general(2, 6), general(2, 2)), Kron(general(4, 3), general(3, 2))
    product = left @ right
    assert isinstance(product, _ChainPyTorchLinearOperator)
    assert torch.allclose(product.to_dense(), kron(*left) @ kron(*right))
    for first, second in (
        (Kron(A, A), Kron(A, A, 3 * torch.ones(1, 1, dtype=F64))),
        (Kron(A, A, 3 * torch.ones(1, 1, dtype=F64)), Kron(A, A)),
    ):
        assert torch.allclose((first @ second).to_dense(), kron(*first) @ kron(*second))
    more = Kron(general(3, 1), general(2, 1), general(2, 1))
    assert isinstance(left @ more, _ChainPyTorchLinearOperator)
    assert torch.allclose((left @ more).to_dense(), kron(*left) @ kron(*more))


def test_products_of_special_factors() -> None:
    """Diagonal factors stay diagonal, identities disappear, whatever their spaces."""
    values = torch.rand(2, 2, dtype=F64)
    D = DiagonalLinearOperator([values])
    E = DiagonalLinearOperator([values.flatten()[:3], values.flatten()[3:]])
    eye = IdentityLinearOperator([(4,)], dtype=F64)
    A = general(4, 4)
    diagonal, dense_eye = torch.diag(values.flatten()), torch.eye(4, dtype=F64)
    kinds = {
        "D": (D, diagonal),
        "E": (E, diagonal),
        "I": (eye, dense_eye),
        "A": (A, A),
    }
    expected = {
        "D": DiagonalLinearOperator,
        "E": DiagonalLinearOperator,
        "I": IdentityLinearOperator,
    }
    for a, (left, left_matrix) in kinds.items():
        for b, (right, right_matrix) in kinds.items():
            product = Kron(left, A) @ Kron(right, A)
            assert torch.allclose(product.to_dense(), kron(left_matrix @ right_matrix, A @ A))
            if "A" in (a, b):
                assert isinstance(product[0], Tensor)
            else:
                assert type(product[0]) is expected[b if a == "I" else a]


# --------------------------------------------------------------------------------------------------
# Determinant, trace and the like
# --------------------------------------------------------------------------------------------------
def test_slogdet_of_two_negative_definite_factors() -> None:
    """The determinant is positive: no NaN from the logarithms of the factors' determinants."""
    A, B = -positive(3), -positive(3)
    K, matrix = Kron(A, B), kron(A, B)
    assert A.det() < 0
    assert torch.allclose(K.logdet(), matrix.logdet())
    assert K.slogdet()[0] == 1


@pytest.mark.parametrize(
    ("signs", "dims"), [((-1, 1), (1, 2)), ((-1, 1), (1, 3)), ((1, -1), (2, 1)), ((-1, -1), (1, 3))]
)
def test_sign_of_the_determinant(signs: tuple[int, int], dims: tuple[int, int]) -> None:
    """The sign of each factor counts D / d times: negative only for an odd power."""
    factors = [sign * positive(dim) for sign, dim in zip(signs, dims, strict=True)]
    K, matrix = Kron(*factors), kron(*factors)
    assert K.slogdet()[0] == matrix.slogdet()[0]
    assert torch.allclose(K.det(), matrix.det())
    assert torch.isnan(K.logdet()) == (matrix.det() < 0)


def test_logdet_of_singular() -> None:
    """−inf, not NaN, whatever the other factor's sign."""
    singular = torch.diag(torch.tensor([1.0, 0.0]))
    for other in (positive(1, F32), -positive(1, F32), torch.zeros(1, 1), -positive(3, F32)):
        for K in (Kron(singular, other), Kron(other, singular)):
            assert K.logdet() == -torch.inf
            assert K.det() == 0
            assert K.slogdet()[0] == 0


def test_large_determinant() -> None:
    """The logarithm does not overflow where the determinant does."""
    K = Kron(1e10 * torch.eye(20, dtype=F64), 1e-5 * torch.eye(30, dtype=F64))
    assert torch.allclose(
        K.logdet(), torch.tensor(600 * 5.0, dtype=F64) * torch.log(torch.tensor(10.0).to(F64))
    )
    assert K.det() == torch.inf


@pytest.mark.parametrize("name", ["kronecker_square_of_rectangular", "kronecker_rectangular"])
def test_closed_forms_need_square_factors(name: str) -> None:
    """2×3 ⊗ 3×2 is square but has no closed form besides the norm."""
    K, matrix = ZOO[name]()
    assert torch.allclose(K.frobenius_norm(), torch.linalg.matrix_norm(matrix))
    error = NotImplementedError if matrix.shape[0] == matrix.shape[1] else ValueError
    for form in ("trace", "det", "logdet", "slogdet", "diagonal", "inverse", "eigh", "sqrt"):
        with pytest.raises(error):
            getattr(K, form)()


# --------------------------------------------------------------------------------------------------
# Inverses
# --------------------------------------------------------------------------------------------------
def test_plain_inverse() -> None:
    """Each factor is damped by itself, by Cholesky."""
    factors = positive(2), positive(3), positive(2)
    K = Kron(*factors)
    with count_calls(torch.linalg, "cholesky_ex") as calls:
        inverse = K.inverse(0.25)
        assert len(calls) == 3
    assert isinstance(inverse, Kron)
    for factor, inverted in zip(factors, inverse, strict=True):
        assert torch.allclose(inverted, inv(factor, 0.25))
    assert torch.allclose(K.inverse().to_dense(), inv(kron(*factors)))
    assert torch.allclose(inverse.inverse().to_dense(), kron(*(inv(inv(f, 0.25)) for f in factors)))


def test_plain_inverse_of_other_factors() -> None:
    """Factors that are not Hermitian, complex, diagonal or the identity."""
    values = torch.rand(2, dtype=C128) + 1
    A, B = general(3, 3, C128), positive(2, C128)
    D, eye = DiagonalLinearOperator([values]), IdentityLinearOperator([(2,)], dtype=C128)
    inverse = Kron(A, B, D, eye).inverse(0.5)
    expected = [inv(A, 0.5), inv(B, 0.5), inv(torch.diag(values), 0.5), torch.eye(2) / 1.5]
    assert isinstance(inverse[2], DiagonalLinearOperator)
    assert torch.allclose(inverse.to_dense(), kron(*(e.to(C128) for e in expected)))
    assert isinstance(Kron(eye, B).inverse()[0], IdentityLinearOperator)


@pytest.mark.parametrize("damping", [0.04, torch.tensor(0.04), 0.0])
def test_heuristic_inverse(damping: float | Tensor) -> None:
    """√(δ m₁/m₂) for the first factor, √(δ m₂/m₁) for the second, with m the mean eigenvalue."""
    A, B = 3 * positive(2), positive(4)
    m1, m2 = A.trace().item() / 2, B.trace().item() / 4
    assert m1 / m2 > 1.5
    inverse = Kron(A, B).inverse(damping, use_heuristic_damping=True)
    assert isinstance(inverse, Kron)
    value = float(damping)
    assert torch.allclose(inverse[0], inv(A, (value * m1 / m2) ** 0.5))
    assert torch.allclose(inverse[1], inv(B, (value * m2 / m1) ** 0.5))


def test_heuristic_inverse_with_minimum() -> None:
    """No factor gets less than min_damping."""
    A, B = 1e4 * positive(2), 1e-4 * positive(3)
    inverse = Kron(A, B).inverse(1e-4, use_heuristic_damping=True, min_damping=0.5)
    m1, m2 = A.trace().item() / 2, B.trace().item() / 3
    assert torch.allclose(inverse[0], inv(A, (1e-4 * m1 / m2) ** 0.5))
    assert torch.allclose(inverse[1], inv(B, 0.5))
    default = Kron(A, 1e-9 * positive(1)).inverse(0.0, use_heuristic_damping=True)
    assert torch.allclose(default[0], inv(A, 1e-8))
    # other strategies do not use it
    for strategy in ({}, {"use_exact_damping": True}):
        same = [Kron(A, B).inverse(1e-4, min_damping=m, **strategy).to_dense() for m in (1e-8, 9.0)]
        assert torch.equal(*same)


def test_heuristic_inverse_of_one_factor() -> None:
    """max(damping, min_damping)."""
    A = positive(3)
    for damping, minimum, expected in ((0.5, 0.1, 0.5), (0.01, 0.1, 0.1)):
        inverse = Kron(A).inverse(damping, use_heuristic_damping=True, min_damping=minimum)
        assert torch.allclose(inverse[0], inv(A, expected))


@pytest.mark.parametrize("order", [1, -1])
def test_heuristic_inverse_of_zero_factors(order: int) -> None:
    """A mean eigenvalue of zero: √δ for both."""
    A, zero = positive(2), torch.zeros(3, 3, dtype=F64)
    factors = [A, zero][::order]
    inverse = Kron(*factors).inverse(0.04, use_heuristic_damping=True)
    for factor, inverted in zip(factors, inverse, strict=True):
        assert torch.allclose(inverted, inv(factor, 0.2))
    both = Kron(zero, zero).inverse(0.04, use_heuristic_damping=True)
    assert torch.allclose(both[0], 5 * torch.eye(3, dtype=F64))


def test_heuristic_inverse_refuses() -> None:
    """Negative means, three factors, negative damping."""
    A = positive(2)
    for factors in ((-A, A), (A, -A)):
        with pytest.raises(RuntimeError, match="non-negative mean eigenvalues"):
            Kron(*factors).inverse(1.0, use_heuristic_damping=True)
    with pytest.raises(ValueError, match=r"one or two factors, .* has 3"):
        Kron(A, A, A).inverse(1.0, use_heuristic_damping=True)
    with pytest.raises(ValueError, match="needs a damping >= 0, got -1"):
        Kron(A, A).inverse(-1, use_heuristic_damping=True)


@pytest.mark.parametrize("dtype", [F64, C128])
def test_exact_inverse(dtype: torch.dtype) -> None:
    """(S₁⊗S₂⊗S₃ + δI)⁻¹, eigendecomposed, also of indefinite factors."""
    factors = positive(2, dtype), indefinite(3, dtype), positive(2, dtype)
    K = Kron(*factors)
    inverse = K.inverse(0.3, use_exact_damping=True)
    assert isinstance(inverse, EighDecomposedLinearOperator)
    assert isinstance(inverse.eigenvectors, Kron)
    assert torch.allclose(inverse.to_dense(), inv(kron(*factors), 0.3))
    assert torch.allclose(inverse.inverse(0.1).to_dense(), inv(inv(kron(*factors), 0.3), 0.1))
    singular = Kron(torch.ones(2, 2, dtype=dtype), torch.ones(1, 1, dtype=dtype))
    expected = inv(torch.ones(2, 2, dtype=dtype), 0.5)
    assert torch.allclose(singular.inverse(0.5, use_exact_damping=True).to_dense(), expected)


def test_both_flags() -> None:
    """Heuristic and exact damping exclude each other."""
    with pytest.raises(ValueError, match="one of use_heuristic_damping and use_exact_damping"):
        Kron(positive(2)).inverse(1.0, use_heuristic_damping=True, use_exact_damping=True)


def test_exact_inverse_of_factors_that_are_not_hermitian() -> None:
    """The factor is named."""
    K = Kron(positive(2), general(3, 3))
    with pytest.raises(
        ValueError, match=r"factor 1 of <6×6 operator Kron\(2×2 ⊗ 3×3\)>.*not Hermit"
    ):
        K.inverse(0.5, use_exact_damping=True)


def nearly_singular() -> Tensor:
    """A positive definite float32 matrix whose Cholesky decomposition fails in float32 only."""
    while True:
        root = torch.randn(6, 3)
        matrix = root @ root.T + 1e-7 * torch.eye(6)
        infos = [torch.linalg.cholesky_ex(m).info.item() for m in (matrix, matrix.double())]
        if infos[0] != 0 and infos[1] == 0:
            return matrix


def test_cholesky_failure_in_single_precision() -> None:
    """A warning that names the factor, and a good inverse in float32; or an error if asked for."""
    S = nearly_singular()
    K = Kron(positive(2, F32), S)
    with pytest.warns(
        UserWarning, match=r"factor 1 of .*Kron.* with damping 0.0 failed in torch.flo"
    ):
        inverse = K.inverse()
    assert inverse[1].dtype == F32
    assert torch.allclose(inverse[1], torch.linalg.inv(S.double()).float(), rtol=1e-3)
    with pytest.raises(RuntimeError, match="Cannot invert factor 1 of"):
        K.inverse(retry_double_precision=False)


@pytest.mark.parametrize("flags", [{}, {"use_heuristic_damping": True, "min_damping": 0.25}])
def test_cholesky_failure_in_double_precision(flags: dict[str, Any]) -> None:
    """An error that names the factor and its own damping, without a retry."""
    K = Kron(positive(2), torch.diag(torch.tensor([-1.0, 9.0], dtype=F64)))
    with pytest.raises(
        RuntimeError, match=r"factor 1 of .* with damping 0\.25 it is not positive def"
    ):
        K.inverse(0.25 if not flags else 0.0, **flags)


def test_bfloat16() -> None:
    """Silently in float32, with results in bfloat16."""
    A, B = positive(3).to(BF16), positive(2).to(BF16)
    K, matrix = Kron(A, B), kron(A.double(), B.double())
    for operator, expected in (
        (K.inverse(0.5), kron(inv(A.double(), 0.5), inv(B.double(), 0.5))),
        (K.inverse(0.5, use_exact_damping=True), inv(matrix, 0.5)),
        (K.sqrt() @ K.sqrt(), matrix),
    ):
        assert operator.dtype == BF16
        difference = operator.to_dense().double() - expected
        assert torch.linalg.matrix_norm(difference) < 0.03 * torch.linalg.matrix_norm(expected)
    assert K.logdet().dtype == BF16
    assert K.logdet().item() == pytest.approx(matrix.logdet().item(), rel=0.02)


# --------------------------------------------------------------------------------------------------
# Eigendecomposition and powers
# --------------------------------------------------------------------------------------------------
def test_eigh() -> None:
    """Kronecker products of eigenvalues and of eigenvectors, in the same order."""
    A, B = indefinite(2, C128), positive(3, C128)
    E = Kron(A, B).eigh()
    assert isinstance(E.eigenvectors, Kron)
    assert E.eigenvalues.dtype == F64
    assert torch.allclose(E.to_dense(), kron(A, B))
    Q = kron(*E.eigenvectors)
    assert torch.allclose(Q.mH @ Q, torch.eye(6, dtype=C128))


def test_eigh_of_diagonal_factors() -> None:
    """Their eigenvectors are an identity: a vocabulary's factor makes no square matrix."""
    D = DiagonalLinearOperator([torch.rand(100_000) + 0.5])
    B = positive(2, F32)
    E = Kron(B, D).eigh()
    assert isinstance(E.eigenvectors[1], IdentityLinearOperator)
    x = torch.rand(200_000)
    assert torch.allclose(E @ x, Kron(B, D) @ x, atol=1e-4)
    damped = Kron(B, D).inverse(0.5, use_exact_damping=True)
    assert torch.allclose(damped @ (Kron(B, D) @ x + 0.5 * x), x, atol=1e-4)


def test_powers() -> None:
    """Of positive factors, factor by factor; of two negative definite ones from the eigenvalues."""
    K, matrix = ZOO["kronecker_positive_complex"]()
    root = K.sqrt()
    assert isinstance(root, Kron)
    assert torch.allclose((root @ root).to_dense(), matrix)
    assert torch.allclose(K.power(-2).to_dense(), inv(matrix @ matrix))
    A, B = -positive(2), -positive(3)
    root = Kron(A, B).sqrt()
    assert torch.allclose((root @ root).to_dense(), kron(A, B))
    assert torch.linalg.eigvalsh(root.to_dense()).min() > 0
    D = DiagonalLinearOperator([torch.tensor([4, 9], dtype=F64)])
    assert isinstance(Kron(D, positive(2)).sqrt()[0], DiagonalLinearOperator)
    with pytest.raises(ValueError, match="is not real"):
        Kron(positive(2), -positive(2)).sqrt()
    with pytest.raises(ValueError, match="not Hermitian"):
        Kron(positive(2), general(2, 2)).power(2)


def test_non_finite_factor() -> None:
    """It is reported as such, with its position."""
    K = Kron(positive(2), torch.full((2, 2), torch.nan, dtype=F64))
    with pytest.raises(ValueError, match=r"factor 1 of .* non-finite"):
        K.eigh()
    with pytest.raises(RuntimeError, match="factor 1 of"):
        K.inverse()
    assert not _tensors.is_hermitian(K[1])
