"""Lazy algebra: adjoint, conjugate, scalar multiple, sum, shift by a multiple of I, product.

Scalars and shifts are pulled outwards, so that what is left meets the rules that types register
about each other: ``(s A) (t B) = st (A B)``, ``(A + δI) + B = (A + B) + δI``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvlinops._formats import Columns, describe
from curvlinops._operator import (
    PyTorchLinearOperator,
    Scalar,
    apply_rule,
    check_replacement,
    check_same,
    check_strategy,
    conj,
    is_real,
    like,
    magnitude,
    operation,
    rule,
)
from curvlinops._saving import saveable
from curvlinops._tensors import NotHermitianError, real_power


# --------------------------------------------------------------------------------------------------
# Identity
# --------------------------------------------------------------------------------------------------
@saveable
class IdentityLinearOperator(PyTorchLinearOperator):
    """The identity on a space of tensors.

    Args:
        shapes: The shapes of the space's tensors.
        device: The operator's device.
        dtype: The operator's dtype. Without device and dtype it multiplies tensors of any.

    Example:
        >>> import torch
        >>> from curvlinops import IdentityLinearOperator
        >>> eye = IdentityLinearOperator([(2,)], torch.device("cpu"), torch.float32)
        >>> (3 * eye) @ torch.ones(2)
        tensor([3., 3.])
    """

    SELF_ADJOINT = True
    _IS_PERMUTATION = True

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(shapes, shapes)
        self._like = like(device, dtype)
        self._names: list[str] | None = None

    def _state(self) -> dict[str, Any]:
        return {"shapes": self.in_shape, "like": self._like, "names": self._names}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> IdentityLinearOperator:
        identity = cls(state["shapes"])
        identity._like, identity._names = state["like"], state["names"]
        return identity

    @property
    def _in_names(self) -> list[str] | None:
        return self._names

    @property
    def _out_names(self) -> list[str] | None:
        return self._names

    def _matmat(self, X: Columns) -> Columns:
        return list(X)

    def _conjugate(self) -> IdentityLinearOperator:
        return self

    def _ones(self) -> Tensor:
        return torch.ones(self.shape[0], device=self.device, dtype=self.dtype)

    def trace(self) -> Tensor:
        """Return the dimension of the space."""
        return self._ones().sum()

    def diagonal(self) -> Tensor:
        """Return a vector of ones."""
        return self._ones()

    def frobenius_norm(self) -> Tensor:
        """Return the square root of the dimension."""
        return torch.linalg.vector_norm(self._ones())

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return sign 1 and log-determinant 0."""
        ones = self._ones()
        return ones.prod(), ones.abs().log().sum()

    def inverse(self, damping: Scalar = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        """Return ``(1 + damping)⁻¹ I``."""
        check_strategy(strategy)
        return self if _is_number(damping, 0) else self / _nonzero(1 + damping, self, damping)

    def eigh(self) -> PyTorchLinearOperator:
        """Return itself: the identity is diagonal in every basis."""
        return self

    def power(self, exponent: float) -> PyTorchLinearOperator:
        """Return itself."""
        return self

    def _entrywise_squares(self) -> PyTorchLinearOperator:
        return self if self.dtype is None else self.to(self.dtype.to_real())

    def _formula(self) -> str:
        return "I"


def _is_number(value: Scalar, number: int) -> bool:
    """Return whether a scalar is this real number (a tensor is not read, it may be on a GPU)."""
    return not isinstance(value, (Tensor, complex)) and value == number


def _nonzero(value: Scalar, operator: PyTorchLinearOperator, damping: Scalar) -> Scalar:
    """Return a scalar to divide by; raise if it is zero."""
    if value == 0:
        raise RuntimeError(f"{operator!r} with damping {damping} is zero and has no inverse.")
    return value


@operation("identity")
def identity_like(operator: PyTorchLinearOperator, _: None = None) -> IdentityLinearOperator:
    """Return the identity on an operator's input space."""
    identity = IdentityLinearOperator(operator.in_shape, operator.device, operator.dtype)
    identity._names = operator._in_names
    return identity


# --------------------------------------------------------------------------------------------------
# Adjoint and conjugate
# --------------------------------------------------------------------------------------------------
class _Wrapper(PyTorchLinearOperator):
    """An operator around another one between the same spaces."""

    operator: PyTorchLinearOperator

    @property
    def _in_names(self) -> list[str] | None:
        return self.operator._in_names

    @property
    def _out_names(self) -> list[str] | None:
        return self.operator._out_names


class _ScalarWrapper(_Wrapper):
    """An operator together with a scalar, which takes part in neither device nor dtype."""

    _SCALAR: ClassVar[str]

    def __init__(self, operator: PyTorchLinearOperator, scalar: Scalar):
        super().__init__(operator.in_shape, operator.out_shape)
        self.operator = operator
        setattr(self, self._SCALAR, scalar)
        self.SELF_ADJOINT = operator.SELF_ADJOINT and is_real(scalar)

    def _state(self) -> dict[str, Any]:
        scalar = getattr(self, self._SCALAR)
        # the safe loader refuses Python's complex numbers
        state = [scalar.real, scalar.imag] if isinstance(scalar, complex) else scalar
        return {"operator": self.operator, self._SCALAR: state}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Any:
        scalar = state[cls._SCALAR]
        return cls(state["operator"], complex(*scalar) if isinstance(scalar, list) else scalar)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return the operator with its tensors moved or cast; arguments as ``Tensor.to``."""
        operator, scalar = self.operator.to(*args, **kwargs), getattr(self, self._SCALAR)
        return type(self)(operator, _scalar_for(operator, scalar, operator.device))

    @property
    def device(self) -> torch.device | None:
        return self.operator.device

    @property
    def dtype(self) -> torch.dtype | None:
        own = self.operator.dtype
        return own if own is None or is_real(getattr(self, self._SCALAR)) else own.to_complex()


def _scalar_for(
    operator: PyTorchLinearOperator, scalar: Scalar, device: torch.device | None = None
) -> Scalar:
    """Return a scalar in an operator's precision, lest a 0-d tensor widens 0-d results."""
    if not isinstance(scalar, Tensor) or operator.dtype is None:
        return scalar
    dtype = operator.dtype if is_real(scalar) else operator.dtype.to_complex()
    return scalar.to(device=device, dtype=dtype)


def _number_text(value: Scalar) -> str:
    """Return a scalar as text; one without data, as for map_location="meta", as a letter."""
    if isinstance(value, Tensor):
        return "s" if value.is_meta else f"{value.item():.4g}"
    return f"{value:.4g}"


@saveable
class _AdjointLinearOperator(PyTorchLinearOperator):
    """The adjoint of an operator that has no adjoint in closed form."""

    _init_args = ("operator",)

    def __init__(self, operator: PyTorchLinearOperator):
        super().__init__(operator.out_shape, operator.in_shape)
        self.operator = operator

    @property
    def _in_names(self) -> list[str] | None:
        return self.operator._out_names

    @property
    def _out_names(self) -> list[str] | None:
        return self.operator._in_names

    def _matmat(self, X: Columns) -> Columns:
        return self.operator._adjoint_matmat(X)

    def _adjoint_matmat(self, X: Columns) -> Columns:
        return self.operator._matmat(X)

    def _adjoint(self) -> PyTorchLinearOperator:
        return self.operator

    def trace(self) -> Tensor:
        return self.operator.trace().conj()

    def diagonal(self) -> Tensor:
        return self.operator.diagonal().conj()

    def frobenius_norm(self) -> Tensor:
        return self.operator.frobenius_norm()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        sign, logabsdet = self.operator.slogdet()
        return sign.conj(), logabsdet

    def inverse(self, damping: Scalar = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        return self.operator.inverse(conj(damping), **strategy).adjoint()

    def _formula(self) -> str:
        return f"{self.operator._formula()}.H"


@saveable
class _ConjugateLinearOperator(_Wrapper):
    """The entry-wise complex conjugate of an operator."""

    _init_args = ("operator",)

    def __init__(self, operator: PyTorchLinearOperator):
        super().__init__(operator.in_shape, operator.out_shape)
        self.operator = operator

    def _matmat(self, X: Columns) -> Columns:
        return [y.conj() for y in self.operator._matmat([x.conj() for x in X])]

    def _adjoint_matmat(self, X: Columns) -> Columns:
        return [y.conj() for y in self.operator._adjoint_matmat([x.conj() for x in X])]

    def _conjugate(self) -> PyTorchLinearOperator:
        return self.operator

    def trace(self) -> Tensor:
        return self.operator.trace().conj()

    def diagonal(self) -> Tensor:
        return self.operator.diagonal().conj()

    def frobenius_norm(self) -> Tensor:
        return self.operator.frobenius_norm()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        sign, logabsdet = self.operator.slogdet()
        return sign.conj(), logabsdet

    def inverse(self, damping: Scalar = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        return self.operator.inverse(conj(damping), **strategy)._conjugate()

    def _formula(self) -> str:
        return f"conj({self.operator._formula()})"


@operation("adjoint")
def _lazy_adjoint(operator: PyTorchLinearOperator, _: None) -> PyTorchLinearOperator:
    return _AdjointLinearOperator(operator)


@operation("conjugate")
def _lazy_conjugate(operator: PyTorchLinearOperator, _: None) -> PyTorchLinearOperator:
    return _ConjugateLinearOperator(operator)


# --------------------------------------------------------------------------------------------------
# Scalar multiple
# --------------------------------------------------------------------------------------------------
@saveable
class ScaledLinearOperator(_ScalarWrapper):
    """A scalar times an operator, ``s A``.

    Args:
        operator: The operator A.
        scalar: A number or 0-d tensor; a complex one makes the operator complex.
    """

    _SCALAR = "scalar"
    scalar: Scalar

    def _matmat(self, X: Columns) -> Columns:
        own = self.operator.dtype
        if own is None or own.is_complex or not X[0].is_complex():
            return [self.scalar * y for y in self.operator._matmat(X)]
        dtype = X[0].dtype.to_real()  # that of complex numbers has at least float32's precision
        real = self.operator._matmat([x.real.to(own) for x in X])
        imag = self.operator._matmat([x.imag.to(own) for x in X])
        pairs = zip(real, imag, strict=True)
        return [self.scalar * torch.complex(a.to(dtype), b.to(dtype)) for a, b in pairs]

    def _adjoint(self) -> PyTorchLinearOperator:
        return conj(self.scalar) * self.operator.adjoint()

    def _conjugate(self) -> PyTorchLinearOperator:
        return conj(self.scalar) * self.operator._conjugate()

    def trace(self) -> Tensor:
        """Return ``s tr(A)``."""
        return self.scalar * self.operator.trace()

    def diagonal(self) -> Tensor:
        """Return ``s diag(A)``."""
        return self.scalar * self.operator.diagonal()

    def frobenius_norm(self) -> Tensor:
        """Return ``|s| ‖A‖``."""
        return magnitude(self.scalar) * self.operator.frobenius_norm()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return the sign and logarithm of ``s^D det(A)``."""
        sign, logabsdet = self.operator.slogdet()
        dtype = sign.dtype if is_real(self.scalar) else sign.dtype.to_complex()
        scalar = torch.as_tensor(self.scalar, device=sign.device, dtype=dtype)
        dim = self.shape[0]
        return sign * scalar.sgn() ** dim, logabsdet + dim * scalar.abs().log()

    def inverse(self, damping: Scalar = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        """Return ``(s A + δ I)⁻¹ = s⁻¹ (A + δ/s I)⁻¹``."""
        check_strategy(strategy)
        if self.scalar == 0:
            return identity_like(self) / _nonzero(damping, self, damping)
        return self.operator.inverse(damping / self.scalar, **strategy) / self.scalar

    def eigh(self) -> PyTorchLinearOperator:
        """Return the operator in eigendecomposed form."""
        if not _keeps_dtype(self):  # real eigenvectors with complex eigenvalues
            raise self._missing("eigh")
        return self.scalar * self.operator.eigh()

    def power(self, exponent: float) -> PyTorchLinearOperator:
        """Return ``s^p A^p`` for s > 0, else from the eigenvalues."""
        if isinstance(self.operator, IdentityLinearOperator):
            dtype = self.dtype or (torch.as_tensor(self.scalar) * 1.0).dtype
            scalar = torch.as_tensor(self.scalar, device=self.device, dtype=dtype)
            return real_power(scalar.reshape(1), exponent, name=repr(self))[0] * self.operator
        if is_real(self.scalar) and self.scalar > 0:  # type: ignore[operator]
            return self.scalar**exponent * self.operator.power(exponent)
        decomposed = self.eigh()
        if isinstance(decomposed, ScaledLinearOperator):
            raise self._missing("power")
        return decomposed.power(exponent)

    def _with_shift(self, shift: Scalar) -> PyTorchLinearOperator:
        if self.scalar == 0 or not _keeps_dtype(self):
            return super()._with_shift(shift)
        return self.scalar * self.operator._with_shift(shift / self.scalar)

    def _entrywise_squares(self) -> PyTorchLinearOperator:
        return magnitude(self.scalar) ** 2 * self.operator._entrywise_squares()

    def _formula(self) -> str:
        return f"{_number_text(self.scalar)} * {_factor(self.operator)}"


@operation("scale")
def _scale(operator: PyTorchLinearOperator, scalar: Scalar) -> PyTorchLinearOperator:
    """Return ``s A`` by the rule for A's type."""
    if _is_number(scalar, 1):
        return operator
    scalar = _scalar_for(operator, scalar)
    result = apply_rule("scale", operator, scalar)
    return ScaledLinearOperator(operator, scalar) if result is None else result


@rule("scale", ScaledLinearOperator, object)
def _scale_scaled(operator: ScaledLinearOperator, scalar: Scalar) -> PyTorchLinearOperator:
    """``t (s A) = (t s) A``."""
    return (scalar * operator.scalar) * operator.operator


def _unscale(operator: PyTorchLinearOperator) -> tuple[Scalar, PyTorchLinearOperator]:
    """Split ``s A`` into s and A."""
    if isinstance(operator, ScaledLinearOperator):
        return operator.scalar, operator.operator
    return 1, operator


def _keeps_dtype(operator: ScaledLinearOperator) -> bool:
    """Return whether the scalar leaves the dtype as it is: no complex multiple of a real A."""
    return operator.dtype == operator.operator.dtype


# --------------------------------------------------------------------------------------------------
# Sum and shift
# --------------------------------------------------------------------------------------------------
@saveable
class SumLinearOperator(PyTorchLinearOperator):
    """The sum of operators on the same spaces.

    Args:
        operators: The terms; at least one.
    """

    _init_args = ("operators",)

    def __init__(self, operators: list[PyTorchLinearOperator]):
        if not operators:
            raise ValueError("A sum needs at least one operator.")
        super().__init__(operators[0].in_shape, operators[0].out_shape)
        self.operators = list(operators)
        for other in operators[1:]:
            _check_sum(operators[0], other)
        self.SELF_ADJOINT = all(op.SELF_ADJOINT for op in operators)

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
                f"{right!r} has {describe(b)}."
            )
    check_same("a sum", left, right)


@saveable
class ShiftedLinearOperator(_ScalarWrapper):
    """An operator plus a multiple of the identity, ``A + δ I``.

    Determinant, inverse and powers go through the eigendecomposition of A, when asked for.

    Args:
        operator: The operator A, from a space to itself.
        shift: The number or 0-d tensor δ.
    """

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

    def inverse(self, damping: Scalar = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        """Return ``(A + (δ + damping) I)⁻¹``, from eigenvalues."""
        check_strategy(strategy)
        return self._decomposed("inverse").inverse(damping)

    def eigh(self) -> PyTorchLinearOperator:
        """Return the operator in eigendecomposed form."""
        return self._decomposed("eigh")

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
        return f"{self.operator._formula()} + {_number_text(self.shift)} * I"


def _as_shift(operator: PyTorchLinearOperator) -> Scalar | None:
    """Return δ if the operator is δ I, else None."""
    scalar, rest = _unscale(operator)
    return scalar if isinstance(rest, IdentityLinearOperator) else None


def _add_shift(operator: PyTorchLinearOperator, shift: Scalar) -> PyTorchLinearOperator:
    """Return ``A + δ I`` by the rule for A's type."""
    result = apply_rule("shift", operator, shift)
    return ShiftedLinearOperator(operator, shift) if result is None else result


@rule("shift", ShiftedLinearOperator, object)
def _shift_shifted(operator: ShiftedLinearOperator, shift: Scalar) -> PyTorchLinearOperator:
    """``(A + δI) + εI = A + (δ + ε)I``."""
    return _add_shift(operator.operator, operator.shift + shift)


@rule("shift", ScaledLinearOperator, object)
def _shift_scaled(operator: ScaledLinearOperator, shift: Scalar) -> PyTorchLinearOperator:
    """``sI + δI = (s + δ)I``, and ``sA + δI = s(A + δ/s I)`` for a number s ≠ 0."""
    if isinstance(operator.operator, IdentityLinearOperator):
        return (operator.scalar + shift) * operator.operator
    if isinstance(operator.scalar, Tensor) or operator.scalar == 0 or not _keeps_dtype(operator):
        return NotImplemented
    return operator.scalar * _add_shift(operator.operator, shift / operator.scalar)


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
        return _add_shift(left, shift)
    shift = _as_shift(left)
    if shift is not None:
        return _add_shift(right, shift)
    if isinstance(left, ShiftedLinearOperator):
        return _add_shift(left.operator + right, left.shift)
    if isinstance(right, ShiftedLinearOperator):
        return _add_shift(left + right.operator, right.shift)
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


# --------------------------------------------------------------------------------------------------
# Product
# --------------------------------------------------------------------------------------------------
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
            raise ValueError("A chain needs at least one operator.")
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

    def inverse(self, damping: Scalar = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        """Return P (B + δI)⁻¹ P⁻¹; without damping also the inverse of square operators."""
        inner = self._inner()
        if inner is not None:
            return self._wrap(inner.inverse(damping, **strategy))
        check_strategy(strategy)
        self._check_square("inverse")
        self._check_square_factors("inverse")
        if not _is_number(damping, 0):
            raise self._missing("inverse")
        return _ChainPyTorchLinearOperator(*(op.inverse() for op in reversed(self._operators)))

    def eigh(self) -> PyTorchLinearOperator:
        """Return P eigh(B) P⁻¹."""
        return self._wrap(self._need_inner("eigh").eigh())

    def power(self, exponent: float) -> PyTorchLinearOperator:
        """Return P Bᵖ P⁻¹."""
        return self._wrap(self._need_inner("power").power(exponent))

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
        return " @ ".join(_factor(op) for op in self._operators)


def _check_product(left: PyTorchLinearOperator, right: PyTorchLinearOperator) -> None:
    """Raise if two operators cannot be multiplied."""
    if left.in_shape != right.out_shape:
        raise ValueError(
            f"Shape mismatch in a product: {left!r} takes {describe(left.in_shape)}, but "
            f"{right!r} returns {describe(right.out_shape)}."
        )
    check_same("a product", left, right)


def _factor(operator: PyTorchLinearOperator) -> str:
    """Return an operator as a factor of a product, in parentheses if it is a sum."""
    formula = operator._formula()
    is_sum = isinstance(operator, (SumLinearOperator, ShiftedLinearOperator))
    return f"({formula})" if is_sum else formula


@operation("matmul")
def _multiply(left: PyTorchLinearOperator, right: PyTorchLinearOperator) -> PyTorchLinearOperator:
    """Multiply operators: flatten chains, pull scalars out, and join neighbours by their rules."""
    _check_product(left, right)
    (s, a), (t, b) = _unscale(left), _unscale(right)
    scalar: Scalar = 1
    if a.dtype == b.dtype or None in (a.dtype, b.dtype):
        scalar, left, right = s * t, a, b
    # else a complex multiple of a real operator stays in one piece next to a complex operator
    identity: PyTorchLinearOperator = left
    stack: list[PyTorchLinearOperator] = []
    for op in [*_factors(left), *_factors(right)]:
        current: PyTorchLinearOperator | None = op
        if isinstance(op, ScaledLinearOperator) and _keeps_dtype(op):
            scalar, current = scalar * op.scalar, op.operator
        while current is not None:
            if isinstance(current, IdentityLinearOperator):
                identity, current = current, None
                break
            folded = apply_rule("matmul", stack[-1], current) if stack else None
            if folded is None:
                break
            stack.pop()
            factor, current = _unscale(folded)
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
    return _ChainPyTorchLinearOperator(operator[0], _add_shift(inner, shift), operator[-1])


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
