"""Tests of ``curvlinops.blockdiagonal``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import C128, F32, F64, Cumsum, general, kron, positive

from curvlinops._algebra import ScaledLinearOperator, ShiftedLinearOperator, SumLinearOperator
from curvlinops._torch_base import PyTorchLinearOperator, _ChainPyTorchLinearOperator
from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.dense import TensorLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.eigh import EighDecomposedLinearOperator
from curvlinops.kronecker import KroneckerProductLinearOperator


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
