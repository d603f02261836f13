"""Operators of every kind with their dense matrices, for tests that run over all of them.

The matrices are put together in another way than the operators. An entry is a function, so that
each test gets new tensors, and its numbers depend on its name only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curvlinops._algebra import IdentityLinearOperator, ShiftedLinearOperator
from curvlinops._torch_base import PyTorchLinearOperator, _ChainPyTorchLinearOperator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.kfac_utils import FromCanonicalLinearOperator, ToCanonicalLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator
from curvlinops.low_rank import LowRankLinearOperator
from curvlinops.outer import OuterProductLinearOperator
from curvlinops.submatrix import SubmatrixLinearOperator

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
C128, C64 = torch.complex128, torch.complex64
Entry = tuple[PyTorchLinearOperator, Tensor]

ZOO: dict[str, Callable[[], Entry]] = {}
SKIP: dict[str, list[str]] = {}
"""What ``check_operator`` cannot ask of an entry, and why (next to the entry)."""


def entry(function: Callable[[], Entry]) -> Callable[[], Entry]:
    """Add an operator to the zoo, under the function's name."""

    def seeded() -> Entry:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(function.__name__.encode()))
            return function()

    ZOO[function.__name__] = seeded
    return seeded


# --------------------------------------------------------------------------------------------------
# Matrices
# --------------------------------------------------------------------------------------------------
def general(rows: int, columns: int, dtype: torch.dtype = F64) -> Tensor:
    """A matrix without structure."""
    return torch.randn(rows, columns, dtype=dtype)


def positive(dim: int, dtype: torch.dtype = F64) -> Tensor:
    """A well-conditioned Hermitian positive definite matrix."""
    root = torch.randn(dim, 2 * dim, dtype=dtype)
    return root @ root.mH / dim + torch.eye(dim, dtype=dtype) / 2


def indefinite(dim: int, dtype: torch.dtype = F64) -> Tensor:
    """A Hermitian matrix with eigenvalues of both signs, away from 0."""
    signs = torch.ones(dim, dtype=dtype)
    signs[::2] = -1
    Q = unitary(dim, dtype)
    return (Q * (signs * torch.linspace(1, 2, dim))) @ Q.mH


def unitary(dim: int, dtype: torch.dtype = F64) -> Tensor:
    """A unitary matrix."""
    return torch.linalg.qr(torch.randn(dim, dim, dtype=dtype))[0]


def kron(*factors: Tensor) -> Tensor:
    """The Kronecker product of matrices, written out."""
    result = torch.ones(1, 1, dtype=factors[0].dtype)
    for factor in factors:
        rows, columns = result.shape[0] * factor.shape[0], result.shape[1] * factor.shape[1]
        result = torch.einsum("ij, kl -> ikjl", result, factor).reshape(rows, columns)
    return result


def permutation(order: list[int], dtype: torch.dtype = F64) -> Tensor:
    """The matrix that brings entry ``order[i]`` of a vector to place i."""
    return torch.eye(len(order), dtype=dtype)[order]


# --------------------------------------------------------------------------------------------------
# Operators without structure
# --------------------------------------------------------------------------------------------------
class Cumsum(PyTorchLinearOperator):
    """A user's operator without dtype: a cumulative sum along the first axis of each tensor."""

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [x.cumsum(0) for x in X]

    def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [x.flip(0).cumsum(0).flip(0) for x in X]


class Named(PyTorchLinearOperator):
    """A user's operator with dtype and different, named spaces; holds a matrix."""

    def __init__(self, matrix: Tensor):
        super().__init__([(2,), (), (1, 2)], [(3,), (1,)])
        self.matrix = matrix  # [4, 5]

    @property
    def _in_names(self) -> list[str]:
        return ["w", "s", "v"]

    @property
    def _out_names(self) -> list[str]:
        return ["a", "b"]

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        w, s, v = X
        y = self.matrix @ torch.cat([w, s.unsqueeze(0), v.squeeze(0)])
        return [y[:3], y[3:]]

    def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
        y = self.matrix.mH @ torch.cat(X)
        return [y[:2], y[2], y[3:].unsqueeze(0)]


@entry
def user_without_dtype() -> Entry:
    ones = torch.ones(3, 3).tril()
    matrix = torch.block_diag(torch.kron(ones, torch.eye(2)), ones[:2, :2])
    return Cumsum([(3, 2), (2,)], [(3, 2), (2,)]), matrix


@entry
def user_named() -> Entry:
    matrix = general(4, 5)
    return Named(matrix), matrix


@entry
def user_named_complex() -> Entry:
    matrix = general(4, 5, C128)
    return Named(matrix), matrix


@entry
def user_adjoint() -> Entry:
    matrix = general(4, 5, C128)
    return Named(matrix).H, matrix.mH


@entry
def user_transpose() -> Entry:
    matrix = general(4, 5, C128)
    return Named(matrix).T, matrix.mT


@entry
def dense_wide() -> Entry:
    return TensorLinearOperator(matrix := general(3, 4)), matrix


@entry
def dense_tall_complex() -> Entry:
    return TensorLinearOperator(matrix := general(4, 3, C128)), matrix


@entry
def dense_general() -> Entry:
    return TensorLinearOperator(matrix := general(4, 4)), matrix


@entry
def dense_general_complex() -> Entry:
    return TensorLinearOperator(matrix := general(4, 4, C128)), matrix


@entry
def dense_positive() -> Entry:
    return TensorLinearOperator(matrix := positive(5)), matrix


@entry
def dense_positive_complex64() -> Entry:
    return TensorLinearOperator(matrix := positive(4, C64)), matrix


@entry
def dense_indefinite() -> Entry:
    return TensorLinearOperator(matrix := indefinite(4)), matrix


@entry
def dense_singular() -> Entry:
    root = general(4, 2)
    return TensorLinearOperator(matrix := root @ root.T), matrix


@entry
def dense_zero() -> Entry:
    return TensorLinearOperator(matrix := torch.zeros(3, 3)), matrix


@entry
def dense_number() -> Entry:
    return TensorLinearOperator(matrix := torch.tensor([[-2.5]])), matrix


@entry
def dense_bfloat16() -> Entry:
    return TensorLinearOperator(matrix := positive(4).to(BF16)), matrix


# --------------------------------------------------------------------------------------------------
# Diagonal, identity, eigendecomposed
# --------------------------------------------------------------------------------------------------
@entry
def diagonal() -> Entry:
    parts = [torch.randn(2, 3, dtype=F64), torch.tensor(-1.5, dtype=F64), torch.rand(2, dtype=F64)]
    return DiagonalLinearOperator(parts), torch.diag(torch.cat([p.flatten() for p in parts]))


@entry
def diagonal_complex() -> Entry:
    parts = [torch.randn(2, 1, dtype=C128), torch.randn(3, dtype=C128)]
    return DiagonalLinearOperator(parts), torch.diag(torch.cat([p.flatten() for p in parts]))


@entry
def diagonal_real_in_complex() -> Entry:
    values = torch.tensor([2, 0.5, 1], dtype=C128)
    return DiagonalLinearOperator([values]), torch.diag(values)


@entry
def diagonal_singular() -> Entry:
    values = torch.tensor([2.0, 0, 1])
    return DiagonalLinearOperator(values), torch.diag(values)


@entry
def diagonal_bfloat16() -> Entry:
    values = torch.rand(5).to(BF16) + 0.5
    return DiagonalLinearOperator([values]), torch.diag(values)


@entry
def diagonal_quotient() -> Entry:
    a, b = torch.randn(3, dtype=F64), torch.rand(3, dtype=F64) + 1
    return DiagonalLinearOperator([a]) / DiagonalLinearOperator([b]), torch.diag(a / b)


@entry
def identity() -> Entry:
    return IdentityLinearOperator([(2, 2), ()], "cpu", F64), torch.eye(5, dtype=F64)


@entry
def identity_without_dtype() -> Entry:
    return IdentityLinearOperator([(3,)]), torch.eye(3)


@entry
def identity_multiple() -> Entry:
    return -1.5 * IdentityLinearOperator([(4,)], dtype=F64), -1.5 * torch.eye(4, dtype=F64)


@entry
def identity_multiple_by_tensor() -> Entry:
    eye = IdentityLinearOperator([(3,)], dtype=C128)
    return torch.tensor(2.0) * eye + torch.tensor(1.0) * eye, 3 * torch.eye(3, dtype=C128)


def _eigh(values: Tensor, vectors: Tensor) -> Tensor:
    return vectors @ torch.diag(values.to(vectors.dtype)) @ vectors.mH


@entry
def eigendecomposed() -> Entry:
    values, vectors = torch.randn(4, dtype=F64), unitary(4)
    return EighDecomposedLinearOperator(values, vectors), _eigh(values, vectors)


@entry
def eigendecomposed_complex() -> Entry:
    values, vectors = torch.rand(4, dtype=F64) + 0.1, unitary(4, C128)
    return EighDecomposedLinearOperator(values, vectors), _eigh(values, vectors)


@entry
def eigendecomposed_normal() -> Entry:
    """Complex eigenvalues: not Hermitian."""
    values, vectors = torch.randn(3, dtype=C128), unitary(3, C128)
    return EighDecomposedLinearOperator(values, vectors), _eigh(values, vectors)


@entry
def eigendecomposed_singular() -> Entry:
    values, vectors = torch.tensor([0, 1, 0, 2], dtype=F64), unitary(4)
    return EighDecomposedLinearOperator(values, vectors), _eigh(values, vectors)


@entry
def eigendecomposed_kronecker() -> Entry:
    values, Q1, Q2 = torch.rand(6, dtype=F64), unitary(2), unitary(3)
    basis = KroneckerProductLinearOperator(Q1, Q2)
    return EighDecomposedLinearOperator(values, basis), _eigh(values, kron(Q1, Q2))


@entry
def eigendecomposed_in_parameter_space() -> Entry:
    values, Q1, Q2 = torch.rand(8, dtype=F64), unitary(2), unitary(6)
    P, matrix = from_canonical()
    blocks = BlockDiagonalLinearOperator([TensorLinearOperator(Q1), TensorLinearOperator(Q2)])
    vectors = matrix @ torch.block_diag(Q1, Q2)
    return EighDecomposedLinearOperator(values, P @ blocks), _eigh(values, vectors)


# --------------------------------------------------------------------------------------------------
# Kronecker products
# --------------------------------------------------------------------------------------------------
def _kron(*factors: Tensor) -> Entry:
    return KroneckerProductLinearOperator(*factors), kron(*factors)


@entry
def kronecker_single() -> Entry:
    return _kron(general(3, 3))


@entry
def kronecker_rectangular() -> Entry:
    return _kron(general(2, 3), general(4, 1), general(1, 2))


@entry
def kronecker_square_of_rectangular() -> Entry:
    return _kron(general(2, 3), general(3, 2))


@entry
def kronecker_rectangular_complex() -> Entry:
    return _kron(general(2, 3, C128), general(3, 1, C128))


@entry
def kronecker_general() -> Entry:
    return _kron(general(2, 2), general(3, 3))


@entry
def kronecker_general_complex() -> Entry:
    return _kron(general(2, 2, C128), general(3, 3, C128))


@entry
def kronecker_positive() -> Entry:
    return _kron(positive(2), positive(3), positive(2))


@entry
def kronecker_positive_complex() -> Entry:
    return _kron(positive(3, C128), positive(2, C128))


@entry
def kronecker_indefinite() -> Entry:
    return _kron(positive(2), indefinite(3))


@entry
def kronecker_negative_definite() -> Entry:
    return _kron(-positive(2), -positive(3))


# the product is positive definite, but Cholesky decompositions of its factors do not exist
SKIP["kronecker_negative_definite"] = ["inverse"]


@entry
def kronecker_singular() -> Entry:
    root = general(3, 1)
    return _kron(positive(2), root @ root.T)


@entry
def kronecker_float32() -> Entry:
    return _kron(positive(2, F32), positive(3, F32))


@entry
def kronecker_bfloat16() -> Entry:
    return _kron(positive(2).to(BF16), positive(3).to(BF16))


@entry
def kronecker_with_diagonal() -> Entry:
    matrix, values = positive(3), torch.rand(2, dtype=F64) + 0.5
    factors = matrix, DiagonalLinearOperator([values])
    return KroneckerProductLinearOperator(*factors), kron(matrix, torch.diag(values))


@entry
def kronecker_with_identity() -> Entry:
    matrix, eye = positive(2, C128), IdentityLinearOperator([(3,)], dtype=C128)
    return KroneckerProductLinearOperator(eye, matrix), kron(torch.eye(3, dtype=C128), matrix)


@entry
def kronecker_product_of_products() -> Entry:
    A, B, C = general(2, 3), general(2, 4), torch.rand(4, dtype=F64)
    left = KroneckerProductLinearOperator(A, B)
    right = KroneckerProductLinearOperator(A.T, DiagonalLinearOperator([C]))
    return left @ right, kron(A @ A.T, B * C)


# --------------------------------------------------------------------------------------------------
# Blocks, low rank, sub-matrices, canonical form
# --------------------------------------------------------------------------------------------------
@entry
def blocks() -> Entry:
    A, B, values, C = positive(2), positive(2), torch.rand(2, 1, dtype=F64) + 0.5, positive(1)
    operator = BlockDiagonalLinearOperator(
        [
            KroneckerProductLinearOperator(A, B),
            DiagonalLinearOperator([values]),
            TensorLinearOperator(C),
        ]
    )
    return operator, torch.block_diag(kron(A, B), torch.diag(values.flatten()), C)


@entry
def blocks_general_complex() -> Entry:
    A, B = general(3, 3, C128), general(2, 2, C128)
    operator = BlockDiagonalLinearOperator([TensorLinearOperator(A), TensorLinearOperator(B)])
    return operator, torch.block_diag(A, B)


@entry
def blocks_rectangular() -> Entry:
    A, B = general(3, 2), general(2, 4)
    operator = BlockDiagonalLinearOperator([TensorLinearOperator(A), TensorLinearOperator(B)])
    return operator, torch.block_diag(A, B)


@entry
def blocks_square_of_rectangular() -> Entry:
    A, B = general(3, 2), general(2, 3)
    operator = BlockDiagonalLinearOperator([TensorLinearOperator(A), TensorLinearOperator(B)])
    return operator, torch.block_diag(A, B)


@entry
def blocks_in_blocks() -> Entry:
    (inner, matrix), C = blocks(), indefinite(2)
    return BlockDiagonalLinearOperator([TensorLinearOperator(C), inner]), torch.block_diag(
        C, matrix
    )


@entry
def blocks_flat() -> Entry:
    """On one vector, with runs of equal blocks and others."""
    kinds = [
        [TensorLinearOperator(positive(2)) for _ in range(2)],
        [DiagonalLinearOperator([torch.rand(2, 1, dtype=F64) + 0.5, torch.ones(1, dtype=F64)])],
        [KroneckerProductLinearOperator(positive(1), positive(2)) for _ in range(2)],
        [EighDecomposedLinearOperator(*torch.linalg.eigh(positive(1))) for _ in range(2)],
    ]
    matrices = [
        *(block.matrix for block in kinds[0]),
        *(torch.diag(block.diagonal()) for block in kinds[1]),
        *(kron(*block) for block in kinds[2]),
        *(block.eigenvalues.reshape(1, 1) for block in kinds[3]),
    ]
    operator = BlockDiagonalLinearOperator([block for kind in kinds for block in kind], flat=True)
    return operator, torch.block_diag(*matrices)


@entry
def blocks_flat_complex() -> Entry:
    factors = [(general(2, 2, C128), general(2, 2, C128)) for _ in range(2)]
    blocks = [KroneckerProductLinearOperator(*pair) for pair in factors]
    operator = BlockDiagonalLinearOperator(blocks, flat=True)
    return operator, torch.block_diag(*(kron(*pair) for pair in factors))


@entry
def blocks_flat_rectangular() -> Entry:
    factors = [(general(2, 1), general(1, 3)) for _ in range(2)]
    blocks = [KroneckerProductLinearOperator(*pair) for pair in factors]
    last = general(4, 2)
    operator = BlockDiagonalLinearOperator([*blocks, TensorLinearOperator(last)], flat=True)
    return operator, torch.block_diag(*(kron(*pair) for pair in factors), last)


@entry
def blocks_flat_in_blocks() -> Entry:
    """As in KFAC with a grouped convolution: its weight is one vector."""
    (inner, matrix), A, B = blocks_flat(), positive(2), positive(1)
    operator = BlockDiagonalLinearOperator([KroneckerProductLinearOperator(A, B), inner])
    return operator, torch.block_diag(kron(A, B), matrix)


@entry
def low_rank() -> Entry:
    c, A = torch.rand(2, dtype=F64), general(5, 2)
    vectors = [A[:3], A[3:].reshape(2, 1, 2)]
    return OuterProductLinearOperator(c, vectors), A @ torch.diag(c) @ A.T


@entry
def low_rank_indefinite() -> Entry:
    c, A = torch.tensor([1.0, -2, 0.5, -1], dtype=F64), general(3, 4)
    return OuterProductLinearOperator(c, A), A @ torch.diag(c) @ A.T


@entry
def low_rank_complex() -> Entry:
    c, A = torch.randn(3, dtype=C128), general(3, 3, C128)
    return OuterProductLinearOperator(c, A), A @ torch.diag(c) @ A.T


@entry
def low_rank_bfloat16() -> Entry:
    c, A = torch.rand(4).to(BF16), general(3, 4).to(BF16)
    return OuterProductLinearOperator(c, A), A.double() @ torch.diag(c.double()) @ A.double().T


@entry
def few_eigenvalues() -> Entry:
    """Two eigenvalues, on two tensors; all others are equal."""
    Q, _ = torch.linalg.qr(general(5, 5))
    values = torch.tensor([3.0, 0.5], dtype=F64)
    A = LowRankLinearOperator(values, Q[:, :2], [(3,), (2, 1)], rest=0.7)
    return A, Q @ torch.diag(torch.tensor([3.0, 0.5, 0.7, 0.7, 0.7], dtype=F64)) @ Q.T


@entry
def few_eigenvalues_complex() -> Entry:
    """A positive semi-definite operator of rank 2."""
    Q, _ = torch.linalg.qr(general(4, 2, C128))
    values = torch.tensor([2.0, 1.5], dtype=F64)
    return LowRankLinearOperator(values, Q), Q @ torch.diag(values.to(C128)) @ Q.mH


@entry
def submatrix_rectangular() -> Entry:
    inner, matrix = kronecker_general_complex()
    return SubmatrixLinearOperator(inner, [4, 0, -1], [1, 2]), matrix[[4, 0, 5]][:, [1, 2]]


@entry
def submatrix_principal() -> Entry:
    inner, matrix = blocks()
    operator = SubmatrixLinearOperator(inner, torch.tensor([5, 0, 3]), [5, 0, 3])
    return operator, matrix[[5, 0, 3]][:, [5, 0, 3]]


@entry
def submatrix_square() -> Entry:
    """Square, but not principal: without a diagonal."""
    inner, matrix = dense_positive()
    return SubmatrixLinearOperator(inner, [0, 1], [2, 3]), matrix[:2, 2:4]


SHAPES = {"bias": (2,), "weight": (2, 1, 2), "scale": (2,)}
GROUPS = [{"W": "weight", "b": "bias"}, {"W": "scale"}]
ORDER = [2, 3, 0, 4, 5, 1, 6, 7]  # the entries of the parameters in canonical order


@entry
def to_canonical() -> Entry:
    return ToCanonicalLinearOperator(SHAPES, GROUPS, "cpu", F64), permutation(ORDER)


@entry
def from_canonical() -> Entry:
    groups = [{"b": "bias"}, {"W": "weight", "b": "scale"}]
    order = [0, 1, 2, 3, 6, 4, 5, 7]
    operator = FromCanonicalLinearOperator(SHAPES, groups, "cpu", F64)
    return operator, permutation(order).T


@entry
def from_canonical_complex_with_layout() -> Entry:
    """A transposed weight ``[d_in, d_out]``."""
    shapes = {"weight": (3, 2), "bias": (2,)}
    layouts = [{"view": [3, 2], "order": [1, 0]}]
    arguments = shapes, [{"W": "weight", "b": "bias"}], "cpu", C128, layouts
    matrix = permutation([0, 2, 4, 6, 1, 3, 5, 7], C128).T
    return FromCanonicalLinearOperator(*arguments), matrix


# --------------------------------------------------------------------------------------------------
# Compositions
# --------------------------------------------------------------------------------------------------
def canonical_blocks(dtype: torch.dtype = F64) -> tuple[list[PyTorchLinearOperator], list[Tensor]]:
    """P, B, Pᵀ and their matrices, as in KFAC."""
    P = ToCanonicalLinearOperator(SHAPES, GROUPS, "cpu", dtype).adjoint()
    A, B, C = positive(2, dtype), positive(3, dtype), positive(2, dtype)
    blocks = [KroneckerProductLinearOperator(A, B), KroneckerProductLinearOperator(C)]
    matrix = permutation(ORDER, dtype)
    operators = [P, BlockDiagonalLinearOperator(blocks), P.adjoint()]
    return operators, [matrix.T, torch.block_diag(kron(A, B), C), matrix]


@entry
def canonical_chain() -> Entry:
    (P, B, PT), matrices = canonical_blocks()
    return P @ B @ PT, torch.linalg.multi_dot(matrices)


@entry
def canonical_chain_complex() -> Entry:
    operators, matrices = canonical_blocks(C128)
    return _ChainPyTorchLinearOperator(*operators), torch.linalg.multi_dot(matrices)


@entry
def canonical_chain_shifted() -> Entry:
    (P, B, PT), matrices = canonical_blocks()
    chain = P @ B @ PT
    return 3 * chain + 0.5 * chain**0, 3 * torch.linalg.multi_dot(matrices) + torch.eye(8) / 2


@entry
def canonical_chain_inverse() -> Entry:
    (P, B, PT), matrices = canonical_blocks()
    return (P @ B @ PT).inverse(), torch.linalg.inv(torch.linalg.multi_dot(matrices))


@entry
def canonical_chain_sum() -> Entry:
    (P, B, PT), matrices = canonical_blocks()
    (_, B2, _), matrices2 = canonical_blocks()
    matrix = torch.linalg.multi_dot(matrices) - torch.linalg.multi_dot(matrices2) / 3
    return P @ B @ PT - P @ B2 @ PT / 3, matrix


@entry
def chain_rectangular() -> Entry:
    A, B, (C, matrix) = general(2, 3), general(3, 6), kronecker_general()
    operators = TensorLinearOperator(A), TensorLinearOperator(B)
    return operators[0] @ operators[1] @ C, A @ B @ matrix


@entry
def chain_square() -> Entry:
    (A, a), (B, b) = dense_general_complex(), eigendecomposed_complex()
    return A @ (2j * B), 2j * a @ b


@entry
def multiple_complex_of_real() -> Entry:
    inner, matrix = kronecker_positive()
    return (1 - 2j) * inner, (1 - 2j) * matrix


@entry
def multiple_by_tensor() -> Entry:
    inner, matrix = kronecker_positive()
    return torch.tensor(-2.5) * inner, -2.5 * matrix


@entry
def multiple_zero() -> Entry:
    inner, matrix = kronecker_positive()
    return 0 * inner, 0 * matrix


@entry
def sum_rectangular() -> Entry:
    (A, a), (B, b) = dense_tall_complex(), dense_tall_complex()
    return A - 2j * B, a - 2j * b


@entry
def sum_square() -> Entry:
    (A, a), B = kronecker_general(), torch.rand(6, dtype=F64)
    return A + DiagonalLinearOperator([B]), a + torch.diag(B)


@entry
def shifted_kronecker() -> Entry:
    inner, matrix = kronecker_indefinite()
    return inner + 0.25 * inner**0, matrix + 0.25 * torch.eye(6)


@entry
def shifted_kronecker_complex() -> Entry:
    inner, matrix = kronecker_positive_complex()
    return inner + (0.5 + 1j) * inner**0, matrix + (0.5 + 1j) * torch.eye(6)


@entry
def shifted_kronecker_not_hermitian() -> Entry:
    inner, matrix = kronecker_general()
    return inner - 2 * inner**0, matrix - 2 * torch.eye(6)


@entry
def shifted_complex_multiple_of_real() -> Entry:
    inner, matrix = kronecker_positive()
    eye = IdentityLinearOperator(inner.in_shape, "cpu", C128)
    return 2j * inner + 3 * eye, 2j * matrix + 3 * torch.eye(12)


@entry
def shifted_dense() -> Entry:
    inner, matrix = dense_general()
    return ShiftedLinearOperator(inner, 4.0), matrix + 4 * torch.eye(4)


@entry
def shifted_low_rank() -> Entry:
    inner, matrix = low_rank()
    return inner + torch.tensor(0.5) * inner**0, matrix + torch.eye(5) / 2


@entry
def shifted_multiple_of_dense() -> Entry:
    inner, matrix = dense_general()
    return torch.tensor(2.0) * inner + 3 * inner**0, 2 * matrix + 3 * torch.eye(4)


@entry
def power_of_dense() -> Entry:
    inner, matrix = dense_general()
    return inner**3, matrix @ matrix @ matrix


@entry
def negative_power_of_kronecker() -> Entry:
    inner, matrix = kronecker_general()
    return inner**-2, torch.linalg.inv(matrix @ matrix)


# --------------------------------------------------------------------------------------------------
# Tools
# --------------------------------------------------------------------------------------------------
@contextmanager
def count_calls(owner: Any, name: str) -> Iterator[list[tuple[Any, ...]]]:
    """Record the arguments of every call of a function inside."""
    function, calls = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)
    try:
        yield calls
    finally:
        setattr(owner, name, function)
