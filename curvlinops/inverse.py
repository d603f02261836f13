"""Inverses by iterative solvers and by series: operators that solve when they multiply."""

from __future__ import annotations

import math
import pickle
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvlinops._formats import Columns, concatenate, split_flat
from curvlinops._operator import PyTorchLinearOperator
from curvlinops._saving import saveable
from curvlinops._scalars import as_integer
from curvlinops._tensors import widened
from curvlinops.solvers._arguments import (
    Preconditioner,
    as_bound,
    as_function,
    as_max_iter,
    check_operator,
    check_square,
    flatten,
    flatten_start,
    names_of,
)
from curvlinops.solvers._columns import apply
from curvlinops.solvers._info import SolverInfo, warn_of
from curvlinops.solvers.cg import solve as solve_cg
from curvlinops.solvers.lsmr import solve as solve_lsmr


class _Inverse(PyTorchLinearOperator):
    """An operator that applies an inverse of another one, A, which it holds."""

    A: PyTorchLinearOperator
    preconditioner: Preconditioner | None = None

    def __init__(self, A: PyTorchLinearOperator):
        super().__init__(A.out_shape, A.in_shape)
        self.A = A

    @property
    def _in_names(self) -> list[str] | None:
        square = self.A.in_shape == self.A.out_shape
        return names_of(self.A) if square else self.A._out_names

    @property
    def _out_names(self) -> list[str] | None:
        square = self.A.in_shape == self.A.out_shape
        return names_of(self.A) if square else self.A._in_names

    def __copy__(self) -> Any:
        return type(self)._from_state(self._state())

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not isinstance(self.preconditioner, (PyTorchLinearOperator, type(None))):
            raise pickle.PicklingError(
                f"Cannot save {self!r}: its preconditioner is a function, and files hold no code. "
                "Pass an operator as the preconditioner."
            )
        return super().__reduce_ex__(protocol)


class _SolverInverse(_Inverse):
    """An inverse by a solver, whose last info it keeps; each reason is warned of once."""

    def __init__(self, A: PyTorchLinearOperator):
        super().__init__(A)
        self._info: SolverInfo | None = None
        self._warned: set[str] = set()

    @property
    def info(self) -> SolverInfo | None:
        """What happened in the last product, None before the first one."""
        return self._info

    def _solve(self, A: PyTorchLinearOperator, b: Tensor) -> tuple[Tensor, SolverInfo]:
        """Apply the inverse of A to flat columns."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _solve.")

    def _multiply(self, A: PyTorchLinearOperator, X: Columns) -> Columns:
        """Apply the inverse of A, which is self.A or its adjoint; keep the info, and warn."""
        with torch.no_grad():
            x, info = self._solve(A, concatenate(X))
        self._info = info
        failed = [not converged for converged in info.converged.tolist()]
        reasons = {r for r, fails in zip(info.reasons, failed, strict=True) if fails}
        if not reasons <= self._warned:
            self._warned |= reasons
            warn_of(info, stacklevel=5)
        return split_flat(x, A.in_shape)

    def _matmat(self, X: Columns) -> Columns:
        return self._multiply(self.A, X)


@saveable
class CGInverseLinearOperator(_SolverInverse):
    r"""The inverse of a Hermitian positive definite operator, by conjugate gradients.

    Each product :math:`A^{-1} b` is a solve with :func:`~curvlinops.cg`, for all columns at once.
    It is as exact as the tolerance tells, hence neither quite linear nor quite Hermitian; A⁻¹
    counts as its own adjoint. A solve that does not converge is no error: ``info`` tells, and a
    warning. One operator warns of each reason once, however many products fail by it.

    Args:
        A: Hermitian positive definite operator.
        tolerance: As of :func:`~curvlinops.cg`, as the other arguments are.
        max_iter: Largest number of iterations. Default: ``10 * D``.
        preconditioner: An operator, or a function of flat columns ``[D, K]``. ``.to`` leaves a
            function as it is, and operators with a function cannot be saved.
        x0: Where each solve starts: one vector for all columns, or as many as they are.

    Attributes:
        info: The :class:`~curvlinops.solvers.SolverInfo` of the last product; None before.

    Raises:
        ValueError: If A does not map a space to itself, or arguments do not fit to it.
        TypeError: If an argument has a wrong type.

    Example:
        >>> import torch
        >>> from curvlinops import CGInverseLinearOperator, DiagonalLinearOperator
        >>> A_inv = CGInverseLinearOperator(DiagonalLinearOperator([torch.tensor([1.0, 4.0])]))
        >>> A_inv @ torch.tensor([1.0, 1.0])
        tensor([1.0000, 0.2500])
        >>> A_inv.info.iterations
        tensor([2])
    """

    SELF_ADJOINT = True
    _init_args: ClassVar[tuple[str, ...]] = ("A", "tolerance", "max_iter", "preconditioner", "x0")

    def __init__(
        self,
        A: PyTorchLinearOperator,
        *,
        tolerance: float = 1e-5,
        max_iter: int | None = None,
        preconditioner: Preconditioner | None = None,
        x0: Any = None,
    ):
        check_square("CGInverseLinearOperator", A)
        super().__init__(A)
        self.tolerance = as_bound("tolerance", tolerance)
        self.max_iter = as_max_iter(max_iter, default=10 * A.shape[1])
        as_function(preconditioner, A)
        self.preconditioner, self.x0 = preconditioner, x0
        if x0 is not None:
            flatten(A, x0, "x0", A.in_shape, names_of(A))

    def _solve(self, A: PyTorchLinearOperator, b: Tensor) -> tuple[Tensor, SolverInfo]:
        precondition, start = as_function(self.preconditioner, A), self.x0
        if start is not None:
            start, _ = flatten(A, start, "x0", A.in_shape, names_of(A))
            start = start.expand_as(b) if start.shape[1] == 1 else start
        start = flatten_start(A, start, b)
        return solve_cg(A, b, start, precondition, self.tolerance, self.max_iter)

    def _formula(self) -> str:
        return f"CG({self.A._formula()})⁻¹"


@saveable
class LSMRInverseLinearOperator(_SolverInverse):
    r"""The pseudo-inverse of an operator of any shape and rank, by LSMR.

    Each product :math:`A^+ b` is a solve with :func:`~curvlinops.lsmr`, for all columns at once;
    with ``damp``, it is :math:`(A^H A + \text{damp}^2 I)^{-1} A^H b`. The adjoint solves with the
    adjoint of A. A solve that does not converge is no error: ``info`` tells, and a warning. One
    operator warns of each reason once, however many products fail by it.

    Args:
        A: Operator with an adjoint.
        atol: As of :func:`~curvlinops.lsmr`, as the other arguments are.
        btol: Relative precision of b to solve for.
        max_iter: Largest number of iterations. Default: ten times the smaller side of A.
        damp: Weight of the norm of the solution.

    Attributes:
        info: The :class:`~curvlinops.solvers.SolverInfo` of the last product; None before.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has a wrong type.

    Example:
        >>> import torch
        >>> from curvlinops import LSMRInverseLinearOperator, TensorLinearOperator
        >>> A = TensorLinearOperator(torch.tensor([[3.0], [4.0]]))
        >>> A_pinv = LSMRInverseLinearOperator(A)
        >>> A_pinv @ torch.tensor([25.0, 0.0])
        tensor([3.])
        >>> A_pinv.info.reason
        'converged'
    """

    _init_args: ClassVar[tuple[str, ...]] = ("A", "atol", "btol", "max_iter", "damp")

    def __init__(
        self,
        A: PyTorchLinearOperator,
        *,
        atol: float = 1e-6,
        btol: float = 1e-6,
        max_iter: int | None = None,
        damp: float = 0.0,
    ):
        check_operator(A)
        super().__init__(A)
        self.atol, self.btol = as_bound("atol", atol), as_bound("btol", btol)
        self.damp = as_bound("damp", damp)
        self.max_iter = as_max_iter(max_iter, default=10 * min(A.shape))

    @property
    def SELF_ADJOINT(self) -> bool:  # type: ignore[override]
        """Whether the operator is its own adjoint."""
        return self.A.SELF_ADJOINT

    def _solve(self, A: PyTorchLinearOperator, b: Tensor) -> tuple[Tensor, SolverInfo]:
        return solve_lsmr(A, A.adjoint(), b, self.atol, self.btol, self.damp, self.max_iter)

    def _adjoint_matmat(self, X: Columns) -> Columns:
        return self._multiply(self.A.adjoint(), X)

    def _adjoint(self) -> LSMRInverseLinearOperator:
        return type(self)._from_state({**self._state(), "A": self.A.adjoint()})

    def _formula(self) -> str:
        damping = f", damp={self.damp:.4g}" if self.damp else ""
        return f"LSMR({self.A._formula()}{damping})⁺"


@saveable
class NeumannInverseLinearOperator(_Inverse):
    r"""The inverse of an operator by a truncated Neumann series.

    .. math:: A^{-1} \approx s \sum_{k=0}^{n} (I - s P A)^k P

    with a scale s, a preconditioner P and n = ``num_terms``. The series converges if the
    eigenvalues of :math:`s P A` are within 1 of 1: for a Hermitian positive definite A without P,
    if :math:`0 < s < 2 / \lambda_{\max}`. The error is :math:`(I - s P A)^{n+1} A^{-1}`. Unlike
    conjugate gradients, the result is linear in what is multiplied. See

    - Lorraine, J., Vicol, P., & Duvenaud, D. (2020). Optimizing millions of hyperparameters by
      implicit differentiation. International Conference on Artificial Intelligence and Statistics
      (AISTATS).

    Each product takes n products with A and n + 1 with P, in Horner's form. bfloat16 and float16
    operators multiply in their own dtype, but the sum is in float32.

    Args:
        A: Operator from a space of tensors to itself, of dimension D.
        num_terms: The number n of terms after the first one, at least 0.
        scale: The scale s.
        check_nan: Whether to check for NaNs (and infinities) after each term.
        preconditioner: The approximation P of A⁻¹: an operator on the same space, or a function
            of flat columns ``[D, K]``. The adjoint takes a function for its own adjoint. ``.to``
            leaves a function as it is, and operators with a function cannot be saved.

    Raises:
        ValueError: If A does not map a space to itself, or if an argument is out of range; from a
            product, if the series overflows: "Detected NaNs after application of …".
        TypeError: If an argument has a wrong type.

    Example:
        >>> import torch
        >>> from curvlinops import DiagonalLinearOperator, NeumannInverseLinearOperator
        >>> A = DiagonalLinearOperator([torch.tensor([1.0, 4.0])])
        >>> NeumannInverseLinearOperator(A, num_terms=50, scale=0.25) @ torch.ones(2)
        tensor([1.0000, 0.2500])
    """

    _init_args: ClassVar[tuple[str, ...]] = (
        "A",
        "num_terms",
        "scale",
        "check_nan",
        "preconditioner",
    )

    def __init__(
        self,
        A: PyTorchLinearOperator,
        num_terms: int = 100,
        scale: float = 1.0,
        check_nan: bool = True,
        preconditioner: Preconditioner | None = None,
    ):
        check_square("NeumannInverseLinearOperator", A)
        super().__init__(A)
        self.num_terms = as_integer("num_terms", num_terms, 0)
        self.scale, self.check_nan = float(scale), bool(check_nan)
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {scale!r}.")
        as_function(preconditioner, A)
        self.preconditioner = preconditioner

    @property
    def SELF_ADJOINT(self) -> bool:  # type: ignore[override]
        """Whether the operator is its own adjoint; a function counts as its own."""
        P = self.preconditioner
        return self.A.SELF_ADJOINT and (not isinstance(P, PyTorchLinearOperator) or P.SELF_ADJOINT)

    def _matmat(self, X: Columns) -> Columns:
        b = concatenate(X)
        precondition = as_function(self.preconditioner, self.A)
        with torch.no_grad():
            first = self._precondition(precondition, widened(b), b.dtype)
            x = first
            self._check(x, 0)
            for term in range(1, self.num_terms + 1):
                product = apply(self.A.__matmul__, x, b.dtype)[1]
                x = first + x - self.scale * self._precondition(precondition, product, b.dtype)
                self._check(x, term)
            return split_flat((self.scale * x).to(b.dtype), self.out_shape)

    def _adjoint(self) -> NeumannInverseLinearOperator:
        P = self.preconditioner
        P = P.adjoint() if isinstance(P, PyTorchLinearOperator) else P
        state = {**self._state(), "A": self.A.adjoint(), "preconditioner": P}
        return type(self)._from_state(state)

    def _formula(self) -> str:
        P, A, s = self.preconditioner, self.A._as_factor(), f"{self.scale:.4g}"
        if P is None:
            return f"{s} * Σₖ (I - {s} * {A})ᵏ [k ≤ {self.num_terms}]"
        left = P._as_factor() if isinstance(P, PyTorchLinearOperator) else "P"
        return f"{s} * Σₖ (I - {s} * {left} @ {A})ᵏ @ {left} [k ≤ {self.num_terms}]"

    @staticmethod
    def _precondition(function: Any, v: Tensor, dtype: torch.dtype) -> Tensor:
        """Return P v."""
        return v if function is None else apply(function, v, dtype)[1]

    def _check(self, x: Tensor, term: int) -> None:
        """Raise if the sum is not finite any more."""
        if self.check_nan and not bool(x.isfinite().all()):
            raise ValueError(
                f"Detected NaNs after application of term {term}: the series diverges unless "
                "the eigenvalues of scale * P @ A are within 1 of 1. Decrease the scale, or pass "
                "a preconditioner."
            )
