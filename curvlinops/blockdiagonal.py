"""Block-diagonal operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Size, Tensor

from curvlinops._algebra import identity_like
from curvlinops._damping import Damping, block_dampings
from curvlinops._formats import Columns, concatenate, numel, split_flat
from curvlinops._operator import (
    PyTorchLinearOperator,
    check_replacement,
    check_same,
    check_strategy,
    matmat_each,
    of_block,
)
from curvlinops._rules import rule
from curvlinops._saving import saveable
from curvlinops._scalars import Scalar


@saveable
class BlockDiagonalLinearOperator(PyTorchLinearOperator):
    r"""A block-diagonal operator; its space is the concatenation of the blocks' spaces.

    Its matrix is :math:`\mathrm{diag}(B_1, \dots, B_n)`. With ``flat=True`` the tensors of the
    space are flattened and concatenated to one vector of :math:`\sum_i D_i` entries; the matrix
    stays the same. Such an operator can stand where one vector is expected, for instance as a
    block of another one. Neighbouring blocks of one type and size then multiply at once, so that
    hundreds of small blocks cost little more than one.

    It is a sequence of its blocks: it can be iterated, indexed, measured with ``len``, and blocks
    can be replaced by others between the same spaces. Sums and products of two block-diagonal
    operators with fitting blocks are block diagonal if both are flat or neither is.

    Args:
        blocks: The blocks.
        flat: Whether the space is one flat vector, rather than the list of the blocks' tensors.

    Raises:
        ValueError: If there is no block, or blocks differ in dtype or device.

    Example:
        >>> import torch
        >>> from curvlinops import BlockDiagonalLinearOperator, DiagonalLinearOperator
        >>> B = BlockDiagonalLinearOperator([DiagonalLinearOperator([torch.ones(2)])] * 2)
        >>> (B + B).trace()
        tensor(8.)
        >>> B.in_shape, BlockDiagonalLinearOperator(B.blocks, flat=True).in_shape
        ([torch.Size([2]), torch.Size([2])], [torch.Size([4])])
    """

    _init_args = ("blocks", "flat")

    def __init__(self, blocks: Sequence[PyTorchLinearOperator], flat: bool = False):
        blocks = list(blocks)
        if not blocks:
            raise ValueError("A block-diagonal operator needs at least one block, got none.")
        for block in blocks[1:]:
            check_same("a block-diagonal operator", blocks[0], block)
        in_shape = [shape for block in blocks for shape in block.in_shape]
        out_shape = [shape for block in blocks for shape in block.out_shape]
        if flat:
            super().__init__([(numel(in_shape),)], [(numel(out_shape),)])
        else:
            super().__init__(in_shape, out_shape)
        self._blocks = blocks
        self._flat = bool(flat)

    @property
    def SELF_ADJOINT(self) -> bool:  # type: ignore[override]  # items may be replaced
        """Whether the operator is its own adjoint."""
        return all(block.SELF_ADJOINT for block in self._blocks)

    @property
    def blocks(self) -> list[PyTorchLinearOperator]:
        """The blocks, as a new list."""
        return list(self._blocks)

    @property
    def flat(self) -> bool:
        """Whether the space is one flat vector."""
        return self._flat

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[PyTorchLinearOperator]:
        return iter(self._blocks)

    def __getitem__(self, index: Any) -> Any:
        return self._blocks[index]

    def __setitem__(self, index: int, block: PyTorchLinearOperator) -> None:
        """Replace a block by another one between the same spaces."""
        check_replacement("a block-diagonal operator", self._blocks[index], block)
        self._blocks[index] = block

    def _split(self, X: Columns, shapes: str) -> list[Columns]:
        """Split the tensors of a space into those of each block."""
        parts, start = [], 0
        for block in self._blocks:
            stop = start + len(getattr(block, shapes))
            parts.append(X[start:stop])
            start = stop
        return parts

    def _matmat(self, X: Columns) -> Columns:
        if self._flat:
            return [self._apply_runs(X[0], adjoint=False)]
        pairs = zip(self._blocks, self._split(X, "in_shape"), strict=True)
        return [y for block, x in pairs for y in block._matmat(x)]

    def _adjoint_matmat(self, X: Columns) -> Columns:
        if self._flat:
            return [self._apply_runs(X[0], adjoint=True)]
        pairs = zip(self._blocks, self._split(X, "out_shape"), strict=True)
        return [y for block, x in pairs for y in block._adjoint_matmat(x)]

    def _apply_runs(self, x: Tensor, adjoint: bool) -> Tensor:
        """Multiply blocks onto ``[N, K]``; neighbours of one type and size at once."""
        results, start = [], 0
        for blocks in self._runs():
            shapes = blocks[0].out_shape if adjoint else blocks[0].in_shape
            dim = numel(shapes)
            stop = start + len(blocks) * dim
            rows = x[start:stop].reshape(len(blocks), dim, x.shape[1])  # [g, N, K]
            Y = matmat_each(blocks, split_flat(rows, shapes), adjoint)
            results.append(concatenate(Y, batch_dims=1).flatten(0, 1))
            start = stop
        return results[0] if len(results) == 1 else torch.cat(results)

    def _runs(self) -> list[list[PyTorchLinearOperator]]:
        """Return neighbours of one type and size; torch.compile cannot trace itertools.groupby."""
        runs = [[self._blocks[0]]]
        for block in self._blocks[1:]:
            if _kind(block) == _kind(runs[-1][0]):
                runs[-1].append(block)
            else:
                runs.append([block])
        return runs

    def _adjoint(self) -> BlockDiagonalLinearOperator:
        return self._blockwise(lambda block: block.adjoint())

    def _conjugate(self) -> BlockDiagonalLinearOperator:
        return self._blockwise(lambda block: block._conjugate())

    def _like(self, blocks: Sequence[PyTorchLinearOperator]) -> BlockDiagonalLinearOperator:
        """Return an operator of other blocks, in the same arrangement."""
        return BlockDiagonalLinearOperator(blocks, self._flat)

    def _fits(self, other: BlockDiagonalLinearOperator) -> bool:
        """Return whether another operator has the same arrangement of blocks."""
        return type(other) is type(self) and other.flat == self.flat

    def _blockwise(
        self, function: Callable[[PyTorchLinearOperator], PyTorchLinearOperator]
    ) -> BlockDiagonalLinearOperator:
        """Return the operator of what a cheap function makes of each block."""
        return self._like([function(block) for block in self._blocks])

    def _decomposed(
        self, function: Callable[..., PyTorchLinearOperator], *values: Sequence[Any]
    ) -> BlockDiagonalLinearOperator:
        """Return the operator of what an expensive function makes of each block and its values."""
        each = enumerate(zip(self._blocks, *values, strict=True))
        return self._like([of_block(i, function, *arguments) for i, arguments in each])

    # ---- closed forms, each from those of the blocks --------------------------------------------
    def trace(self) -> Tensor:
        """Return the sum of the blocks' traces."""
        self._check_square_blocks("trace")
        return torch.stack([block.trace() for block in self._blocks]).sum()

    def diagonal(self) -> Tensor:
        """Return the blocks' diagonals one after the other."""
        self._check_square_blocks("diagonal")
        return torch.cat([block.diagonal() for block in self._blocks])

    def frobenius_norm(self) -> Tensor:
        """Return the root of the sum of the blocks' squared norms."""
        norms = torch.stack([block.frobenius_norm() for block in self._blocks])
        return torch.linalg.vector_norm(norms)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return the product of the blocks' signs and the sum of their logarithms."""
        self._check_square_blocks("slogdet")
        signs, logs = zip(*(block.slogdet() for block in self._blocks), strict=True)
        return torch.stack(signs).prod(), torch.stack(logs).sum()

    def inverse(self, damping: Damping = 0.0, **strategy: Any) -> BlockDiagonalLinearOperator:
        """Return the operator of the blocks' damped inverses.

        Args:
            damping: The damping of every block: one for all, a function of the block, or a sequence
                with one for each; see :meth:`PyTorchLinearOperator.inverse`.
            **strategy: How blocks that are Kronecker products are damped, see
                :meth:`~curvlinops.KroneckerProductLinearOperator.inverse`. Other blocks get
                ``+ damping * I`` whatever the strategy.

        Example:
            >>> import torch
            >>> from curvlinops import BlockDiagonalLinearOperator, DiagonalLinearOperator
            >>> blocks = [DiagonalLinearOperator([torch.full((2,), v)]) for v in (1.0, 3.0)]
            >>> B = BlockDiagonalLinearOperator(blocks)
            >>> B.inverse([1.0, 5.0]).diagonal()
            tensor([0.5000, 0.5000, 0.1250, 0.1250])
            >>> B.inverse(lambda block: block.trace() / block.shape[0]).diagonal()
            tensor([0.5000, 0.5000, 0.1667, 0.1667])
        """
        check_strategy(strategy)
        self._check_square_blocks("inverse")
        dampings = self._resolve_damping(damping)
        return self._decomposed(lambda block, value: block.inverse(value, **strategy), dampings)

    def _resolve_damping(self, damping: Damping) -> list[Any]:
        pairs = zip(self._blocks, block_dampings(damping, len(self), self), strict=True)
        return [
            of_block(i, lambda block, value: block._resolve_damping(value), *pair)
            for i, pair in enumerate(pairs)
        ]

    def eigh(self) -> BlockDiagonalLinearOperator:
        """Return the operator of the blocks in eigendecomposed form."""
        self._check_square_blocks("eigh")
        return self._decomposed(lambda block: block.eigh())

    def power(self, exponent: float) -> BlockDiagonalLinearOperator:
        """Return the operator of the blocks' powers."""
        self._check_square_blocks("power")
        return self._decomposed(lambda block: block.power(exponent))

    def pinv(self, rtol: float | None = None) -> BlockDiagonalLinearOperator:
        """Return the operator of the blocks' Moore-Penrose inverses."""
        return self._decomposed(lambda block: block.pinv(rtol))

    def _entrywise_squares(self) -> BlockDiagonalLinearOperator:
        return self._blockwise(lambda block: block._entrywise_squares())

    def _check_square_blocks(self, form: str) -> None:
        """Raise if a block is rectangular."""
        if any(block.shape[0] != block.shape[1] for block in self._blocks):
            raise self._missing(form)

    def _formula(self) -> str:
        if len(self) > 4:
            first, last = self._blocks[0]._formula(), self._blocks[-1]._formula()
            return f"BlockDiag({first}, … {len(self) - 2} more …, {last})"
        return f"BlockDiag({', '.join(block._formula() for block in self._blocks)})"


def _kind(block: PyTorchLinearOperator) -> tuple[type, list[Size], list[Size]]:
    """Return what blocks that multiply at once have in common."""
    return type(block), block.in_shape, block.out_shape


@rule("matmul", BlockDiagonalLinearOperator, BlockDiagonalLinearOperator)
def _multiply(
    left: BlockDiagonalLinearOperator, right: BlockDiagonalLinearOperator
) -> PyTorchLinearOperator:
    """The product of block-diagonal operators with fitting blocks is that of the blocks."""
    if not left._fits(right) or [b.in_shape for b in left] != [b.out_shape for b in right]:
        return NotImplemented
    return left._like([a @ b for a, b in zip(left, right, strict=True)])


@rule("add", BlockDiagonalLinearOperator, BlockDiagonalLinearOperator)
def _add(
    left: BlockDiagonalLinearOperator, right: BlockDiagonalLinearOperator
) -> PyTorchLinearOperator:
    """The sum of block-diagonal operators with fitting blocks is that of the blocks."""
    spaces = [[(b.in_shape, b.out_shape) for b in operator] for operator in (left, right)]
    if not left._fits(right) or spaces[0] != spaces[1]:
        return NotImplemented
    return left._like([a + b for a, b in zip(left, right, strict=True)])


@rule("scale", BlockDiagonalLinearOperator, object)
def _scale(a: BlockDiagonalLinearOperator, scalar: Scalar) -> PyTorchLinearOperator:
    """A multiple is the operator of the blocks' multiples."""
    return a._blockwise(lambda block: scalar * block)


@rule("shift", BlockDiagonalLinearOperator, object)
def _shift(a: BlockDiagonalLinearOperator, shift: Scalar) -> PyTorchLinearOperator:
    """Adding a multiple of the identity adds it to every block."""
    if any(block.in_shape != block.out_shape for block in a):
        return NotImplemented
    return a._blockwise(lambda block: block + shift * identity_like(block))
