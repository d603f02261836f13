"""Hermitian operators with few eigenvalues besides one that all others share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor

from curvlinops import _tensors
from curvlinops._damping import Damping
from curvlinops._formats import Columns, concatenate, numel, split_flat
from curvlinops._operator import PyTorchLinearOperator, check_strategy
from curvlinops._rules import rule
from curvlinops._saving import saveable
from curvlinops._scalars import Scalar, is_real


@saveable
class LowRankLinearOperator(PyTorchLinearOperator):
    r"""A Hermitian operator of low rank, plus a multiple of the projector on what is left.

    .. math::
        A = U \operatorname{diag}(\lambda) U^H + c\, (I - U U^H), \qquad U^H U = I

    This is the eigendecomposition of an operator that has all but r eigenvalues in common, so that
    inverses, powers, traces and determinants are of the same form. Products cost two with U.

    Args:
        eigenvalues: Tensor λ ``[r]``, real.
        eigenvectors: Orthonormal columns U ``[D, r]``; this is trusted.
        shapes: Shapes of the tensors of the space. Default: one flat tensor ``[D]``.
        rest: The eigenvalue c of all that is orthogonal to U.

    Raises:
        ValueError: If shapes do not fit, or eigenvalues are complex.

    Example:
        >>> import torch
        >>> from curvlinops.low_rank import LowRankLinearOperator
        >>> A = LowRankLinearOperator(torch.tensor([2.0]), torch.eye(3)[:, :1], rest=1.0)
        >>> print(A.inverse().to_dense().diagonal())
        tensor([0.5000, 1.0000, 1.0000])
    """

    SELF_ADJOINT = True

    def __init__(
        self,
        eigenvalues: Tensor,
        eigenvectors: Tensor,
        shapes: Sequence[Sequence[int]] | None = None,
        rest: float | Tensor = 0.0,
    ):
        if eigenvectors.ndim != 2 or eigenvalues.shape != eigenvectors.shape[1:]:
            raise ValueError(
                f"Eigenvectors [D, r] need eigenvalues [r], got {list(eigenvectors.shape)} and "
                f"{list(eigenvalues.shape)}."
            )
        if eigenvalues.is_complex():
            raise ValueError(
                f"The eigenvalues of a Hermitian operator are real, got {eigenvalues.dtype}."
            )
        space = [Size(eigenvectors.shape[:1])] if shapes is None else [Size(s) for s in shapes]
        if numel(space) != eigenvectors.shape[0]:
            raise ValueError(
                f"Eigenvectors of shape {list(eigenvectors.shape)} do not fit a space of dimension "
                f"{numel(space)}: they need as many rows."
            )
        super().__init__(space, space)
        self.eigenvectors = eigenvectors
        self.eigenvalues = eigenvalues
        self.rest = torch.as_tensor(rest, dtype=eigenvalues.dtype, device=eigenvalues.device)

    def _state(self) -> dict[str, Any]:
        return {
            "eigenvectors": self.eigenvectors,
            "eigenvalues": self.eigenvalues,
            "shapes": self.in_shape,
            "rest": self.rest,
        }

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> LowRankLinearOperator:
        values, rest = state["eigenvalues"], state["rest"]
        if values.is_complex():  # by .to(dtype)
            values, rest = values.real, rest.real
        return cls(values, state["eigenvectors"], state["shapes"], rest)

    def _matmat(self, X: Columns) -> Columns:
        x = concatenate(X)  # [D, K]
        U = self.eigenvectors
        scaled = (self.eigenvalues - self.rest).unsqueeze(-1) * (U.mH @ x)
        return split_flat(U @ scaled + self.rest * x, self.in_shape)

    def _conjugate(self) -> LowRankLinearOperator:
        values, rest = self.eigenvalues, self.rest
        return LowRankLinearOperator(values, self.eigenvectors.conj(), self.in_shape, rest)

    def _with(self, values: Tensor, rest: Tensor) -> LowRankLinearOperator:
        """Return an operator with the same eigenvectors."""
        return LowRankLinearOperator(values, self.eigenvectors, self.in_shape, rest)

    @property
    def _num_rest(self) -> int:
        """How often the eigenvalue of the rest occurs."""
        return self.eigenvectors.shape[0] - self.eigenvectors.shape[1]

    def _spectrum(self) -> Tensor:
        """The eigenvalues ``[r + 1]``, or ``[r]`` if nothing is left."""
        values = self.eigenvalues
        return torch.cat([values, self.rest.reshape(1)]) if self._num_rest else values

    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues."""
        return (self.eigenvalues.sum() + self._num_rest * self.rest).to(self.eigenvectors.dtype)

    def diagonal(self) -> Tensor:
        """Return the diagonal ``[D]``."""
        squares = self.eigenvectors.abs() ** 2
        diagonal = squares @ (self.eigenvalues - self.rest) + self.rest
        return diagonal.to(self.eigenvectors.dtype)

    def frobenius_norm(self) -> Tensor:
        """Return the norm of the eigenvalues."""
        squares = (self.eigenvalues**2).sum() + self._num_rest * self.rest**2
        return squares.sqrt()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return sign and logarithm of the product of the eigenvalues."""
        sign, log = self.eigenvalues.sgn().prod(), self.eigenvalues.abs().log().sum()
        if self._num_rest:
            sign = sign * self.rest.sgn() ** self._num_rest
            log = log + self._num_rest * self.rest.abs().log()
        return sign.to(self.eigenvectors.dtype), log

    def inverse(self, damping: Damping = 0.0, **strategy: Any) -> LowRankLinearOperator:
        """Return ``(A + damping * I)⁻¹``, which has the same eigenvectors.

        As preconditioner of ``A + damping * I`` with the operator that was approximated it leaves
        only the part of the spectrum that the approximation lacks.

        Raises:
            RuntimeError: If an eigenvalue plus damping is zero.
        """
        check_strategy(strategy)
        shift = self._resolve_damping(damping)
        if bool((self._spectrum() + shift == 0).any()):
            raise RuntimeError(
                f"Cannot invert {self!r}: with damping {shift} it has eigenvalues 0. "
                "Increase the damping."
            )
        values, rest = self.eigenvalues + shift, self.rest + shift
        return self._with(1 / values, 1 / rest if self._num_rest else rest)

    def eigh(self) -> LowRankLinearOperator:
        """Return itself."""
        return self

    def power(self, exponent: float) -> LowRankLinearOperator:
        """Return the operator of the powers of the eigenvalues."""
        power = _tensors.real_power(self._spectrum(), exponent, name=repr(self))
        rank = len(self.eigenvalues)
        return self._with(power[:rank], power[rank] if self._num_rest else self.rest)

    def pinv(self, rtol: float | None = None) -> LowRankLinearOperator:
        """Return the operator of reciprocal eigenvalues, 0 for those that count as zero."""
        spectrum, rank = self._spectrum(), len(self.eigenvalues)
        cutoff = _tensors.relative_cutoff(rtol, 1, spectrum.dtype) * spectrum.abs().max()
        inverse = _tensors.reciprocals(spectrum, cutoff)
        return self._with(inverse[:rank], inverse[rank] if self._num_rest else self.rest)

    def _formula(self) -> str:
        return f"LowRank({self.eigenvectors.shape[1]})"


@rule("scale", LowRankLinearOperator, object)
def _scale(a: LowRankLinearOperator, scalar: Scalar) -> PyTorchLinearOperator:
    """A real multiple has the same eigenvectors and multiplied eigenvalues."""
    return a._with(scalar * a.eigenvalues, scalar * a.rest) if is_real(scalar) else NotImplemented


@rule("shift", LowRankLinearOperator, object)
def _shift(a: LowRankLinearOperator, shift: Scalar) -> PyTorchLinearOperator:
    """Adding a real multiple of the identity shifts the eigenvalues."""
    return a._with(a.eigenvalues + shift, a.rest + shift) if is_real(shift) else NotImplemented
