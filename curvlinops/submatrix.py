"""Sub-matrices of operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvlinops._formats import Columns, concatenate, split_flat
from curvlinops._operator import PyTorchLinearOperator
from curvlinops._saving import saveable

Indices = Sequence[int] | Tensor


@saveable
class SubmatrixLinearOperator(PyTorchLinearOperator):
    """The sub-matrix ``A[row_idxs, :][:, col_idxs]`` of an operator, on flat vectors.

    Args:
        A: The operator.
        row_idxs: Indices of rows; negative ones count from the end.
        col_idxs: Indices of columns.

    Raises:
        ValueError: If indices are not integers, out of range, repeated or missing.

    Example:
        >>> import torch
        >>> from curvlinops import DiagonalLinearOperator, SubmatrixLinearOperator
        >>> D = DiagonalLinearOperator([torch.arange(4.0)])
        >>> SubmatrixLinearOperator(D, [1, 2], [2, 3]).to_dense()
        tensor([[0., 0.],
                [2., 0.]])
    """

    def __init__(self, A: PyTorchLinearOperator, row_idxs: Indices, col_idxs: Indices):
        self._operator = A
        self.set_submatrix(row_idxs, col_idxs)

    def set_submatrix(self, row_idxs: Indices, col_idxs: Indices) -> None:
        """Choose other rows and columns of the same operator."""
        A = self._operator
        rows = _as_indices(row_idxs, A.shape[0], "row", A.device)
        columns = _as_indices(col_idxs, A.shape[1], "column", A.device)
        self._choose(rows, columns, torch.equal(rows, columns))

    def _choose(self, rows: Tensor, columns: Tensor, principal: bool) -> None:
        """Set rows and columns; a principal sub-matrix has the same ones."""
        super().__init__([(len(columns),)], [(len(rows),)])
        self._rows, self._columns, self._principal = rows, columns, principal

    @property
    def SELF_ADJOINT(self) -> bool:  # type: ignore[override]  # items may be replaced
        """Whether the operator is its own adjoint."""
        return self._operator.SELF_ADJOINT and self._principal

    def _state(self) -> dict[str, Any]:
        return {
            "operator": self._operator,
            "rows": self._rows,
            "columns": self._columns,
            "principal": self._principal,
        }

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> SubmatrixLinearOperator:
        submatrix = cls.__new__(cls)  # the indices are known to be good, and may hold no data
        submatrix._operator = state["operator"]
        submatrix._choose(state["rows"], state["columns"], state["principal"])
        return submatrix

    def _matmat(self, X: Columns) -> Columns:
        (x,) = X
        full = x.new_zeros(self._operator.shape[1], x.shape[1])
        full[self._columns] = x
        result = concatenate(self._operator._matmat(split_flat(full, self._operator.in_shape)))
        return [result[self._rows]]

    def _adjoint(self) -> SubmatrixLinearOperator:
        return SubmatrixLinearOperator(self._operator.adjoint(), self._columns, self._rows)

    def _conjugate(self) -> SubmatrixLinearOperator:
        return SubmatrixLinearOperator(self._operator._conjugate(), self._rows, self._columns)

    def diagonal(self) -> Tensor:
        """Return the sub-matrix's diagonal, for a principal sub-matrix."""
        self._check_square("diagonal")
        if not self._principal:
            raise self._missing("diagonal")
        return self._operator.diagonal()[self._rows]

    def trace(self) -> Tensor:
        """Return the trace of a principal sub-matrix."""
        return self.diagonal().sum()

    def _formula(self) -> str:
        rows, columns = len(self._rows), len(self._columns)
        return f"({self._operator._formula()})[{rows} rows, {columns} columns]"


def _as_indices(indices: Indices, size: int, what: str, device: torch.device | None) -> Tensor:
    """Return indices as a tensor of non-negative integers."""
    result = torch.as_tensor(
        indices if isinstance(indices, Tensor) else list(indices), device=device
    )
    integers = not (result.is_floating_point() or result.is_complex())
    if result.ndim != 1 or result.numel() == 0 or not integers or result.dtype == torch.bool:
        got = f"{result.dtype} of shape {list(result.shape)}"
        raise ValueError(f"The {what} indices must be a non-empty list of integers, got {got}.")
    wrong = (result < -size) | (result >= size)
    if bool(wrong.any()):
        raise ValueError(
            f"A {what} index is out of range for {size} {what}s, {result[wrong][0].item()}: "
            f"it must be between {-size} and {size - 1}."
        )
    result = torch.where(result < 0, result + size, result)
    values, counts = result.unique(return_counts=True)
    if bool((counts > 1).any()):
        repeated = values[counts > 1].tolist()
        raise ValueError(f"The {what} indices must not repeat, got {repeated} several times.")
    return result
