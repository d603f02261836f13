"""Tests of ``curvlinops.blockdiagonal``."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import C128, F32, F64, Cumsum, count_calls, general, kron, positive, unitary

from curvlinops import _tensors, record_gradients
from curvlinops._algebra import (
    IdentityLinearOperator,
    ScaledLinearOperator,
    ShiftedLinearOperator,
    SumLinearOperator,
)
from curvlinops._torch_base import PyTorchLinearOperator, _ChainPyTorchLinearOperator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator
from curvlinops.testing import check_operator


def blocks(dtype: torch.dtype = F64) -> list[PyTorchLinearOperator]:
    """Blocks of every kind that has an inverse."""
    return [
        KroneckerProductLinearOperator(positive(2, dtype), positive(3, dtype)),
        DiagonalLinearOperator([torch.rand(2, 1, dtype=F64).to(dtype) + 1]),
        TensorLinearOperator(positive(2, dtype)),
        EighDecomposedLinearOperator(*torch.linalg.eigh(positive(2, dtype))),
    ]


def dense(operator: BlockDiagonalLinearOperator) -> Tensor:
    return torch.block_diag(*(block.to_dense() for block in operator))


def test_is_a_sequence() -> None:
    """Blocks are iterated, indexed and counted; the list given is not shared."""
    parts = blocks()
    B = BlockDiagonalLinearOperator(parts)
    assert list(B) == B.blocks == parts
    assert len(B) == 4
    assert B[0] is parts[0]
    assert B[-1] is parts[-1]
    assert B[1:3] == parts[1:3]
    parts.pop()
    B.blocks.pop()
    assert len(B) == 4
    assert len(BlockDiagonalLinearOperator(iter(blocks()))) == 4  # type: ignore[arg-type]


def test_space_is_concatenated() -> None:
    """The spaces of the blocks follow each other."""
    A = Cumsum([(2, 3), (1,)], [(2, 3), (1,)])
    B = BlockDiagonalLinearOperator([A, TensorLinearOperator(torch.ones(3, 2)), A])
    assert B.in_shape == [(2, 3), (1,), (2,), (2, 3), (1,)]
    assert B.out_shape == [(2, 3), (1,), (3,), (2, 3), (1,)]
    result = B @ [torch.ones(shape) for shape in B.in_shape]
    assert torch.equal(result[2], torch.full((3,), 2.0))
    assert torch.equal(result[3][1], torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "needs at least one block"),
        (
            [TensorLinearOperator(torch.ones(1, 1)), TensorLinearOperator(general(2, 2))],
            "Dtype mism",
        ),
        (
            [
                TensorLinearOperator(torch.ones(1, 1)),
                TensorLinearOperator(torch.ones(1, 1).to("meta")),
            ],
            "Device mismatch",
        ),
    ],
)
def test_constructor_refuses(parts: list[Any], message: str) -> None:
    """No blocks, and blocks that differ in dtype or device."""
    with pytest.raises(ValueError, match=message):
        BlockDiagonalLinearOperator(parts)


def test_item_assignment() -> None:
    """A block is replaced; products, closed forms and self-adjointness follow."""
    B = BlockDiagonalLinearOperator([DiagonalLinearOperator([torch.ones(2, dtype=F64)])] * 2)
    assert B.SELF_ADJOINT
    new = DiagonalLinearOperator([torch.tensor([3, 4], dtype=F64)])
    B[1] = new
    assert B[1] is new
    assert B[0] is not new
    assert B.trace() == 9
    matrix = general(2, 2)
    B[0] = TensorLinearOperator(matrix)
    assert not B.SELF_ADJOINT
    assert torch.allclose(B.H.to_dense(), torch.block_diag(matrix.T, torch.diag(new.diagonal())))
    with pytest.raises(ValueError, match="Shape mismatch in a block-diagonal operator"):
        B[0] = TensorLinearOperator(general(2, 3))
    with pytest.raises(ValueError, match="Dtype mismatch in a block-diagonal operator"):
        B[0] = TensorLinearOperator(general(2, 2, F32))
    with pytest.raises(
        TypeError, match="items of a block-diagonal operator are operators, got Tens"
    ):
        B[0] = matrix  # type: ignore[call-overload]
    with pytest.raises(IndexError):
        B[2] = new


def test_arithmetic_is_blockwise() -> None:
    """block · block, block + block, multiples and shifts act on each block, by its own rules."""
    A, B = BlockDiagonalLinearOperator(blocks()), BlockDiagonalLinearOperator(blocks())
    a, b = dense(A), dense(B)
    eye = torch.eye(12, dtype=F64)
    for operator, expected, types in (
        (A @ B, a @ b, [KroneckerProductLinearOperator, DiagonalLinearOperator]),
        (A + B, a + b, [SumLinearOperator, DiagonalLinearOperator]),
        (A - B, a - b, [SumLinearOperator, DiagonalLinearOperator]),
        (2 * A, 2 * a, [ScaledLinearOperator, DiagonalLinearOperator]),
        (2j * A, 2j * a, [ScaledLinearOperator, DiagonalLinearOperator]),
        (A + 2 * A**0, a + 2 * eye, [ShiftedLinearOperator, DiagonalLinearOperator]),
        (A**2, a @ a, [KroneckerProductLinearOperator, DiagonalLinearOperator]),
        (A.H, a.mH, [KroneckerProductLinearOperator, DiagonalLinearOperator]),
        (
            A.inverse(),
            torch.linalg.inv(a),
            [KroneckerProductLinearOperator, DiagonalLinearOperator],
        ),
        (A.eigh(), a, [EighDecomposedLinearOperator, DiagonalLinearOperator]),
        (A.power(3), a @ a @ a, [KroneckerProductLinearOperator, DiagonalLinearOperator]),
    ):
        assert type(operator) is BlockDiagonalLinearOperator
        assert [type(block) for block in operator][:2] == types
        assert torch.allclose(operator.to_dense(), expected)


def test_different_blocks_do_not_fold() -> None:
    """Blocks of other sizes, in the same space or not, are multiplied and added lazily."""

    def diagonal(*sizes: int) -> DiagonalLinearOperator:
        return DiagonalLinearOperator([torch.rand(size, dtype=F64) for size in sizes])

    A = BlockDiagonalLinearOperator([diagonal(1, 2), diagonal(3)])
    B = BlockDiagonalLinearOperator([diagonal(1), diagonal(2, 3)])
    assert A.in_shape == B.in_shape
    assert isinstance(A @ B, _ChainPyTorchLinearOperator)
    assert isinstance(A + B, SumLinearOperator)
    assert torch.allclose((A @ B).to_dense(), A.to_dense() @ B.to_dense())
    rectangular = [TensorLinearOperator(general(2, 3)), TensorLinearOperator(general(3, 2))]
    C = BlockDiagonalLinearOperator(rectangular)
    assert torch.allclose((C.H @ C).to_dense(), C.to_dense().T @ C.to_dense())


def test_every_strategy_of_inverse() -> None:
    """Only blocks with Kronecker factors take notice of the strategy; others add damping I."""
    B = BlockDiagonalLinearOperator(blocks())
    K = B[0]
    for strategy in (
        {},
        {"use_heuristic_damping": True, "min_damping": 0.9},
        {"use_exact_damping": True},
    ):
        inverse = B.inverse(0.5, **strategy)
        assert torch.allclose(inverse[0].to_dense(), K.inverse(0.5, **strategy).to_dense())
        for block, inverted in zip(B.blocks[1:], inverse.blocks[1:], strict=True):
            expected = torch.linalg.inv(block.to_dense() + 0.5 * torch.eye(2))
            assert torch.allclose(inverted.to_dense(), expected)
    plain, heuristic, exact = (
        B.inverse(0.5, **strategy)[0].to_dense()
        for strategy in ({}, {"use_heuristic_damping": True}, {"use_exact_damping": True})
    )
    assert not torch.allclose(plain, heuristic)
    assert not torch.allclose(plain, exact)


def test_nested_blocks_and_multiples_take_the_strategy() -> None:
    """Also blocks inside blocks, and multiples of Kronecker products."""
    K = KroneckerProductLinearOperator(positive(2), positive(2))
    B = BlockDiagonalLinearOperator([BlockDiagonalLinearOperator([K]), 2 * K, K + 1 * K**0])
    matrix = kron(*K)
    eye = torch.eye(4, dtype=F64)
    inverse = B.inverse(0.5, use_exact_damping=True)
    for block, expected in zip(inverse, (matrix, 2 * matrix, matrix + eye), strict=True):
        assert torch.allclose(block.to_dense(), torch.linalg.inv(expected + eye / 2))


def test_closed_forms_are_those_of_the_blocks() -> None:
    """A block that lacks one is named in the error."""
    B = BlockDiagonalLinearOperator([TensorLinearOperator(positive(2)), Cumsum([(2,)], [(2,)])])
    for form in ("trace", "diagonal", "slogdet", "frobenius_norm", "inverse", "eigh", "sqrt"):
        with pytest.raises(NotImplementedError, match="2×2 operator Cumsum> has no closed form"):
            getattr(B, form)()


def test_square_of_rectangular_blocks() -> None:
    """A square operator of rectangular blocks has a norm, but no other closed form."""
    A, B = general(2, 3), general(3, 2)
    operator = BlockDiagonalLinearOperator([TensorLinearOperator(A), TensorLinearOperator(B)])
    norm = (A.square().sum() + B.square().sum()).sqrt()
    assert torch.allclose(operator.frobenius_norm(), norm)
    for form in ("trace", "diagonal", "slogdet", "inverse", "eigh", "sqrt"):
        with pytest.raises(NotImplementedError, match="has no closed form"):
            getattr(operator, form)()


def test_determinant() -> None:
    """Signs multiply, logarithms add up, over real and complex blocks."""
    for dtype in (F64, C128):
        B = BlockDiagonalLinearOperator(
            [TensorLinearOperator(general(2, 2, dtype)), TensorLinearOperator(general(3, 3, dtype))]
        )
        sign, logabsdet = torch.linalg.slogdet(dense(B))
        assert torch.allclose(B.slogdet()[0], sign)
        assert torch.allclose(B.slogdet()[1], logabsdet)
    negative = TensorLinearOperator(-torch.eye(1))
    assert BlockDiagonalLinearOperator([negative, negative]).logdet() == 0
    assert torch.isnan(BlockDiagonalLinearOperator([negative] * 3).logdet())


# --------------------------------------------------------------------------------------------------
# One flat vector
# --------------------------------------------------------------------------------------------------
def test_flat_space() -> None:
    """The tensors of all blocks become one vector, in their order; the matrix is the same."""
    A = Cumsum([(2, 3), (1,)], [(2, 3), (1,)])
    parts = [A, TensorLinearOperator(torch.ones(3, 2)), A]
    B = BlockDiagonalLinearOperator(parts, flat=True)
    assert B.flat
    assert not BlockDiagonalLinearOperator(parts).flat
    assert B.in_shape == [(16,)]
    assert B.out_shape == [(17,)]
    assert list(B) == parts
    assert torch.equal(B.to_dense(), dense(B))
    assert torch.equal(B.H.to_dense(), dense(B).T)
    (result,) = B @ [torch.ones(16)]
    assert torch.equal(result, dense(B).sum(1))
    with pytest.raises(ValueError, match=r"must have shapes \[\(16,\)\]"):
        B @ [torch.ones(shape) for block in parts for shape in block.in_shape]


def test_flat_item_assignment() -> None:
    """A block is replaced by one of its own space; products and closed forms follow."""
    B = BlockDiagonalLinearOperator([DiagonalLinearOperator([torch.ones(2)])] * 3, flat=True)
    assert B.SELF_ADJOINT
    B[1] = TensorLinearOperator(torch.tensor([[0.0, 2], [0, 0]]))
    assert not B.SELF_ADJOINT
    assert torch.equal(B @ torch.arange(6.0), torch.tensor([0.0, 1, 6, 0, 4, 5]))
    assert torch.equal(torch.arange(6.0) @ B, torch.tensor([0.0, 1, 0, 4, 4, 5]))
    assert B.trace() == 4
    with pytest.raises(ValueError, match="Shape mismatch in a block-diagonal operator"):
        B[0] = DiagonalLinearOperator([torch.ones(2, 1)])


@pytest.mark.parametrize("flat", [False, True])
def test_layout_is_kept(flat: bool) -> None:
    """Whatever is block diagonal again has the same layout, and is the right operator."""
    A, B = (BlockDiagonalLinearOperator(blocks(), flat=flat) for _ in range(2))
    C = BlockDiagonalLinearOperator([TensorLinearOperator(general(2, 3, C128))] * 2, flat=flat)
    a, b, c = dense(A), dense(B), dense(C)
    eye = torch.eye(12, dtype=F64)
    saved = io.BytesIO()
    torch.save(A, saved)
    saved.seek(0)
    for operator, expected in (
        (A @ B, a @ b),
        (A - B, a - b),
        (2j * A, 2j * a),
        (A + 2 * A**0, a + 2 * eye),
        (A**2, a @ a),
        (C.H, c.mH),
        (C.T, c.mT),
        (C.H @ C, c.mH @ c),
        (A.inverse(), torch.linalg.inv(a)),
        (A.inverse(0.5, use_exact_damping=True), torch.linalg.inv(a + eye / 2)),
        (A.eigh(), a),
        (A.power(3), a @ a @ a),
        (A.sqrt() @ A.sqrt(), a),
        (C._entrywise_squares(), c.abs() ** 2),
        (copy.deepcopy(A), a),
        (A.to(F32), a.float()),
        (torch.load(saved), a),
    ):
        assert type(operator) is BlockDiagonalLinearOperator
        assert operator.flat == flat
        assert len(operator.in_shape) == (1 if flat else len(operator))
        assert torch.allclose(operator.to_dense(), expected)


def test_earlier_files_are_not_flat() -> None:
    """A saved state without the layout is that of a list of tensors."""
    operator = BlockDiagonalLinearOperator._from_state({"blocks": blocks()})
    assert not operator.flat


def test_layouts_do_not_mix() -> None:
    """Flat and not flat: lazy if the spaces happen to be the same, else an error."""
    parts = [KroneckerProductLinearOperator(positive(2), positive(2)) for _ in range(2)]
    one, many = parts[:1], parts
    A = BlockDiagonalLinearOperator(many, flat=True)
    B = BlockDiagonalLinearOperator([BlockDiagonalLinearOperator(many, flat=True)])
    for left, right in ((A, B), (B, A), *[[BlockDiagonalLinearOperator(one, f) for f in (0, 1)]]):
        a, b = left.to_dense(), right.to_dense()
        assert isinstance(left @ right, _ChainPyTorchLinearOperator)
        assert isinstance(left + right, SumLinearOperator)
        assert torch.allclose((left @ right).to_dense(), a @ b)
        assert torch.allclose((left - right).to_dense(), a - b)
    C = BlockDiagonalLinearOperator(many)
    for combine in (lambda x, y: x @ y, lambda x, y: x + y):
        for pair in ((A, C), (C, A)):
            with pytest.raises(ValueError, match="Shape mismatch in a "):
                combine(*pair)


def test_flat_blocks_of_other_spaces_do_not_fold() -> None:
    """One vector is cut in other places, or into tensors of other shapes."""

    def flat(*shapes: tuple[int, ...]) -> BlockDiagonalLinearOperator:
        tensors = [torch.rand(shape, dtype=F64) + 1 for shape in shapes]
        return BlockDiagonalLinearOperator([DiagonalLinearOperator([t]) for t in tensors], True)

    A = flat((2,), (4,))
    for B in (flat((4,), (2,)), flat((2,), (2, 2)), flat((2,), (2,), (2,))):
        assert isinstance(A @ B, _ChainPyTorchLinearOperator)
        assert isinstance(A + B, SumLinearOperator)
        assert torch.allclose((A @ B).to_dense(), dense(A) @ dense(B))
        assert torch.allclose((A + B).to_dense(), dense(A) + dense(B))
    # square as a whole, but not block by block
    C = BlockDiagonalLinearOperator(
        [TensorLinearOperator(general(2, 3)), TensorLinearOperator(general(3, 2))], flat=True
    )
    eye = torch.eye(5, dtype=F64)
    assert isinstance(C + 2 * C**0, ShiftedLinearOperator)
    assert torch.allclose((C + 2 * C**0).to_dense(), dense(C) + 2 * eye)
    assert torch.allclose((C @ C).to_dense(), dense(C) @ dense(C))


@pytest.mark.parametrize(
    "strategy",
    [
        {},
        {"use_heuristic_damping": True, "min_damping": 0.9},
        {"use_exact_damping": True},
    ],
    ids=["plain", "heuristic", "exact"],
)
def test_flat_blocks_take_the_strategy(strategy: dict[str, Any]) -> None:
    """Kronecker products in a flat block of a list of blocks are damped as they are alone."""
    K = [KroneckerProductLinearOperator(positive(2), positive(3)) for _ in range(3)]
    inner = BlockDiagonalLinearOperator(K[1:], flat=True)
    inverse = BlockDiagonalLinearOperator([K[0], inner]).inverse(0.5, **strategy)
    expected = [block.inverse(0.5, **strategy).to_dense() for block in K]
    assert inverse.in_shape == [(6,), (12,)]
    assert inverse[1].flat
    assert torch.allclose(inverse.to_dense(), torch.block_diag(*expected))


KINDS: dict[str, tuple[type, Callable[[torch.dtype], PyTorchLinearOperator]]] = {
    "dense": (TensorLinearOperator, lambda dtype: TensorLinearOperator(general(3, 2, dtype))),
    "diagonal": (
        DiagonalLinearOperator,
        lambda dtype: DiagonalLinearOperator([torch.randn(s, dtype=dtype) for s in ((2, 3), (1,))]),
    ),
    "kronecker": (
        KroneckerProductLinearOperator,
        lambda dtype: KroneckerProductLinearOperator(
            general(2, 3, dtype), general(4, 1, dtype), general(1, 2, dtype)
        ),
    ),
    "kronecker with diagonal": (
        KroneckerProductLinearOperator,
        lambda dtype: KroneckerProductLinearOperator(
            DiagonalLinearOperator([torch.randn(2, dtype=dtype)]), general(3, 4, dtype)
        ),
    ),
    "eigh": (
        EighDecomposedLinearOperator,
        lambda dtype: EighDecomposedLinearOperator(
            torch.randn(6, dtype=dtype),
            KroneckerProductLinearOperator(unitary(2, dtype), unitary(3, dtype)),
        ),
    ),
    "eigh of a list": (
        EighDecomposedLinearOperator,
        lambda dtype: EighDecomposedLinearOperator(
            torch.randn(3, dtype=dtype),
            BlockDiagonalLinearOperator(
                [TensorLinearOperator(unitary(n, dtype)) for n in (2, 1)], flat=False
            ),
        ),
    ),
    "multiple": (
        ScaledLinearOperator,
        lambda dtype: ScaledLinearOperator(
            KroneckerProductLinearOperator(general(2, 3, dtype)),
            -2.0 + (1j if dtype.is_complex else 0),
        ),
    ),
    "shifted": (
        ShiftedLinearOperator,
        lambda dtype: ShiftedLinearOperator(
            KroneckerProductLinearOperator(general(3, 3, dtype)),
            2.0 + (1j if dtype.is_complex else 0),
        ),
    ),
    "sum": (
        SumLinearOperator,
        lambda dtype: SumLinearOperator(
            [
                TensorLinearOperator(general(2, 3, dtype)),
                KroneckerProductLinearOperator(general(2, 3, dtype)),
            ]
        ),
    ),
}


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("name", KINDS)
def test_equal_blocks_multiply_at_once(name: str, dtype: torch.dtype) -> None:
    """Of each kind of operator; forwards, and with the adjoint."""
    kind, make = KINDS[name]
    other = TensorLinearOperator(general(2, 1, dtype))
    A = BlockDiagonalLinearOperator(
        [make(dtype), make(dtype), other, make(dtype), make(dtype), make(dtype)], flat=True
    )
    matrix = dense(A)
    X, Y = general(A.shape[1], 4, dtype), general(A.shape[0], 4, dtype)
    with count_calls(kind, "_matmat") as forwards:
        assert torch.allclose(A @ X, matrix @ X)
        assert torch.allclose(A @ X[:, 0], matrix @ X[:, 0])
    with count_calls(kind, "_adjoint_matmat") as backwards:
        assert torch.allclose((Y.mH @ A).mH, matrix.mH @ Y)
    assert len(backwards) == len(forwards) // 2 == (1 if name == "dense" else 0)  # the other one
    assert torch.allclose(A.H @ Y, matrix.mH @ Y)


def unequal(dtype: torch.dtype) -> dict[str, list[PyTorchLinearOperator]]:
    """Blocks of one type and size that cannot be stacked, or not as they are."""
    K = KroneckerProductLinearOperator
    diagonal = DiagonalLinearOperator([torch.randn(2, dtype=dtype)])
    A, B, six = general(2, 2, dtype), general(3, 3, dtype), general(6, 6, dtype)
    single = BlockDiagonalLinearOperator([TensorLinearOperator(unitary(n, dtype)) for n in (2, 1)])
    P = _ChainPyTorchLinearOperator(
        BlockDiagonalLinearOperator([TensorLinearOperator(unitary(3, dtype))], True), Merge()
    )
    Q = BlockDiagonalLinearOperator([TensorLinearOperator(unitary(3, dtype))])
    values = torch.randn(3, dtype=dtype)
    eye = IdentityLinearOperator([(2,)], dtype=dtype)
    D = TensorLinearOperator(B)
    return {
        "shapes": [K(A, B), K(B, A), K(A, B)],
        "numbers": [K(A, B), K(six)],
        "kinds": [K(A, B), K(diagonal, B), K(eye, B)],
        "identities": [K(eye, eye), K(eye, eye)],
        "bases": [EighDecomposedLinearOperator(values, op) for op in (P, Q)],
        "types of bases": [
            EighDecomposedLinearOperator(values, op)
            for op in (Q, TensorLinearOperator(Q[0].matrix))
        ],
        "multiples": [ScaledLinearOperator(D, s) for s in (2, 3, torch.tensor(4.0), 5)],
        "shifts": [ShiftedLinearOperator(D, s) for s in (2, 3, torch.tensor(4.0), 5)],
        "terms": [SumLinearOperator([D] * n) for n in (1, 3)],
        "blocks": [single] * 2,
    }


class Merge(PyTorchLinearOperator):
    """Two tensors as one vector."""

    def __init__(self) -> None:
        super().__init__([(2,), (1,)], [(3,)])

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [torch.cat(X)]

    def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [X[0][:2], X[0][2:]]


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("name", unequal(F64))
def test_unequal_blocks_multiply_one_by_one(name: str, dtype: torch.dtype) -> None:
    """Equal types and sizes do not make equal blocks."""
    A = BlockDiagonalLinearOperator(unequal(dtype)[name], flat=True)
    check_operator(A, dense(A), skip=["closed forms"])


def test_complex_multiples_of_real_blocks() -> None:
    """Real operators multiply real and imaginary parts, also in a run."""
    K = KroneckerProductLinearOperator(general(2, 3), general(2, 2))
    for scalar in (2 - 1j, torch.tensor(2 - 1j)):
        A = BlockDiagonalLinearOperator([scalar * K] * 3, flat=True)
        assert A.dtype == C128
        check_operator(A, (2 - 1j) * torch.block_diag(*[kron(*K).to(C128)] * 3))


def test_scalars_of_blocks_are_not_read() -> None:
    """Comparing tensors would wait for a GPU, and is not possible without data."""
    K = KroneckerProductLinearOperator(*(torch.ones(2, 2, device="meta") for _ in range(2)))
    two = [torch.tensor(2.0, device="meta") for _ in range(2)]
    for kind in (ScaledLinearOperator, ShiftedLinearOperator):
        A = BlockDiagonalLinearOperator([kind(K, scalar) for scalar in two], flat=True)
        assert (A @ torch.ones(8, device="meta")).shape == (8,)


def test_subclasses_multiply_by_themselves() -> None:
    """A subclass may have another product than the type that it is derived from."""

    class Negative(TensorLinearOperator):
        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [-y for y in super()._matmat(X)]

    A = BlockDiagonalLinearOperator([Negative(torch.eye(2))] * 2, flat=True)
    assert torch.equal(A @ torch.ones(4), -torch.ones(4))


def test_large_blocks_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying large matrices into one tensor would cost more time and memory than it saves."""
    parts = [KroneckerProductLinearOperator(general(3, 3), general(2, 2)) for _ in range(2)]
    A = BlockDiagonalLinearOperator([*parts, *[TensorLinearOperator(general(3, 3))] * 2], True)
    X = general(18, 2)
    for limit, number in ((9, 0), (8, 2)):
        monkeypatch.setattr(_tensors, "_MAX_STACKED", limit)
        with (
            count_calls(KroneckerProductLinearOperator, "_matmat") as products,
            count_calls(TensorLinearOperator, "_matmat") as dense_products,
        ):
            assert torch.allclose(A @ X, dense(A) @ X)
        # the dense matrix on the right-hand side has products of its own
        assert len(products) - 2 == number
        assert len(dense_products) - 2 == number


def test_many_blocks_are_cheap() -> None:
    """A product needs a few calls for each block, however it is damped."""

    def calls(operator: PyTorchLinearOperator, adjoint: bool) -> int:
        count, x = 0, torch.ones(operator.shape[0], dtype=F64)

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            x @ operator if adjoint else operator @ x
        finally:
            sys.setprofile(None)
        return count

    def make(size: int) -> BlockDiagonalLinearOperator:
        parts = [KroneckerProductLinearOperator(positive(1), positive(2)) for _ in range(size)]
        return BlockDiagonalLinearOperator(parts, flat=True)

    for function in (
        lambda A: A,
        lambda A: 2 * A,
        lambda A: A + 2 * A**0,
        lambda A: A.inverse(0.1),
        lambda A: A.inverse(0.1, use_heuristic_damping=True),
        lambda A: A.inverse(0.1, use_exact_damping=True),
    ):
        few, many = function(make(10)), function(make(110))
        for adjoint in (False, True):
            per_block = (calls(many, adjoint) - calls(few, adjoint)) / 100
            assert per_block <= 25, per_block


def test_gradients_of_flat_blocks() -> None:
    """Inside of ``record_gradients`` the stacked factors and the vector are differentiated."""
    factors = [positive(2).requires_grad_() for _ in range(4)]
    parts = [KroneckerProductLinearOperator(*factors[i : i + 2]) for i in (0, 2)]
    A = BlockDiagonalLinearOperator(parts, flat=True)
    x = torch.randn(8, dtype=F64, requires_grad=True)
    assert not (A @ x).requires_grad
    with record_gradients():
        result = (A @ x) @ x
    expected = (torch.block_diag(*(torch.kron(*K) for K in parts)) @ x) @ x
    inputs = [x, *factors]
    for a, b in zip(*(torch.autograd.grad(y, inputs) for y in (result, expected)), strict=True):
        assert torch.allclose(a, b)


def test_flat_blocks_of_size_zero() -> None:
    """Blocks may be empty on one side or on both."""
    parts = [TensorLinearOperator(torch.ones(n, m)) for n, m in ((2, 0), (2, 0), (0, 0), (0, 3))]
    A = BlockDiagonalLinearOperator(parts, flat=True)
    assert A.shape == (4, 3)
    assert torch.equal(A @ torch.ones(3, 2), torch.zeros(4, 2))
    assert torch.equal(torch.ones(4) @ A, torch.zeros(3))
