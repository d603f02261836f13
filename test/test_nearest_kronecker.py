"""Tests of ``curvlinops.nearest_kronecker``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from itertools import product as product_of_indices
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from zoo import BF16, C128, F32, F64, kron

from curvlinops._algebra import IdentityLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.nearest_kronecker import Factor, nearest_kronecker


def semidefinite(dim: int, rank: int, dtype: torch.dtype = F64) -> Tensor:
    root = torch.randn(dim, rank, dtype=dtype)
    return root @ root.mH


def diagonal(dim: int) -> DiagonalLinearOperator:
    return DiagonalLinearOperator([torch.rand(dim, dtype=F64)])


def dense(factor: Factor) -> Tensor:
    return factor if isinstance(factor, Tensor) else torch.diag(factor.diagonal())


def product(pair: tuple[Factor, Factor]) -> Tensor:
    return kron(*(dense(factor) for factor in pair))


def total(terms: Sequence[tuple[Factor, Factor]]) -> Tensor:
    return torch.stack([product(term) for term in terms]).sum(0)


def rearranged(matrix: Tensor, d_B: int, d_A: int) -> Tensor:
    """Bring the entries of ``B ⊗ A`` to the matrix ``vec(B) vec(A)ᵀ``."""
    return matrix.reshape(d_B, d_A, d_B, d_A).transpose(1, 2).reshape(d_B**2, d_A**2)


def brute_force(matrix: Tensor, d_B: int, d_A: int) -> tuple[Tensor, Tensor]:
    """Return the nearest product of a dense matrix, and all singular values."""
    U, S, Vh = torch.linalg.svd(rearranged(matrix, d_B, d_A), full_matrices=False)
    B, A = U[:, 0].reshape(d_B, d_B), Vh[0].reshape(d_A, d_A)
    return S[0] * kron(B, A), S


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_is_the_nearest(number: int, dtype: torch.dtype) -> None:
    """It is the first term of the SVD of the rearranged sum, also with more terms than entries."""
    terms = [
        (10.0**k * semidefinite(2, 1, dtype), 5.0**-k * semidefinite(3, 2, dtype))
        for k in range(number)
    ]
    matrix = total(terms)
    nearest = nearest_kronecker(terms)
    expected, values = brute_force(matrix, 2, 3)
    assert torch.allclose(product(nearest), expected, rtol=1e-6, atol=1e-9 * values[0].item())
    error = torch.linalg.matrix_norm(matrix - product(nearest))
    assert torch.allclose(error, torch.linalg.vector_norm(values[1:]), atol=1e-8 * values[0].item())


def test_factors_are_semidefinite() -> None:
    """They are exactly symmetric combinations with non-negative coefficients, of equal norms."""
    for _ in range(20):
        terms = [(semidefinite(3, 1), semidefinite(4, 1)) for _ in range(3)]
        pair = nearest_kronecker(terms)
        for factor, given in zip(pair, zip(*terms, strict=True), strict=True):
            assert isinstance(factor, Tensor)
            assert torch.equal(factor, factor.T)
            assert torch.linalg.eigvalsh(factor).min() > -1e-14 * factor.trace()
            basis = torch.stack([g.flatten() for g in given], dim=1)
            coefficients = torch.linalg.lstsq(basis, factor.flatten()).solution
            assert torch.allclose(basis @ coefficients, factor.flatten())
            assert coefficients.min() > -1e-12
        _, values = brute_force(total(terms), 3, 4)
        for factor in pair:
            assert torch.allclose(torch.linalg.matrix_norm(factor) ** 2, values[0])


@pytest.mark.parametrize("left", ["dd", "dt", "tt"])
@pytest.mark.parametrize("right", ["dd", "td", "tt"])
@pytest.mark.parametrize("keep", [(False, False), (True, False), (False, True), (True, True)])
def test_diagonals(left: str, right: str, keep: tuple[bool, bool]) -> None:
    """A side is diagonal if all its terms are, or if it has to be; then it is the nearest such."""

    def make(kinds: str, dim: int) -> list[Any]:
        return [diagonal(dim) if kind == "d" else semidefinite(dim, 2) for kind in kinds]

    terms = list(zip(make(left, 2), make(right, 3), strict=True))
    pair = nearest_kronecker(terms, keep_diagonal=keep)
    for factor, kinds, kept in zip(pair, (left, right), keep, strict=True):
        assert isinstance(factor, DiagonalLinearOperator if kept or kinds == "dd" else Tensor)
    # R with the rows and columns that stand for diagonals only
    matrix = rearranged(total(terms), 2, 3)
    rows, columns = torch.eye(2).flatten().bool(), torch.eye(3).flatten().bool()
    if keep[0]:
        matrix = matrix * rows.unsqueeze(-1)
    if keep[1]:
        matrix = matrix * columns
    U, S, Vh = torch.linalg.svd(matrix)
    expected = S[0] * torch.outer(U[:, 0], Vh[0])
    assert torch.allclose(rearranged(product(pair), 2, 3), expected, atol=1e-9)


def test_order_and_scales_do_not_matter() -> None:
    """Terms in any order, each with its scale in either factor; multiples of the sum."""
    terms = [(semidefinite(2, 1), semidefinite(3, 2)) for _ in range(3)]
    expected = nearest_kronecker(terms)
    for order in permutations(range(3)):
        scaled = [(terms[i][0] * 100.0**i, terms[i][1] / 100.0**i) for i in order]
        for factor, other in zip(nearest_kronecker(scaled), expected, strict=True):
            assert torch.allclose(factor, other)
    tripled = nearest_kronecker([(3 * B, A) for B, A in terms])
    for factor, other in zip(tripled, expected, strict=True):
        assert torch.allclose(factor, 3**0.5 * other)
    # a term in two halves, and terms that vanish on either side
    B, A = terms[0]
    zeros = [(torch.zeros_like(B), A), (1e3 * B, torch.zeros_like(A))]
    for factor, other in zip(
        nearest_kronecker([*zeros, (B, A / 2), *terms[1:], (B / 2, A)]), expected, strict=True
    ):
        assert torch.allclose(factor, other)


def test_one_term() -> None:
    """It is itself, with factors of equal norms."""
    B, A = semidefinite(2, 2), semidefinite(3, 3)
    first, second = nearest_kronecker([(B, A)])
    ratio = (torch.linalg.matrix_norm(A) / torch.linalg.matrix_norm(B)).sqrt()
    assert torch.allclose(first, ratio * B)
    assert torch.allclose(second, A / ratio)


@pytest.mark.parametrize("number", [1, 3])
def test_nothing(number: int) -> None:
    """Where all terms vanish, so do the factors, which keep their kinds."""
    B, zero = semidefinite(2, 2), DiagonalLinearOperator([torch.zeros(3, dtype=F64)])
    first, second = nearest_kronecker([(B, zero)] * number)
    assert isinstance(first, Tensor)
    assert isinstance(second, DiagonalLinearOperator)
    assert torch.equal(first, torch.zeros(2, 2, dtype=F64))
    assert torch.equal(second.diagonal(), torch.zeros(3, dtype=F64))


def test_degenerate() -> None:
    """Of several nearest products one with semi-definite factors is found, in every order."""
    E = [torch.zeros(3, 3, dtype=F64) for _ in range(3)]
    for i in range(3):
        E[i][i, i] = 1
    terms = [(E[i], E[i]) for i in range(3)]
    for order in permutations(range(3)):
        pair = nearest_kronecker([(E[i] * 7.0**i, E[i] / 7.0**i) for i in order])
        for factor in pair:
            assert torch.allclose(factor, torch.eye(3, dtype=F64) / 3**0.5, atol=1e-6)
    error = torch.linalg.matrix_norm(total(terms) - product(pair))
    assert torch.allclose(error, torch.tensor(2.0, dtype=F64).sqrt())
    # also where rounding errors break the tie, and where a term comes in several parts
    Q = torch.linalg.qr(torch.randn(3, 3, dtype=F64))[0]
    rotated = [(Q @ B @ Q.T, Q @ A @ Q.T) for B, A in terms]
    parts = [*((B, A / 4) for B, A in terms[:1] for _ in range(4)), *terms[1:]]
    for equivalent in (rotated, parts):
        for factor in nearest_kronecker(equivalent):
            assert torch.allclose(factor, torch.eye(3, dtype=F64) / 3**0.5, atol=1e-5)
    # nearly degenerate: the larger one wins
    pair = nearest_kronecker([(E[0], E[0]), (1.00001 * E[1], E[1])])
    assert torch.allclose(product(pair), 1.00001 * kron(E[1], E[1]), atol=1e-12)
    # terms of very different sizes
    pair = nearest_kronecker([(E[0], E[0]), (1e-9 * E[1], 1e-9 * E[1])])
    assert torch.allclose(product(pair), kron(E[0], E[0]), rtol=1e-15, atol=1e-30)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """The result has the dtype of the terms; it is as good as rounding lets it."""
    exact = [(semidefinite(4, 1), semidefinite(5, 2)) for _ in range(30)]
    terms = [(B.to(dtype), A.to(dtype)) for B, A in exact]
    pair = nearest_kronecker(terms)
    assert [factor.dtype for factor in pair] == [dtype, dtype]
    expected, values = brute_force(total([(B.double(), A.double()) for B, A in terms]), 4, 5)
    difference = product(tuple(factor.double() for factor in pair)) - expected
    number = 4 if dtype == F32 else 0.75  # that of rounding both factors once
    assert torch.linalg.matrix_norm(difference) < number * torch.finfo(dtype).eps * values[0]


def test_no_overflow() -> None:
    """Squares of the entries, of the norms, and their products may leave the dtype's range."""
    terms = [(semidefinite(3, 2), semidefinite(2, 2)) for _ in range(2)]
    expected = product(nearest_kronecker(terms))
    for dtype, scale in ((F64, 1e150), (F64, 1e-150), (F32, 1e30), (F32, 1e-30)):
        scaled = [((scale * B).to(dtype), (A / scale).to(dtype)) for B, A in terms]
        assert torch.allclose(product(nearest_kronecker(scaled)).double(), expected, rtol=1e-4)
    huge = [(1e150 * B, 1e150 * A) for B, A in terms]
    assert torch.allclose(nearest_kronecker(huge)[0] / 1e150, nearest_kronecker(terms)[0])
    half = [((200 * B).half(), (200 * A).half()) for B, A in terms]
    for factor, other in zip(nearest_kronecker(half), nearest_kronecker(terms), strict=True):
        assert torch.allclose(factor.double(), 200 * other, rtol=1e-2, atol=0.5)


def test_autocast() -> None:
    """Autocast does not lower the precision."""
    terms = [(semidefinite(3, 2, F32), semidefinite(2, 2, F32)) for _ in range(3)]
    with torch.autocast("cpu", BF16):
        pair = nearest_kronecker(terms)
    for factor, other in zip(pair, nearest_kronecker(terms), strict=True):
        assert torch.equal(factor, other)


def flat(pair: tuple[Factor, Factor]) -> list[Tensor]:
    return [f if isinstance(f, Tensor) else f.diagonal() for f in pair]


@pytest.mark.parametrize("keep", [(False, False), (True, False)])
def test_trace(keep: tuple[bool, bool]) -> None:
    """Without the check it is one sequence of operations, right for whatever terms."""

    def function(B1: Tensor, A1: Tensor, B2: Tensor, a2: Tensor) -> list[Tensor]:
        terms = [(B1, A1), (B2, DiagonalLinearOperator([a2]))]
        return flat(nearest_kronecker(terms, keep_diagonal=keep, check_values=False))

    def make(rank: int) -> list[Tensor]:
        return [*(semidefinite(d, rank) for d in (2, 3, 2)), torch.rand(3, dtype=F64)]

    zeros = [torch.zeros_like(t) for t in make(1)]
    tie = [torch.eye(2, dtype=F64), torch.eye(3, dtype=F64)] * 2
    tie[3] = torch.ones(3, dtype=F64)
    first, second = make(2), make(3)
    examples = [
        first,
        zeros,
        tie,
        [*first[:2], *zeros[2:]],
        [zeros[0], *second[1:]],
        [first[0], 1e8 * first[1], *second[2:]],
    ]
    expected = []
    for B1, A1, B2, a2 in examples:
        terms = [(B1, A1), (B2, DiagonalLinearOperator([a2]))]
        expected.append(flat(nearest_kronecker(terms, keep_diagonal=keep)))
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for traced in (make_fx(function)(*examples[0]), make_fx(function)(*zeros), compiled):
        for example, wanted in zip(examples, expected, strict=True):
            for ours, theirs in zip(traced(*example), wanted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_unchecked_values(value: float) -> None:
    """What is not finite does not get lost, wherever it is."""
    for term, factor in product_of_indices((0, 1), (0, 1)):
        for others_vanish in (False, True):
            terms = [[semidefinite(2, 2), semidefinite(3, 2)] for _ in range(2)]
            if others_vanish:
                terms[1 - term] = [torch.zeros_like(t) for t in terms[term]]
                terms[term][1 - factor] *= 0
            terms[term][factor][1, 1] = value
            results = nearest_kronecker([(B, A) for B, A in terms], check_values=False)
            assert not all(bool(result.isfinite().all()) for result in results)
            with pytest.raises(ValueError, match="non-finite"):
                nearest_kronecker([(B, A) for B, A in terms])


def test_terms_are_not_changed() -> None:
    """Neither the tensors nor their memory are used for the result."""
    B, A = semidefinite(2, 2), diagonal(3)
    before = B.clone(), A.diagonal()
    first, second = nearest_kronecker([(B, A)])
    first.add_(1)
    second.tensors()[0].add_(1)
    assert torch.equal(B, before[0])
    assert torch.equal(A.diagonal(), before[1])


@pytest.mark.parametrize("overwrite", [False, True])
def test_large_matrices(overwrite: bool) -> None:
    """Those of which not all rows are multiplied at once, the last of them fewer; and diagonals."""
    d = 300
    B = [semidefinite(d, 2), DiagonalLinearOperator([torch.rand(d, dtype=F64)]), semidefinite(d, 1)]
    A = [semidefinite(3, 2), semidefinite(3, 1), diagonal(3)]
    rows = [torch.stack([dense(f).flatten() for f in factors]) for factors in (B, A)]
    U, S, Vh = torch.linalg.svd(rows[0].T @ rows[1], full_matrices=False)
    first, second = nearest_kronecker(list(zip(B, A, strict=True)), overwrite=overwrite)
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    assert torch.equal(first, first.T)
    torch.testing.assert_close(first.flatten().outer(second.flatten()), S[0] * U[:, 0].outer(Vh[0]))
    memory = {f.data_ptr() for f in (*B, *A) if isinstance(f, Tensor)}
    assert ({first.data_ptr(), second.data_ptr()} <= memory) == overwrite


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "at least one term"),
        (
            [(torch.eye(2), torch.eye(3)), (torch.eye(3), torch.eye(3))],
            "first factors must share t",
        ),
        (
            [(torch.eye(2), torch.eye(3)), (torch.eye(2), diagonal(2).to(F32))],
            "second factors must share their shape, got torch.Size",
        ),
        ([(torch.eye(2), torch.eye(3)), (torch.eye(2), torch.eye(3).half())], "share their dtype"),
        ([(torch.eye(2), torch.eye(3).to("meta"))], "torch.float32 on meta"),
        ([(torch.eye(2), torch.eye(3).double())], "the second ones torch.float64 on cpu"),
        ([(torch.ones(2, 3), torch.eye(3))], "first factors must be square matrices, got shape"),
        ([(torch.eye(2), torch.ones(3))], r"second factors must be square matrices.* \[3\]"),
        ([(IdentityLinearOperator([(2,)]), torch.eye(3))], "got IdentityLinearOperator"),
        ([(torch.eye(2, dtype=torch.int64), torch.eye(2))], "needs floating-point"),
        ([(torch.eye(2) * torch.inf, torch.eye(2))], "first factors have non-finite"),
        (
            [(torch.eye(2), torch.eye(2)), (torch.eye(2), -torch.eye(2))],
            "second factors are not al",
        ),
    ],
)
def test_errors(terms: list[Any], message: str) -> None:
    """What is no pair of semi-definite matrices of the same sizes is refused."""
    with pytest.raises(ValueError, match=message):
        nearest_kronecker(terms)
