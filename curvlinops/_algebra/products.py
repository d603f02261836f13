"""Products of operators, as chains that neighbours are joined in where a rule allows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from itertools import pairwise
from operator import matmul
from typing import Any

import torch
from torch import Tensor

from curvlinops._algebra.identity import IdentityLinearOperator, is_number
from curvlinops._algebra.scaling import ScaledLinearOperator, keeps_dtype, unscale
from curvlinops._algebra.sums import add_shift
from curvlinops._damping import Damping, named_dampings
from curvlinops._formats import Columns, describe
from curvlinops._operator import (
    PyTorchLinearOperator,
    check_replacement,
    check_same,
    check_strategy,
)
from curvlinops._rules import apply_rule, operation, rule
from curvlinops._saving import saveable
from curvlinops._scalars import Scalar, is_real


@saveable
class _ChainPyTorchLinearOperator(PyTorchLinearOperator):
    """The product of operators, ``A₁ A₂ … Aₙ``.

    A chain is a sequence: it can be iterated, indexed, measured with ``len``, and its items can
    be replaced by others of the same shape, dtype and device. Chains inside it are flattened.

    Where the first operator P is a permutation and the last one its inverse, the product
    P B Pᵀ shares the closed forms of B, and gives back products of the same kind.

    Args:
        *operators: The factors, from left to right.

    Raises:
        ValueError: If no factor is given, or if neighbours do not fit.
    """

    def __init__(self, *operators: PyTorchLinearOperator):
        flat: list[PyTorchLinearOperator] = []
        for op in operators:
            flat.extend(op if isinstance(op, _ChainPyTorchLinearOperator) else [op])
        if not flat:
            raise ValueError("A chain needs at least one operator, got none.")
        for left, right in pairwise(flat):
            _check_product(left, right)
        typed = [op for op in flat if op.dtype is not None]
        for op in typed[1:]:  # also across operators that have no dtype
            check_same("a product", typed[0], op)
        PyTorchLinearOperator.__init__(self, flat[-1].in_shape, flat[0].out_shape)
        self._operators = flat

    def _state(self) -> dict[str, Any]:
        return {"operators": self._operators}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Any:
        return cls(*state["operators"])

    def __len__(self) -> int:
        return len(self._operators)

    def __iter__(self) -> Iterator[PyTorchLinearOperator]:
        return iter(self._operators)

    def __getitem__(self, index: Any) -> Any:
        return self._operators[index]

    def __setitem__(self, index: int, operator: PyTorchLinearOperator) -> None:
        """Replace a factor by another one between the same spaces."""
        check_replacement("a chain", self._operators[index], operator)
        self._operators[index] = operator

    @property
    def _in_names(self) -> list[str] | None:
        return self._operators[-1]._in_names

    @property
    def _out_names(self) -> list[str] | None:
        return self._operators[0]._out_names

    def _matmat(self, X: Columns) -> Columns:
        for op in reversed(self._operators):
            X = op._matmat(X)
        return X

    def _adjoint(self) -> PyTorchLinearOperator:
        return _ChainPyTorchLinearOperator(*(op.adjoint() for op in reversed(self._operators)))

    def _conjugate(self) -> PyTorchLinearOperator:
        if self.dtype is not None and not self.dtype.is_complex:
            return self
        return _ChainPyTorchLinearOperator(*(op._conjugate() for op in self._operators))

    # closed forms
    def _inner(self) -> PyTorchLinearOperator | None:
        """Return B if the chain is P B P⁻¹ with a permutation P, else None."""
        first, *middle, last = self._operators
        if not middle or not first._IS_PERMUTATION:
            return None
        if not isinstance(apply_rule("matmul", last, first), IdentityLinearOperator):
            return None
        return middle[0] if len(middle) == 1 else _ChainPyTorchLinearOperator(*middle)

    def _wrap(self, inner: PyTorchLinearOperator) -> PyTorchLinearOperator:
        """Return P B' P⁻¹ for a new B'."""
        return self._operators[0] @ inner @ self._operators[-1]

    def _need_inner(self, form: str) -> PyTorchLinearOperator:
        inner = self._inner()
        if inner is None:
            raise self._missing(form)
        return inner

    def trace(self) -> Tensor:
        """Return tr(P B P⁻¹) = tr(B)."""
        return self._need_inner("trace").trace()

    def diagonal(self) -> Tensor:
        """Return the diagonal of P B P⁻¹: that of B, permuted."""
        diagonal = self._need_inner("diagonal").diagonal()
        return self._operators[0] @ diagonal

    def frobenius_norm(self) -> Tensor:
        """Return ‖P B P⁻¹‖ = ‖B‖."""
        return self._need_inner("frobenius_norm").frobenius_norm()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return slogdet(P B P⁻¹) = slogdet(B), or that of a product of square operators."""
        inner = self._inner()
        if inner is not None:
            return inner.slogdet()
        self._check_square("slogdet")
        self._check_square_factors("slogdet")
        signs, logs = zip(*(op.slogdet() for op in self._operators), strict=True)
        return torch.stack(signs).prod(), torch.stack(logs).sum()

    def inverse(self, damping: Damping = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        """Return P (B + δI)⁻¹ P⁻¹; without damping also the inverse of square operators."""
        inner, resolved = self._inner(), self._resolve_damping(damping)
        if inner is not None:
            with self._naming_blocks():
                return self._wrap(inner.inverse(resolved, **strategy))
        check_strategy(strategy)
        self._check_square("inverse")
        self._check_square_factors("inverse")
        if not is_number(resolved, 0):
            raise self._missing("inverse")
        return _ChainPyTorchLinearOperator(*(op.inverse() for op in reversed(self._operators)))

    def _resolve_damping(self, damping: Damping) -> Any:
        inner = self._inner()
        if inner is None:
            return super()._resolve_damping(damping)
        names = self._block_names()
        if isinstance(damping, Mapping) and names is not None:
            damping = named_dampings(damping, names, self)
        with self._naming_blocks():
            return inner._resolve_damping(damping)

    def _block_names(self) -> list[list[str]] | None:
        """Return the names of each block's parameters, of Kronecker-factored operators."""
        # their canonical form has a block for each group of parameters
        groups = getattr(self._operators[0], "_groups", None)
        return None if groups is None else [list(group.values()) for group in groups]

    @contextmanager
    def _naming_blocks(self) -> Iterator[None]:
        """Let an error about a block of B name the block's parameters."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            names, index = self._block_names(), getattr(error, "block", None)
            if names is not None and index is not None:
                error.args = (f"The block of {', '.join(map(repr, names[index]))}: {error}",)
            raise

    def eigh(self) -> PyTorchLinearOperator:
        """Return P eigh(B) P⁻¹."""
        inner = self._need_inner("eigh")
        with self._naming_blocks():
            return self._wrap(inner.eigh())

    def power(self, exponent: float) -> PyTorchLinearOperator:
        """Return P Bᵖ P⁻¹."""
        inner = self._need_inner("power")
        with self._naming_blocks():
            return self._wrap(inner.power(exponent))

    def pinv(self, rtol: float | None = None) -> PyTorchLinearOperator:
        """Return ``(P B Q)⁺ = Qᵀ B⁺ Pᵀ`` for permutations P and Q."""
        *outer, B = sorted(self._operators, key=lambda op: not op._IS_PERMUTATION)
        if outer and not outer[-1]._IS_PERMUTATION:
            raise self._missing("pinv")
        return reduce(
            matmul, (op.pinv(rtol) if op is B else op.adjoint() for op in reversed(self._operators))
        )

    def _check_square_factors(self, form: str) -> None:
        """Raise if a factor is rectangular."""
        if any(op.shape[0] != op.shape[1] for op in self._operators):
            raise self._missing(form)

    def _entrywise_squares(self) -> PyTorchLinearOperator:
        """Permutations around one operator permute its entries."""
        if sum(not op._IS_PERMUTATION for op in self._operators) > 1:
            raise self._missing("diagonal")
        return _ChainPyTorchLinearOperator(*(op._entrywise_squares() for op in self._operators))

    def _formula(self) -> str:
        return " @ ".join(op._as_factor() for op in self._operators)


def _check_product(left: PyTorchLinearOperator, right: PyTorchLinearOperator) -> None:
    """Raise if two operators cannot be multiplied."""
    if left.in_shape != right.out_shape:
        raise ValueError(
            f"Shape mismatch in a product: {left!r} takes {describe(left.in_shape)}, but "
            f"{right!r} returns {describe(right.out_shape)}. These must be the same."
        )
    check_same("a product", left, right)


@operation("matmul")
def _multiply(left: PyTorchLinearOperator, right: PyTorchLinearOperator) -> PyTorchLinearOperator:
    """Multiply operators: flatten chains, pull scalars out, and join neighbours by their rules."""
    _check_product(left, right)
    (s, a), (t, b) = unscale(left), unscale(right)
    scalar: Scalar = 1
    if a.dtype == b.dtype or None in (a.dtype, b.dtype):
        scalar, left, right = s * t, a, b
    # else a complex multiple of a real operator stays in one piece next to a complex operator
    identity: PyTorchLinearOperator = left
    stack: list[PyTorchLinearOperator] = []
    for op in [*_factors(left), *_factors(right)]:
        current: PyTorchLinearOperator | None = op
        if isinstance(op, ScaledLinearOperator) and keeps_dtype(op):
            scalar, current = scalar * op.scalar, op.operator
        while current is not None:
            if isinstance(current, IdentityLinearOperator):
                identity, current = current, None
                break
            folded = apply_rule("matmul", stack[-1], current) if stack else None
            if folded is None:
                break
            stack.pop()
            factor, current = unscale(folded)
            scalar = scalar * factor
        if current is not None:
            stack.append(current)
    if not stack:
        return scalar * identity
    return scalar * (stack[0] if len(stack) == 1 else _ChainPyTorchLinearOperator(*stack))


def _factors(operator: PyTorchLinearOperator) -> list[PyTorchLinearOperator]:
    return list(operator) if isinstance(operator, _ChainPyTorchLinearOperator) else [operator]


@rule("scale", _ChainPyTorchLinearOperator, object)
def _scale_chain(operator: _ChainPyTorchLinearOperator, scalar: Scalar) -> PyTorchLinearOperator:
    """``s(P B P⁻¹) = P (sB) P⁻¹`` where s leaves the dtype as it is."""
    inner = operator._inner()
    complex_multiple = not is_real(scalar) and not (
        inner and inner.dtype and inner.dtype.is_complex
    )
    if inner is None or complex_multiple:
        return NotImplemented
    return _ChainPyTorchLinearOperator(operator[0], scalar * inner, operator[-1])


@rule("shift", _ChainPyTorchLinearOperator, object)
def _shift_chain(operator: _ChainPyTorchLinearOperator, shift: Scalar) -> PyTorchLinearOperator:
    """``P B P⁻¹ + δI = P (B + δI) P⁻¹``."""
    inner = operator._inner()
    if inner is None:
        return NotImplemented
    return _ChainPyTorchLinearOperator(operator[0], add_shift(inner, shift), operator[-1])


@rule("add", _ChainPyTorchLinearOperator, _ChainPyTorchLinearOperator)
def _add_chains(
    left: _ChainPyTorchLinearOperator, right: _ChainPyTorchLinearOperator
) -> PyTorchLinearOperator:
    """``P A P⁻¹ + P B P⁻¹ = P (A + B) P⁻¹``."""
    a, b = left._inner(), right._inner()
    same = a is not None and isinstance(
        apply_rule("matmul", right[-1], left[0]), IdentityLinearOperator
    )
    if a is None or b is None or not same:
        return NotImplemented
    return _ChainPyTorchLinearOperator(left[0], a + b, left[-1])
