"""The identity, and scalars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvlinops._damping import Damping
from curvlinops._formats import Columns
from curvlinops._operator import PyTorchLinearOperator, check_strategy, like
from curvlinops._rules import operation
from curvlinops._saving import saveable
from curvlinops._scalars import Scalar


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
        return [x.clone() for x in X]  # a result does not share memory with its input

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

    def inverse(self, damping: Damping = 0.0, **strategy: Any) -> PyTorchLinearOperator:
        """Return ``(1 + damping)⁻¹ I``."""
        check_strategy(strategy)
        value = self._resolve_damping(damping)
        return self if is_number(value, 0) else self / nonzero(1 + value, self, value)

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


def is_number(value: Scalar, number: int) -> bool:
    """Return whether a scalar is this real number (a tensor is not read, it may be on a GPU)."""
    return not isinstance(value, (Tensor, complex)) and value == number


def nonzero(value: Scalar, operator: PyTorchLinearOperator, damping: Scalar) -> Scalar:
    """Return a scalar to divide by; raise if it is zero."""
    if value == 0:
        raise RuntimeError(
            f"{operator!r} with damping {damping} is zero and has no inverse. Increase the damping."
        )
    return value


@operation("identity")
def identity_like(operator: PyTorchLinearOperator, _: None = None) -> IdentityLinearOperator:
    """Return the identity on an operator's input space."""
    identity = IdentityLinearOperator(operator.in_shape, operator.device, operator.dtype)
    identity._names = operator._in_names
    return identity
