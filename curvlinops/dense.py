"""A dense matrix as linear operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlinops import _tensors
from curvlinops._damping import Damping
from curvlinops._formats import Columns
from curvlinops._operator import PyTorchLinearOperator, check_strategy
from curvlinops._rules import batched, combine
from curvlinops._saving import saveable
from curvlinops._scalars import Scalar


@saveable
class TensorLinearOperator(PyTorchLinearOperator):
    """A dense matrix, on flat vectors.

    Args:
        matrix: Tensor ``[rows, columns]``, real or complex.

    Raises:
        ValueError: If the tensor is not a matrix.

    Example:
        >>> import torch
        >>> from curvlinops import TensorLinearOperator
        >>> A = TensorLinearOperator(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> A.inverse() @ (A @ torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """

    _init_args = ("matrix",)

    def __init__(self, matrix: Tensor):
        if not isinstance(matrix, Tensor) or matrix.ndim != 2:
            got = list(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(f"A dense operator needs a tensor with two axes, got {got}.")
        _tensors.check_floating(matrix, "A dense operator")
        super().__init__([(matrix.shape[1],)], [(matrix.shape[0],)])
        self.matrix = matrix

    def _matmat(self, X: Columns) -> Columns:
        return [self.matrix @ X[0]]

    def _adjoint(self) -> TensorLinearOperator:
        return TensorLinearOperator(self.matrix.mH)

    def _conjugate(self) -> TensorLinearOperator:
        return TensorLinearOperator(self.matrix.conj()) if self.matrix.is_complex() else self

    def trace(self) -> Tensor:
        """Return the sum of the diagonal."""
        self._check_square("trace")
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        """Return the diagonal ``[D]``."""
        self._check_square("diagonal")
        return self.matrix.diagonal()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm."""
        return torch.linalg.matrix_norm(self.matrix)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return sign and logarithm of the determinant, by LU."""
        self._check_square("slogdet")
        sign, logabsdet = torch.linalg.slogdet(_tensors.widened(self.matrix))
        real = self.matrix.real.dtype if self.matrix.is_complex() else self.matrix.dtype
        return sign.to(self.matrix.dtype), logabsdet.to(real)

    def inverse(self, damping: Damping = 0.0, **strategy: Any) -> TensorLinearOperator:
        """Return the dense ``(A + damping * I)⁻¹``: by Cholesky if that exists, else by LU.

        Args:
            damping: Multiple of the identity to add, or a function of the operator that returns it.
            **strategy: ``retry_double_precision`` as for Kronecker products; the other keywords
                make no difference here.

        Raises:
            RuntimeError: If the damped matrix is singular.
        """
        check_strategy(strategy)
        self._check_square("inverse")
        retry = strategy.get("retry_double_precision", True)
        name = f"the dense {self.shape[0]} × {self.shape[1]} operator"
        shift = self._resolve_damping(damping)
        inverse = _tensors.inverse(
            self.matrix, shift, name=name, retry_double_precision=retry, definite=False
        )
        return TensorLinearOperator(inverse)

    def eigh(self) -> PyTorchLinearOperator:
        """Return the Hermitian matrix in eigendecomposed form."""
        self._check_square("eigh")
        return combine("eigh", self)

    def power(self, exponent: float) -> PyTorchLinearOperator:
        """Return a power of the Hermitian matrix in eigendecomposed form."""
        self._check_square("power")
        decomposed: Any = self.eigh()
        power = _tensors.real_power(
            decomposed.eigenvalues, exponent, name=repr(self), size=self.shape[0], computed=True
        )
        return decomposed._with(power)

    def pinv(self, rtol: float | None = None) -> TensorLinearOperator:
        """Return the dense Moore-Penrose inverse."""
        return TensorLinearOperator(_tensors.pinv(self.matrix, rtol, name=repr(self)))

    def _with_shift(self, shift: Scalar) -> PyTorchLinearOperator:
        return TensorLinearOperator(_tensors.add_to_diagonal(self.matrix, shift))

    def _entrywise_squares(self) -> TensorLinearOperator:
        return TensorLinearOperator(self.matrix.abs() ** 2)

    def _formula(self) -> str:
        return f"Dense({self.shape[0]}×{self.shape[1]})"


@batched(TensorLinearOperator)
def _multiply_each(operators: list[TensorLinearOperator], X: Columns, adjoint: bool) -> Any:
    """Stack the matrices."""
    matrices = _tensors.stacked([op.matrix for op in operators])  # [g, M, N]
    if matrices is None:
        return NotImplemented
    return [(matrices.mH if adjoint else matrices) @ X[0]]
