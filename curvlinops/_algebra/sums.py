"""Sums of operators, and shifts by a multiple of the identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlinops._algebra.identity import IdentityLinearOperator
from curvlinops._algebra.scaling import ScaledLinearOperator, keeps_dtype, unscale
from curvlinops._algebra.wrappers import ScalarWrapper, number_text, same_number
from curvlinops._damping import Damping
from curvlinops._formats import Columns, describe
from curvlinops._operator import (
    PyTorchLinearOperator,
    check_same,
    check_strategy,
    matmat_each,
)
from curvlinops._rules import apply_rule, batched, operation, rule
from curvlinops._saving import saveable
from curvlinops._scalars import Scalar, conj, magnitude
from curvlinops._tensors import NotHermitianError


@saveable
class SumLinearOperator(PyTorchLinearOperator):
    """The sum of operators on the same spaces.

    Args:
        operators: The terms; at least one.
    """

    _IS_SUM = True

    _init_args = ("operators",)

    def __init__(self, operators: list[PyTorchLinearOperator]):
        if not operators:
            raise ValueError("A sum needs at least one operator, got none.")
        super().__init__(operators[0].in_shape, operators[0].out_shape)
        self.operators = list(operators)
        for other in operators[1:]:
            _check_sum(operators[0], other)

    @property
    def SELF_ADJOINT(self) -> bool:  # type: ignore[override]  # items may be replaced
        """Whether the operator is its own adjoint."""
        return all(op.SELF_ADJOINT for op in self.operators)

    @property
    def _in_names(self) -> list[str] | None:
        return next((op._in_names for op in self.operators if op._in_names is not None), None)

    @property
    def _out_names(self) -> list[str] | None:
        return next((op._out_names for op in self.operators if op._out_names is not None), None)

    def _matmat(self, X: Columns) -> Columns:
        result = self.operators[0]._matmat(X)
        for op in self.operators[1:]:
            result = [a + b for a, b in zip(result, op._matmat(X), strict=True)]
        return result

    def _adjoint(self) -> PyTorchLinearOperator:
        return SumLinearOperator([op.adjoint() for op in self.operators])

    def _conjugate(self) -> PyTorchLinearOperator:
        return SumLinearOperator([op._conjugate() for op in self.operators])

    def trace(self) -> Tensor:
        """Return the sum of the traces."""
        self._check_square("trace")
        return torch.stack([op.trace() for op in self.operators]).sum()

    def diagonal(self) -> Tensor:
        """Return the sum of the diagonals."""
        self._check_square("diagonal")
        return torch.stack([op.diagonal() for op in self.operators]).sum(0)

    def _formula(self) -> str:
        return " + ".join(op._formula() for op in self.operators)


def _check_sum(left: PyTorchLinearOperator, right: PyTorchLinearOperator) -> None:
    """Raise if two operators cannot be added."""
    for space in ("in_shape", "out_shape"):
        a, b = getattr(left, space), getattr(right, space)
        if a != b:
            raise ValueError(
                f"Shape mismatch in a sum: {left!r} has {space} {describe(a)}, "
                f"{right!r} has {describe(b)}. All terms must have the same {space}."
            )
    check_same("a sum", left, right)


@saveable
class ShiftedLinearOperator(ScalarWrapper):
    """An operator plus a multiple of the identity, ``A + δ I``.

    Determinant, inverse and powers go through the eigendecomposition of A, when asked for.

    Args:
        operator: The operator A, from a space to itself.
        shift: The number or 0-d tensor δ.
    """

    _IS_SUM = True

    _SCALAR = "shift"
    shift: Scalar

    def _matmat(self, X: Columns) -> Columns:
        result = self.operator._matmat(X)
        return [y + self.shift * x for y, x in zip(result, X, strict=True)]

    def _adjoint(self) -> PyTorchLinearOperator:
        return ShiftedLinearOperator(self.operator.adjoint(), conj(self.shift))

    def _conjugate(self) -> PyTorchLinearOperator:
        return ShiftedLinearOperator(self.operator._conjugate(), conj(self.shift))

    def trace(self) -> Tensor:
        """Return ``tr(A) + δ D``."""
        return self.operator.trace() + self.shift * self.shape[0]

    def diagonal(self) -> Tensor:
        """Return ``diag(A) + δ``."""
        return self.operator.diagonal() + self.shift

    def frobenius_norm(self) -> Tensor:
        """Return the square root of ``‖A‖² + 2 Re(δ̄ tr A) + |δ|² D``."""
        cross = conj(self.shift) * self.operator.trace()
        cross = cross.real if cross.is_complex() else cross
        dim = self.shape[0]
        square = self.operator.frobenius_norm() ** 2 + 2 * cross + magnitude(self.shift) ** 2 * dim
        return square.clamp(min=0).sqrt()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return sign and logarithm of the determinant, from eigenvalues."""
        return self._decomposed("slogdet").slogdet()

    def inverse(self, damping: Damping = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        """Return ``(A + (δ + damping) I)⁻¹``, from eigenvalues."""
        check_strategy(strategy)
        damping = self._resolve_damping(damping)
        return self._decomposed("inverse").inverse(damping)

    def _around(self, block: PyTorchLinearOperator) -> PyTorchLinearOperator:
        return add_shift(block, self.shift)

    def eigh(self) -> PyTorchLinearOperator:
        """Return the operator in eigendecomposed form."""
        return self._decomposed("eigh").eigh()

    def power(self, exponent: float) -> PyTorchLinearOperator:
        """Return a power, from eigenvalues."""
        return self._decomposed("power").power(exponent)

    def pinv(self, rtol: float | None = None) -> PyTorchLinearOperator:
        """Return the Moore-Penrose inverse, from eigenvalues."""
        return self._decomposed("pinv").pinv(rtol)

    def _decomposed(self, form: str) -> PyTorchLinearOperator:
        """Return the operator in a form that has every closed form."""
        try:
            decomposed = self.operator._with_shift(self.shift)
        except (NotImplementedError, NotHermitianError) as error:
            raise self._missing(form) from error
        if isinstance(decomposed, ShiftedLinearOperator):
            raise self._missing(form)
        return decomposed

    def _formula(self) -> str:
        return f"{self.operator._formula()} + {number_text(self.shift)} * I"


@batched(SumLinearOperator)
def _multiply_sums(operators: list[SumLinearOperator], X: Columns, adjoint: bool) -> Any:
    """Multiply the first terms at once, the second terms at once, and so on."""
    if len({len(op.operators) for op in operators}) > 1:
        return NotImplemented
    terms = zip(*(op.operators for op in operators), strict=True)
    return [sum(ys) for ys in zip(*(matmat_each(t, X, adjoint) for t in terms), strict=True)]


@batched(ShiftedLinearOperator)
def _multiply_shifted(operators: list[ShiftedLinearOperator], X: Columns, adjoint: bool) -> Any:
    """Multiply the operators at once, if the shifts are the same."""
    shift = operators[0].shift
    if not all(same_number(op.shift, shift) for op in operators):
        return NotImplemented
    Y = matmat_each([op.operator for op in operators], X, adjoint)
    return [y + (conj(shift) if adjoint else shift) * x for y, x in zip(Y, X, strict=True)]


def _as_shift(operator: PyTorchLinearOperator) -> Scalar | None:
    """Return δ if the operator is δ I, else None."""
    scalar, rest = unscale(operator)
    return scalar if isinstance(rest, IdentityLinearOperator) else None


def add_shift(operator: PyTorchLinearOperator, shift: Scalar) -> PyTorchLinearOperator:
    """Return ``A + δ I`` by the rule for A's type."""
    result = apply_rule("shift", operator, shift)
    return ShiftedLinearOperator(operator, shift) if result is None else result


@rule("shift", ShiftedLinearOperator, object)
def _shift_shifted(operator: ShiftedLinearOperator, shift: Scalar) -> PyTorchLinearOperator:
    """``(A + δI) + εI = A + (δ + ε)I``."""
    return add_shift(operator.operator, operator.shift + shift)


@rule("shift", ScaledLinearOperator, object)
def _shift_scaled(operator: ScaledLinearOperator, shift: Scalar) -> PyTorchLinearOperator:
    """``sI + δI = (s + δ)I``, and ``sA + δI = s(A + δ/s I)`` for a number s ≠ 0."""
    if isinstance(operator.operator, IdentityLinearOperator):
        return (operator.scalar + shift) * operator.operator
    if isinstance(operator.scalar, Tensor) or operator.scalar == 0 or not keeps_dtype(operator):
        return NotImplemented
    return operator.scalar * add_shift(operator.operator, shift / operator.scalar)


@rule("shift", IdentityLinearOperator, object)
def _shift_identity(operator: IdentityLinearOperator, shift: Scalar) -> PyTorchLinearOperator:
    """``I + δI = (1 + δ)I``."""
    return (1 + shift) * operator


@operation("add")
def _add(left: PyTorchLinearOperator, right: PyTorchLinearOperator) -> PyTorchLinearOperator:
    """Add operators term by term; shifts are collected outside."""
    _check_sum(left, right)
    shift = _as_shift(right)
    if shift is not None:
        return add_shift(left, shift)
    shift = _as_shift(left)
    if shift is not None:
        return add_shift(right, shift)
    if isinstance(left, ShiftedLinearOperator):
        return add_shift(left.operator + right, left.shift)
    if isinstance(right, ShiftedLinearOperator):
        return add_shift(left + right.operator, right.shift)
    terms = list(left.operators) if isinstance(left, SumLinearOperator) else [left]
    for new in right.operators if isinstance(right, SumLinearOperator) else [right]:
        for index, term in enumerate(terms):
            folded = _add_pair(term, new)
            if folded is not None:
                terms[index] = folded
                break
        else:
            terms.append(new)
    return terms[0] if len(terms) == 1 else SumLinearOperator(terms)


def _add_pair(left: PyTorchLinearOperator, right: PyTorchLinearOperator) -> Any | None:
    """Return the sum of two terms as one operator, or None if no rule joins them."""
    folded = apply_rule("add", left, right)
    return apply_rule("add", right, left) if folded is None else folded
