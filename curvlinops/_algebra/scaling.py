"""Scalar multiples of operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlinops._algebra.identity import IdentityLinearOperator, identity_like, is_number, nonzero
from curvlinops._algebra.wrappers import ScalarWrapper, number_text, same_number, scalar_for
from curvlinops._damping import Damping, map_damping, one_damping
from curvlinops._formats import Columns
from curvlinops._operator import PyTorchLinearOperator, check_strategy, matmat_each
from curvlinops._rules import apply_rule, batched, operation, rule
from curvlinops._saving import saveable
from curvlinops._scalars import Scalar, conj, is_real, magnitude
from curvlinops._tensors import NotHermitianError, real_power
from curvlinops._tensors import is_real as has_real_values


@saveable
class ScaledLinearOperator(ScalarWrapper):
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
        dtype = X[0].real.dtype  # that of complex numbers has at least float32's precision
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

    def inverse(self, damping: Damping = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        """Return ``(s A + δ I)⁻¹ = s⁻¹ (A + δ/s I)⁻¹``."""
        check_strategy(strategy)
        if self.scalar == 0:
            value = one_damping(damping, self)
            return identity_like(self) / nonzero(value, self, value)
        inner = map_damping(lambda value: value / self.scalar, self._resolve_damping(damping))
        return self.operator.inverse(inner, **strategy) / self.scalar

    def _around(self, block: PyTorchLinearOperator) -> PyTorchLinearOperator:
        return self.scalar * block

    def eigh(self) -> PyTorchLinearOperator:
        """Return the operator in eigendecomposed form."""
        if not keeps_dtype(self):  # real eigenvectors with complex eigenvalues
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
        try:
            decomposed = self.eigh()
        except NotImplementedError as error:
            raise self._missing("power") from error
        if isinstance(decomposed, ScaledLinearOperator):
            raise self._missing("power")
        return decomposed.power(exponent)

    def pinv(self, rtol: float | None = None) -> PyTorchLinearOperator:
        """Return ``s⁻¹ A⁺``, or zero for s = 0."""
        if self.scalar == 0:
            return self.scalar * self.operator.adjoint()
        return self.operator.pinv(rtol) / self.scalar

    def _check_real_spectrum(self) -> None:
        if not is_real(self.scalar) and not has_real_values(torch.as_tensor(self.scalar)):
            raise NotHermitianError(f"{self!r} has complex eigenvalues, but must be Hermitian.")
        self.operator._check_real_spectrum()

    def _with_shift(self, shift: Scalar) -> PyTorchLinearOperator:
        if self.scalar == 0 or not keeps_dtype(self):
            return super()._with_shift(shift)
        return self.scalar * self.operator._with_shift(shift / self.scalar)

    def _entrywise_squares(self) -> PyTorchLinearOperator:
        return magnitude(self.scalar) ** 2 * self.operator._entrywise_squares()

    def _formula(self) -> str:
        return f"{number_text(self.scalar)} * {self.operator._as_factor()}"


@operation("scale")
def _scale(operator: PyTorchLinearOperator, scalar: Scalar) -> PyTorchLinearOperator:
    """Return ``s A`` by the rule for A's type."""
    if is_number(scalar, 1):
        return operator
    scalar = scalar_for(operator, scalar)
    result = apply_rule("scale", operator, scalar)
    return ScaledLinearOperator(operator, scalar) if result is None else result


@rule("scale", ScaledLinearOperator, object)
def _scale_scaled(operator: ScaledLinearOperator, scalar: Scalar) -> PyTorchLinearOperator:
    """``t (s A) = (t s) A``."""
    return (scalar * operator.scalar) * operator.operator


@batched(ScaledLinearOperator)
def _multiply_each(operators: list[ScaledLinearOperator], X: Columns, adjoint: bool) -> Any:
    """Multiply the operators at once, if the scalars are the same."""
    scalar = operators[0].scalar
    if not is_real(scalar) and not all(keeps_dtype(op) for op in operators):
        return NotImplemented
    if not all(same_number(op.scalar, scalar) for op in operators):
        return NotImplemented
    Y = matmat_each([op.operator for op in operators], X, adjoint)
    return [(conj(scalar) if adjoint else scalar) * y for y in Y]


def unscale(operator: PyTorchLinearOperator) -> tuple[Scalar, PyTorchLinearOperator]:
    """Split ``s A`` into s and A."""
    if isinstance(operator, ScaledLinearOperator):
        return operator.scalar, operator.operator
    return 1, operator


def keeps_dtype(operator: ScaledLinearOperator) -> bool:
    """Return whether the scalar leaves the dtype as it is: no complex multiple of a real A."""
    return operator.dtype == operator.operator.dtype
