"""Diagonal operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvlinops import _tensors
from curvlinops._damping import Damping
from curvlinops._formats import Columns
from curvlinops._operator import PyTorchLinearOperator, check_strategy
from curvlinops._rules import batched, rule
from curvlinops._saving import saveable
from curvlinops._scalars import Scalar


@saveable
class DiagonalLinearOperator(PyTorchLinearOperator):
    """A diagonal matrix on a space of tensors.

    Sums, products, quotients, scalings, shifts and inverses of diagonal operators are diagonal.

    Args:
        diagonal: A list of tensors, the diagonal in the shape of the space (or one tensor).
        names: The names of the tensors of the space, for vectors that are dicts. Sums, products and
            so on keep them.

    Raises:
        ValueError: If the list is empty, its tensors differ in dtype or device, or names are not as
            many different strings as there are tensors.

    Example:
        >>> import torch
        >>> from curvlinops import DiagonalLinearOperator
        >>> D = DiagonalLinearOperator([torch.tensor([1.0, 2.0]), torch.tensor([[4.0]])])
        >>> (D @ D.inverse(damping=1.0)).diagonal()
        tensor([0.5000, 0.6667, 0.8000])
    """

    def __init__(self, diagonal: Sequence[Tensor] | Tensor, names: Sequence[str] | None = None):
        entries = [diagonal] if isinstance(diagonal, Tensor) else list(diagonal)
        for entry in entries:
            _tensors.check_floating(entry, "A diagonal operator")
        super().__init__([d.shape for d in entries], [d.shape for d in entries])
        if len({(d.dtype, d.device) for d in entries}) > 1:
            got = ", ".join(f"{d.dtype} on {d.device}" for d in entries)
            raise ValueError(
                f"The tensors of a diagonal operator must share dtype and device, got {got}."
            )
        self._entries = entries
        self._names = None if names is None else _checked(names, len(entries))
        self.SELF_ADJOINT = not entries[0].is_complex()

    def _state(self) -> dict[str, Any]:
        return {"diagonal": self._entries, "names": self._names}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Any:
        operator = cls.__new__(cls)  # a subclass may compute its entries in the constructor
        names = state.get("names")  # files of earlier versions have none
        DiagonalLinearOperator.__init__(operator, state["diagonal"], names)
        return operator

    @property
    def _in_names(self) -> list[str] | None:
        return self._names

    @property
    def _out_names(self) -> list[str] | None:
        return self._names

    def tensors(self) -> list[Tensor]:
        """Return the diagonal as tensors in the shape of the space."""
        return list(self._entries)

    def _matmat(self, X: Columns) -> Columns:
        return [d.unsqueeze(-1) * x for d, x in zip(self._entries, X, strict=True)]

    def _adjoint(self) -> DiagonalLinearOperator:
        return self._conjugate()

    def _conjugate(self) -> DiagonalLinearOperator:
        if self.SELF_ADJOINT:
            return self
        return DiagonalLinearOperator([d.conj() for d in self._entries], self._names)

    def trace(self) -> Tensor:
        """Return the sum of the entries."""
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        """Return the diagonal ``[D]``."""
        return torch.cat([d.flatten() for d in self._entries])

    def frobenius_norm(self) -> Tensor:
        """Return the norm of the diagonal."""
        return torch.linalg.vector_norm(self.diagonal())

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return sign and logarithm of the product of the entries."""
        diagonal = self.diagonal()
        return diagonal.sgn().prod(), diagonal.abs().log().sum()

    def inverse(self, damping: Damping = 0.0, **strategy: Any) -> DiagonalLinearOperator:
        """Return ``(D + damping * I)⁻¹``.

        Raises:
            RuntimeError: If an entry plus damping is zero.
        """
        check_strategy(strategy)
        shift = self._resolve_damping(damping)
        shifted = [d + shift for d in self._entries]
        if any(bool((d == 0).any()) for d in shifted):
            raise RuntimeError(
                f"Cannot invert {self!r}: with damping {shift} it has zeros on its diagonal. "
                "Increase the damping."
            )
        return DiagonalLinearOperator([1 / d for d in shifted], self._names)

    def eigh(self) -> PyTorchLinearOperator:
        """Return itself: its eigenvectors are the coordinate axes."""
        if any(d.is_complex() and not _tensors.is_real(d) for d in self._entries):
            raise _tensors.NotHermitianError(
                f"{self!r} is complex and not Hermitian: its entries must have no imaginary part."
            )
        return self

    def power(self, exponent: float) -> DiagonalLinearOperator:
        """Return the entry-wise power."""
        power = [_tensors.real_power(d, exponent, name=repr(self)) for d in self._entries]
        return DiagonalLinearOperator(power, self._names)

    def pinv(self, rtol: float | None = None) -> DiagonalLinearOperator:
        """Return the diagonal operator of the reciprocals, 0 for entries that count as zero."""
        cutoff = _tensors.relative_cutoff(rtol, 1, self._entries[0].dtype)
        largest = torch.linalg.vector_norm(self.diagonal(), ord=torch.inf) if self.shape[0] else 0.0
        inverse = [_tensors.reciprocals(d, cutoff * largest) for d in self._entries]
        return DiagonalLinearOperator(inverse, self._names)

    def _check_real_spectrum(self) -> None:
        self.eigh()

    def _entrywise_squares(self) -> DiagonalLinearOperator:
        return DiagonalLinearOperator([d.abs() ** 2 for d in self._entries], self._names)

    def __truediv__(self, value: Any) -> Any:
        """Divide by a scalar, or entry-wise by another diagonal operator."""
        if isinstance(value, DiagonalLinearOperator):
            return self @ value.inverse()
        return super().__truediv__(value)

    def _formula(self) -> str:
        return f"Diag({self.shape[0]})"


def _checked(names: Sequence[str], number: int) -> list[str]:
    """Return names as a list of strings; raise if they do not fit this number of tensors."""
    given = [names] if isinstance(names, str) else list(names)
    strings = all(isinstance(name, str) for name in given)
    if not strings or len(given) != number or len(set(given)) != number:
        raise ValueError(f"names must be {number} different strings, got {given}.")
    return [str(name) for name in given]


def _pairwise(function: Any, a: DiagonalLinearOperator, b: DiagonalLinearOperator) -> Any:
    """Combine two diagonals tensor by tensor."""
    pairs = zip(a.tensors(), b.tensors(), strict=True)
    names = b._in_names if a._in_names is None else a._in_names
    return DiagonalLinearOperator([function(x, y) for x, y in pairs], names)


@rule("add", DiagonalLinearOperator, DiagonalLinearOperator)
def _add(a: DiagonalLinearOperator, b: DiagonalLinearOperator) -> DiagonalLinearOperator:
    """The sum of diagonal operators is the diagonal operator of the sums."""
    return _pairwise(torch.add, a, b)


@rule("matmul", DiagonalLinearOperator, DiagonalLinearOperator)
def _multiply(a: DiagonalLinearOperator, b: DiagonalLinearOperator) -> DiagonalLinearOperator:
    """The product of diagonal operators is the diagonal operator of the products."""
    return _pairwise(torch.mul, a, b)


@rule("scale", DiagonalLinearOperator, object)
def _scale(a: DiagonalLinearOperator, scalar: Scalar) -> DiagonalLinearOperator:
    """A multiple of a diagonal operator is diagonal."""
    return DiagonalLinearOperator([scalar * d for d in a.tensors()], a._in_names)


@rule("shift", DiagonalLinearOperator, object)
def _shift(a: DiagonalLinearOperator, shift: Scalar) -> DiagonalLinearOperator:
    """Adding a multiple of the identity shifts the diagonal."""
    return DiagonalLinearOperator([d + shift for d in a.tensors()], a._in_names)


@batched(DiagonalLinearOperator)
def _multiply_each(operators: list[DiagonalLinearOperator], X: Columns, adjoint: bool) -> Columns:
    """Stack the diagonals."""
    stacks = [torch.stack(d) for d in zip(*(op.tensors() for op in operators), strict=True)]
    return [(d.conj() if adjoint else d).unsqueeze(-1) * x for d, x in zip(stacks, X, strict=True)]
