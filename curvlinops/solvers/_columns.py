"""The columns of a solve, which stop one by one: their numbers, sizes and reasons to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvlinops._operator import PyTorchLinearOperator
from curvlinops._tensors import widened
from curvlinops.solvers._arguments import Function
from curvlinops.solvers._info import CONVERGED, SolverInfo, make_info

NOT_FINITE = "a product with A or the preconditioner is not finite, or the iteration overflows"
INDEFINITE_PRECONDITIONER = (
    "the preconditioner M is not positive definite, a residual r has rᴴ M r <= 0"
)
_NOT_FINITE_B = "b is not finite; x = 0 is returned"
_NOT_FINITE_START = "the product of A with x0 is not finite; x = 0 is returned"
_ROUNDING = (
    "the iteration's residual is small enough, but that of x is not, by rounding; A is too "
    "ill-conditioned for the tolerance"
)
_OVERFLOW = "the solution is too large for its dtype; x = 0 is returned"


class Columns:
    """The columns of a solve: the solution so far, who is still iterated, why others stopped.

    A solver's own arrays hold the active columns only. It drops those that stop by :meth:`keep`.
    What the host decides by, and what it reports, is on the CPU.

    Args:
        b: Right-hand sides, flat columns ``[M, K]`` in the dtype of products with A.
        dim: Number of rows of the solution.

    Attributes:
        dtype: The dtype of products.
        x: The solution so far, ``[D, K]``, divided by ``scale`` and multiplied with ``unit``.
        b: Right-hand sides of the active columns, divided by ``scale``.
        active: Numbers of the columns that are still iterated, ascending.
        iterations: Steps of each column ``[K]``.
        residuals: Norms of residuals relative to b ``[K]``, at first those of x = 0.
        b_norms: Norms of b, divided by ``scale``.
        history: The largest of ``residuals``, at the start and after each step.
    """

    def __init__(self, b: Tensor, dim: int):
        self.dtype, num_columns = b.dtype, b.shape[1]
        b = widened(b)
        # Scaling by a power of two is exact, and keeps squares of small entries from underflow.
        self._scale = power_of_two(b)  # [K]
        b = b / self._scale
        self._unit: Tensor | None = None
        self.x = b.new_zeros(dim, num_columns)
        self.active = torch.arange(num_columns)
        self.iterations = torch.zeros(num_columns, dtype=torch.int64)
        self.b_norms = to_host(inner(b, b)).sqrt()
        self.residuals = (self.b_norms > 0).double()
        self.history: list[float] = []
        self._reasons = [CONVERGED] * num_columns
        self._converged = torch.ones(num_columns, dtype=torch.bool)
        finite = self.b_norms.isfinite()
        self.residuals[~finite] = math.inf
        self._threshold = -math.inf
        self.stop(~finite, _NOT_FINITE_B)
        (self.b,) = self.keep(finite & (self.b_norms > 0), b)

    def start(self, A: PyTorchLinearOperator, x0: Tensor | None, tolerance: float) -> Tensor:
        """Take x0 for the solution so far; return the residuals above the tolerance."""
        # the recurrence for the residual knows no floor, but says nothing below eps²
        self._threshold = max(tolerance, torch.finfo(self.b.dtype).eps ** 2)
        r = self.b
        if x0 is not None and len(self.active):
            start = select(widened(x0) / self._scale, self.active)
            start, product = apply(A.__matmul__, start, self.dtype)
            r = r - product
            norms = to_host(inner(r, r)).sqrt() / self.b_norms[self.active]
            # an x0 that is not finite need not show in the product, if A is zero there
            finite = norms.isfinite() & start.isfinite().all(dim=0).cpu()
            self.stop(~finite, _NOT_FINITE_START)
            r, start = self.keep(finite, r, start)
            self.x.index_copy_(1, self.active.to(self.x.device), start)
            self.residuals[self.active] = norms[finite]
        self.begin()
        (r,) = self.keep(self.residuals[self.active] > self._threshold, r)
        return r

    def begin(self) -> None:
        """Begin the history."""
        if len(self.residuals):
            self.history.append(self.residuals.max().item())

    def set_unit(self, product: Tensor) -> Tensor:
        """Choose a power of two by which the active columns' products with A are divided."""
        unit = power_of_two(product)
        self._unit = torch.ones_like(self._scale)
        self._unit[self.active.to(unit.device)] = unit
        self.x = self.x * self._unit
        return unit

    def stop(self, mask: Tensor, reason: str, converged: bool = False) -> None:
        """Note why some of the active columns stop. They are dropped by :meth:`keep`."""
        self._note(self.active[mask], reason, converged)

    def _note(self, columns: Tensor, reason: str, converged: bool = False) -> None:
        """Note why columns stopped."""
        for column in columns.tolist():
            self._reasons[column] = reason
            self._converged[column] = converged

    def keep(self, mask: Tensor, *arrays: Tensor) -> Sequence[Tensor]:
        """Drop active columns, from their list of numbers and from arrays that hold them."""
        places = mask.nonzero().squeeze(1)
        self.active = self.active[places]
        return [select(array, places) for array in arrays]

    def advance(self, good: Tensor, update: Tensor, norms: Tensor) -> Tensor:
        """Step some active columns; return which have residuals above the tolerance then.

        Args:
            good: Which active columns step; the others end before it.
            update: What x changes by, for all active columns.
            norms: The norms of their residuals then.
        """
        (places,) = good.nonzero(as_tuple=True)
        columns, update = self.active[places], select(update, places)
        if len(columns) == self.x.shape[1]:  # the usual case, and much faster
            self.x.add_(update)
        else:
            self.x.index_add_(1, columns.to(self.x.device), update)
        self.iterations[columns] += 1
        self.residuals[columns] = norms[places] / self.b_norms[columns]
        if len(columns):
            self.history.append(self.residuals.max().item())
        return good & (self.residuals[self.active] > self._threshold)

    def close(self, max_iter: int) -> None:
        """Note that the columns that are still active ran out of iterations."""
        everyone = torch.ones_like(self.active, dtype=torch.bool)
        self.stop(everyone, f"max_iter = {max_iter} is reached")
        self.keep(~everyone)

    def verify(self, A: PyTorchLinearOperator, b: Tensor, columns: Tensor) -> None:
        """Compute residuals of converged columns anew; note if they are not what they seemed.

        Args:
            A: The operator.
            b: Right-hand sides of all columns, as given.
            columns: The numbers of the columns (those that have not converged are left out).
        """
        columns = columns[self._converged[columns]]
        if not len(columns):
            return
        b, x = (select(v, columns) for v in (widened(b) / self._scale, self.x))
        product = apply(A.__matmul__, x, self.dtype)[1]
        if self._unit is not None:
            product = product / select(self._unit, columns)
        r = b - product
        self.residuals[columns] = to_host(inner(r, r)).sqrt() / self.b_norms[columns]
        within = 1.1 * self._threshold + 10 * torch.finfo(b.dtype).eps
        missed = ~(self.residuals[columns] <= within)
        self._note(columns[missed], _ROUNDING)

    def finish(
        self, solver: str, goal: str, normal_residuals: Tensor | None = None
    ) -> tuple[Tensor, SolverInfo]:
        """Return the solution in its dtype, and what happened."""
        ratio = self._scale
        if self._unit is not None:
            # in float64, where neither over- nor underflows unless the solution does
            ratio = (to_host(ratio) / to_host(self._unit)).to(self.x.device, self.x.real.dtype)
        x = (self.x * ratio).to(self.dtype)
        overflow = ~x.isfinite().all(0).cpu()
        if overflow.any():
            self._note(overflow.nonzero().squeeze(1), _OVERFLOW)
            self.residuals[overflow] = 1.0
            x = x.masked_fill(overflow.to(x.device), 0)
        info = make_info(
            solver,
            goal,
            self.iterations,
            self.residuals,
            self._converged,
            self._reasons,
            self.history,
            normal_residuals,
        )
        return x, info


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Return xᴴ y of each column, which is real for what these solvers multiply: ``[K]``.

    Sums are cascaded, unlike in ``vector_norm`` along this axis: float32 stays accurate.
    """
    return (x.conj() * y).sum(0).real


def to_host(numbers: Tensor) -> Tensor:
    """Copy a few numbers to the CPU, as float64 (which not every device has)."""
    return numbers.cpu().double()


def like(numbers: Tensor, array: Tensor) -> Tensor:
    """Copy a few numbers from the host to an array's device, in its precision."""
    return numbers.to(array.device, array.real.dtype)


def select(matrix: Tensor, columns: Tensor) -> Tensor:
    """Return some columns of a matrix ``[D, K]`` or vector ``[K]``."""
    if len(columns) == matrix.shape[-1]:  # ascending numbers, hence all of them
        return matrix
    return matrix.index_select(-1, columns.to(matrix.device))


def apply(function: Function, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Apply a function in a dtype; return what it was given and its result, in v's dtype.

    Rounding what is given keeps the iteration consistent: x and r move by the same direction.
    """
    if v.dtype == dtype:
        return v, function(v).to(dtype)
    scale = power_of_two(v)  # float16 has a small range
    narrow = (v / scale).to(dtype)
    return narrow.to(v.dtype) * scale, function(narrow).to(v.dtype) * scale


def power_of_two(v: Tensor) -> Tensor:
    """Return the power of two below each column's largest entry; 1 if that is 0 or not finite."""
    real = v.abs()
    if not real.numel():
        return real.new_ones(v.shape[1])
    largest = real.amax(0)
    power = largest.log2().floor().exp2()
    return torch.where(largest.isfinite() & (largest > 0), power, torch.ones_like(power))


def divided(v: Tensor, norms: Tensor) -> Tensor:
    """Return columns divided by their norms; columns of norm 0 as they are."""
    return v / torch.where(norms > 0, norms, torch.ones_like(norms))
