"""Operators in eigendecomposed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlinops import _tensors
from curvlinops._damping import Damping
from curvlinops._formats import Columns, concatenate, split_flat
from curvlinops._operator import PyTorchLinearOperator, check_strategy, matmat_each
from curvlinops._rules import batched, operation, rule
from curvlinops._saving import saveable
from curvlinops._scalars import Scalar, is_real
from curvlinops.dense import TensorLinearOperator


@saveable
class EighDecomposedLinearOperator(PyTorchLinearOperator):
    """An operator in eigendecomposed form, ``Q diag(λ) Qᴴ`` with a unitary Q.

    Args:
        eigenvalues: Tensor λ ``[D]``, in any order.
        eigenvectors: The eigenvectors as columns: a tensor ``[D, D]``, or a square operator, for
            instance a Kronecker product. It is trusted to be unitary.

    Raises:
        ValueError: If the shapes, dtypes or devices do not fit.

    Example:
        >>> import torch
        >>> from curvlinops import EighDecomposedLinearOperator
        >>> A = EighDecomposedLinearOperator(*torch.linalg.eigh(torch.eye(2) + torch.ones(2, 2)))
        >>> print(A.power(0.5).trace().round(decimals=3))
        tensor(2.7320)
    """

    def __init__(self, eigenvalues: Tensor, eigenvectors: Tensor | PyTorchLinearOperator):
        if isinstance(eigenvectors, Tensor):
            if eigenvectors.ndim != 2:
                raise ValueError(f"Eigenvectors must be 2D, got shape {list(eigenvectors.shape)}.")
            basis: PyTorchLinearOperator = TensorLinearOperator(eigenvectors)
        else:
            basis = eigenvectors
        if basis.shape[0] != basis.shape[1]:
            raise ValueError(f"Eigenvectors must be square, got {list(basis.shape)}.")
        super().__init__(basis.out_shape, basis.out_shape)
        self.eigenvectors = eigenvectors
        self._basis = basis
        self.eigenvalues = eigenvalues

    def _state(self) -> dict[str, Any]:
        return {"eigenvalues": self._eigenvalues, "eigenvectors": self.eigenvectors}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> EighDecomposedLinearOperator:
        return cls(state["eigenvalues"], state["eigenvectors"])

    @property
    def _in_names(self) -> list[str] | None:
        return self._basis._out_names

    @property
    def _out_names(self) -> list[str] | None:
        return self._basis._out_names

    def to(self, *args: Any, **kwargs: Any) -> EighDecomposedLinearOperator:
        """Return the operator with its tensors moved or cast; real eigenvalues stay real."""
        values = self._eigenvalues.to(*args, **kwargs)
        if not self._eigenvalues.is_complex() and values.is_complex():
            values = values.real
        return EighDecomposedLinearOperator(values, self.eigenvectors.to(*args, **kwargs))

    @property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues ``[D]``; can be replaced by others of the same shape."""
        return self._eigenvalues

    @eigenvalues.setter
    def eigenvalues(self, values: Tensor) -> None:
        if values.ndim != 1:
            raise ValueError(f"Eigenvalues must be 1D, got shape {list(values.shape)}.")
        basis = self._basis
        if values.shape[0] != basis.shape[1]:
            raise ValueError(
                f"Incompatible shapes: {values.shape[0]} eigenvalues for eigenvectors of shape "
                f"{list(basis.shape)}. Each eigenvector needs one eigenvalue."
            )
        dtypes = {values.dtype}
        if basis.dtype is not None and basis.dtype.is_complex:
            dtypes = {values.dtype, values.dtype.to_complex()}
        if basis.dtype is not None and basis.dtype not in dtypes:
            raise ValueError(
                f"Dtype mismatch: eigenvalues of {values.dtype}, eigenvectors of {basis.dtype}. "
                "Convert one of them with .to(...)."
            )
        if basis.device is not None and values.device != basis.device:
            raise ValueError(
                f"Device mismatch: eigenvalues on {values.device}, eigenvectors on {basis.device}. "
                "Convert one of them with .to(...)."
            )
        self._eigenvalues = values
        self.SELF_ADJOINT = not values.is_complex()

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the eigenvectors."""
        return self._basis.dtype or self._eigenvalues.dtype

    def _matmat(self, X: Columns) -> Columns:
        coordinates = concatenate(self._basis._adjoint_matmat(X))  # [D, K]
        scaled = self._eigenvalues.unsqueeze(-1) * coordinates
        return self._basis._matmat(split_flat(scaled, self._basis.in_shape))

    def _adjoint(self) -> EighDecomposedLinearOperator:
        return self._with(self._eigenvalues.conj())

    def _conjugate(self) -> EighDecomposedLinearOperator:
        if self.dtype is not None and not self.dtype.is_complex:
            return self
        conjugate = self._basis._conjugate()
        vectors = conjugate.matrix if isinstance(conjugate, TensorLinearOperator) else conjugate
        return EighDecomposedLinearOperator(self._eigenvalues.conj(), vectors)

    def _with(self, eigenvalues: Tensor) -> EighDecomposedLinearOperator:
        """Return an operator with the same eigenvectors."""
        return EighDecomposedLinearOperator(eigenvalues, self.eigenvectors)

    def _in_own_dtype(self, value: Tensor) -> Tensor:
        return value if self.dtype is None else value.to(self.dtype)

    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues."""
        return self._in_own_dtype(self._eigenvalues.sum())

    def diagonal(self) -> Tensor:
        """Return the diagonal, ``Σ_j |Q_ij|² λ_j``, without forming the matrix."""
        squares = self._basis._entrywise_squares()
        values = self._eigenvalues
        if values.is_complex():
            return torch.complex(squares @ values.real, squares @ values.imag)
        return self._in_own_dtype(squares @ values)

    def frobenius_norm(self) -> Tensor:
        """Return the norm of the eigenvalues."""
        return torch.linalg.vector_norm(self._eigenvalues)

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return sign and logarithm of the product of the eigenvalues."""
        values = self._eigenvalues
        return self._in_own_dtype(values.sgn().prod()), values.abs().log().sum()

    def inverse(self, damping: Damping = 0.0, **strategy: Any) -> EighDecomposedLinearOperator:
        """Return ``Q diag(1 / (λ + damping)) Qᴴ``.

        Raises:
            RuntimeError: If an eigenvalue plus damping is zero.
        """
        check_strategy(strategy)
        shift = self._resolve_damping(damping)
        shifted = self._eigenvalues + shift
        if bool((shifted == 0).any()):
            raise RuntimeError(
                f"Cannot invert {self!r}: with damping {shift} it has eigenvalues 0. "
                "Increase the damping."
            )
        return self._with(1 / shifted)

    def eigh(self) -> EighDecomposedLinearOperator:
        """Return itself."""
        return self

    def power(self, exponent: float) -> EighDecomposedLinearOperator:
        """Return ``Q diag(λᵖ) Qᴴ``."""
        size = _largest_matrix(self.eigenvectors)
        power = _tensors.real_power(self._eigenvalues, exponent, name=repr(self), size=size)
        return self._with(power)

    def pinv(self, rtol: float | None = None) -> EighDecomposedLinearOperator:
        """Return ``Q diag(λ⁺) Qᴴ``: reciprocal eigenvalues, 0 for those that count as zero."""
        values = self._eigenvalues
        cutoff = _tensors.relative_cutoff(rtol, _largest_matrix(self.eigenvectors), values.dtype)
        largest = values.abs().max() if values.numel() else 0.0
        return self._with(_tensors.reciprocals(values, cutoff * largest))

    def _check_real_spectrum(self) -> None:
        if self._eigenvalues.is_complex() and not _tensors.is_real(self._eigenvalues):
            raise _tensors.NotHermitianError(
                f"{self!r} has complex eigenvalues, but must be Hermitian."
            )

    def _formula(self) -> str:
        return f"Eigh({self._basis._formula()})"


def _largest_matrix(item: Any) -> int:
    """Return the number of rows of the largest matrix in an operator, 1 if there is none."""
    if isinstance(item, Tensor):
        return item.shape[0] if item.ndim == 2 else 1
    if isinstance(item, PyTorchLinearOperator):
        item = item._state()
    if isinstance(item, dict):
        item = list(item.values())
    return max(map(_largest_matrix, item), default=1) if type(item) in (list, tuple) else 1


@rule("scale", EighDecomposedLinearOperator, object)
def _scale(a: EighDecomposedLinearOperator, scalar: Scalar) -> PyTorchLinearOperator:
    """A multiple has the same eigenvectors and multiplied eigenvalues."""
    if not is_real(scalar) and not (a.dtype is not None and a.dtype.is_complex):
        return NotImplemented
    return a._with(scalar * a.eigenvalues)


@rule("shift", EighDecomposedLinearOperator, object)
def _shift(a: EighDecomposedLinearOperator, shift: Scalar) -> PyTorchLinearOperator:
    """Adding a multiple of the identity shifts the eigenvalues."""
    return a._with(a.eigenvalues + shift)


@operation("eigh")
def _decompose(operator: TensorLinearOperator, _: None = None) -> EighDecomposedLinearOperator:
    """Return a dense Hermitian operator in eigendecomposed form."""
    return EighDecomposedLinearOperator(*_tensors.eigh(operator.matrix, name=repr(operator)))


@batched(EighDecomposedLinearOperator)
def _multiply_each(operators: list[EighDecomposedLinearOperator], X: Columns, adjoint: bool) -> Any:
    """Stack the eigenvalues, and multiply the eigenvectors at once where they can."""
    bases = [op._basis for op in operators]
    if any(basis.in_shape != bases[0].in_shape for basis in bases):
        return NotImplemented
    values = torch.stack([op.eigenvalues for op in operators]).unsqueeze(-1)  # [g, D, 1]
    coordinates = concatenate(matmat_each(bases, X, adjoint=True), batch_dims=1)  # [g, D, K]
    scaled = (values.conj() if adjoint else values) * coordinates
    return matmat_each(bases, split_flat(scaled, bases[0].in_shape))
