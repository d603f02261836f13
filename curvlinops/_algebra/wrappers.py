"""Operators around another one: the lazy adjoint and conjugate."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from curvlinops._damping import Damping, map_damping
from curvlinops._formats import Columns
from curvlinops._operator import PyTorchLinearOperator
from curvlinops._rules import operation
from curvlinops._saving import saveable
from curvlinops._scalars import Scalar, conj, is_real
from curvlinops._tensors import complex_dtype


class Wrapper(PyTorchLinearOperator):
    """An operator around another one between the same spaces."""

    operator: PyTorchLinearOperator

    @property
    def _in_names(self) -> list[str] | None:
        return self.operator._in_names

    @property
    def _out_names(self) -> list[str] | None:
        return self.operator._out_names

    def _around(self, block: PyTorchLinearOperator) -> PyTorchLinearOperator:
        """Return what this operator makes of a block of the operator inside."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _around.")

    def _resolve_damping(self, damping: Damping) -> Any:
        if not callable(damping):
            return self.operator._resolve_damping(damping)
        return self.operator._resolve_damping(lambda block: damping(self._around(block)))


class ScalarWrapper(Wrapper):
    """An operator together with a scalar, which takes part in neither device nor dtype."""

    _SCALAR: ClassVar[str]

    def __init__(self, operator: PyTorchLinearOperator, scalar: Scalar):
        super().__init__(operator.in_shape, operator.out_shape)
        self.operator = operator
        setattr(self, self._SCALAR, scalar)

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
        return type(self)(operator, scalar_for(operator, scalar, operator.device))

    @property
    def device(self) -> torch.device | None:
        return self.operator.device

    @property
    def SELF_ADJOINT(self) -> bool:  # type: ignore[override]  # items may be replaced
        """Whether the operator is its own adjoint."""
        return self.operator.SELF_ADJOINT and is_real(getattr(self, self._SCALAR))

    @property
    def dtype(self) -> torch.dtype | None:
        own = self.operator.dtype
        if own is None or is_real(getattr(self, self._SCALAR)):
            return own
        return complex_dtype(own)


def scalar_for(
    operator: PyTorchLinearOperator, scalar: Scalar, device: torch.device | None = None
) -> Scalar:
    """Return a scalar in an operator's precision, lest a 0-d tensor widens 0-d results."""
    if not isinstance(scalar, Tensor) or operator.dtype is None:
        return scalar
    if is_real(scalar):  # which stays real, lest a multiple of a Hermitian operator is none
        dtype = operator.dtype.to_real() if operator.dtype.is_complex else operator.dtype
    else:
        dtype = complex_dtype(operator.dtype)
    return scalar.to(device=device, dtype=dtype)


def same_number(a: Scalar, b: Scalar) -> bool:
    """Return whether two scalars are known to be equal (tensors are not read)."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return a == b


def number_text(value: Scalar) -> str:
    """Return a scalar as text; one without data, as for map_location="meta", as a letter."""
    if isinstance(value, Tensor):
        return "s" if value.is_meta else f"{value.item():.4g}"
    return f"{value:.4g}"


class _Conjugated(Wrapper):
    """What adjoint and conjugate have in common: closed forms are those of A, conjugated."""

    _init_args = ("operator",)

    def trace(self) -> Tensor:
        return self.operator.trace().conj()

    def diagonal(self) -> Tensor:
        return self.operator.diagonal().conj()

    def frobenius_norm(self) -> Tensor:
        return self.operator.frobenius_norm()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        sign, logabsdet = self.operator.slogdet()
        return sign.conj(), logabsdet

    def inverse(self, damping: Damping = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        inner = map_damping(conj, self._resolve_damping(damping))
        return self._around(self.operator.inverse(inner, **strategy))

    def eigh(self) -> PyTorchLinearOperator:
        return self._around(self.operator.eigh())

    def power(self, exponent: float) -> PyTorchLinearOperator:
        return self._around(self.operator.power(exponent))

    def pinv(self, rtol: float | None = None) -> PyTorchLinearOperator:
        return self._around(self.operator.pinv(rtol))


@saveable
class _AdjointLinearOperator(_Conjugated):
    """The adjoint of an operator that has no adjoint in closed form."""

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

    def _around(self, block: PyTorchLinearOperator) -> PyTorchLinearOperator:
        return block.adjoint()

    def _formula(self) -> str:
        return f"{self.operator._formula()}.H"


@saveable
class _ConjugateLinearOperator(_Conjugated):
    """The entry-wise complex conjugate of an operator."""

    def __init__(self, operator: PyTorchLinearOperator):
        super().__init__(operator.in_shape, operator.out_shape)
        self.operator = operator

    def _matmat(self, X: Columns) -> Columns:
        return [y.conj() for y in self.operator._matmat([x.conj() for x in X])]

    def _adjoint_matmat(self, X: Columns) -> Columns:
        return [y.conj() for y in self.operator._adjoint_matmat([x.conj() for x in X])]

    def _conjugate(self) -> PyTorchLinearOperator:
        return self.operator

    def _around(self, block: PyTorchLinearOperator) -> PyTorchLinearOperator:
        return block._conjugate()

    def _formula(self) -> str:
        return f"conj({self.operator._formula()})"


@operation("adjoint")
def _lazy_adjoint(operator: PyTorchLinearOperator, _: None) -> PyTorchLinearOperator:
    return _AdjointLinearOperator(operator)


@operation("conjugate")
def _lazy_conjugate(operator: PyTorchLinearOperator, _: None) -> PyTorchLinearOperator:
    return _ConjugateLinearOperator(operator)
