"""Conjugate gradients for several right-hand sides at once."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from curvlinops._formats import (
    Format,
    concatenate,
    describe,
    from_columns,
    split_flat,
    to_columns,
)
from curvlinops._operator import PyTorchLinearOperator, check_same
from curvlinops._tensors import widened
from curvlinops.solvers._info import CONVERGED, SolverInfo, make_info

Preconditioner = PyTorchLinearOperator | Callable[[Tensor], Tensor]
_Function = Callable[[Tensor], Tensor]  # of flat columns [D, K]

_NOT_FINITE_B = "b is not finite; x = 0 is returned"
_NOT_FINITE_START = "the product of A with x0 is not finite; x = 0 is returned"
_NOT_FINITE = "a product with A or the preconditioner is not finite, or the iteration overflows"
_INDEFINITE = (
    "A is not positive definite, a search direction p has pᴴ A p <= 0; add a multiple of the "
    "identity to A"
)
_INDEFINITE_PRECONDITIONER = (
    "the preconditioner M is not positive definite, a residual r has rᴴ M r <= 0"
)


def cg(
    A: PyTorchLinearOperator,
    b: Any,
    *,
    tolerance: float = 1e-5,
    max_iter: int | None = None,
    preconditioner: Preconditioner | None = None,
    x0: Any = None,
) -> tuple[Any, SolverInfo]:
    r"""Solve :math:`A x = b` for a Hermitian positive definite A, by conjugate gradients.

    After k steps, :math:`x_k` minimises the energy norm :math:`(x - x^*)^H A (x - x^*)` of the
    error over :math:`x_0 + \operatorname{span}\{M r_0, (M A) M r_0, \dots, (M A)^{k-1} M r_0\}`,
    where :math:`r_0 = b - A x_0` and M is the preconditioner. The error falls at least by
    :math:`2 \left(\frac{\sqrt{\kappa} - 1}{\sqrt{\kappa} + 1}\right)^k` in that norm, with
    :math:`\kappa` the condition number of :math:`M A`. The method is that of

    - Hestenes, M. R., & Stiefel, E. (1952). Methods of conjugate gradients for solving linear
      systems. Journal of Research of the National Bureau of Standards, 49(6), 409-436.

    Each column of b is a system with its own steps. All columns that are still iterated share one
    product with A per iteration, and there is one more product if ``x0`` is given. A column stops
    for good once :math:`\lVert r \rVert \le \text{tolerance} \cdot \lVert b \rVert`, as in SciPy's
    ``cg`` with ``rtol=tolerance, atol=0``. As there, r is the residual that the iteration updates.
    It drifts from :math:`b - A x` by rounding: a tolerance close to the dtype's precision times
    the condition number of A may seem to be reached when it is not. Compute ``b - A @ x`` to
    verify a solution. Residuals below the square of the dtype's machine epsilon count as zero.

    A column also stops, with the last iterate, where A or the preconditioner turns out not to be
    positive definite, or numbers overflow. This is no error: ``info`` tells, and one warning.
    Positive semi-definite A work if b is in the range of A.

    bfloat16 and float16 operators multiply in their own dtype, but the iteration is in float32.
    Gradients are not recorded.

    Args:
        A: Hermitian positive definite operator from a space of tensors to itself, of dimension D.
        b: Right-hand side, in any format that A multiplies: one tensor ``[D]``, a list, tuple or
            dict of tensors ``[*N_i]``; or K of them, ``[D, K]`` or tensors ``[*N_i, K]``.
        tolerance: Bound on each column's norm of the residual, relative to that of b.
        max_iter: Largest number of iterations. Default: ``10 * D``.
        preconditioner: Hermitian positive definite approximation M of A⁻¹: an operator on the
            same space (the inverse of a Kronecker-factored approximation, for instance), or a
            function from flat columns ``[D, K]`` to ``[D, K]``. K falls as columns stop.
        x0: Where to start, with as many columns as b. Default: zeros.

    Returns:
        The solution in the format of b, and a :class:`~curvlinops.solvers.SolverInfo`. Columns of
        zeros in b give zeros, whatever x0 is.

    Raises:
        ValueError: If A does not map a space to itself, if shapes, dtypes or devices do not fit,
            or if ``tolerance`` or ``max_iter`` are out of range.
        TypeError: If A is no operator, or something else has a wrong type.

    Warns:
        UserWarning: With ``info.reason``, once, if any column has not converged.

    Example:
        >>> import torch
        >>> from curvlinops import DiagonalLinearOperator
        >>> from curvlinops.solvers import cg
        >>> A = DiagonalLinearOperator([torch.tensor([1.0, 2.0]), torch.tensor([4.0])])
        >>> x, info = cg(A, [torch.tensor([3.0, 8.0]), torch.tensor([4.0])])
        >>> [t.round(decimals=4) for t in x]
        [tensor([3., 4.]), tensor([1.])]
        >>> info.converged, info.iterations
        (tensor([True]), tensor([3]))

        With the inverse as preconditioner, and two right-hand sides:

        >>> x, info = cg(A, torch.ones(3, 2), preconditioner=A.inverse())
        >>> info.iterations
        tensor([1, 1])
    """
    _check_operator(A)
    tolerance = _check_tolerance(tolerance)
    max_iter = 10 * A.shape[1] if max_iter is None else _check_max_iter(max_iter)
    precondition = _as_function(preconditioner, A)
    with torch.no_grad():
        rhs, fmt = _flatten(A, b, "b")
        start = None if x0 is None else _start(A, x0, rhs)
        solution, info = _solve(A, rhs, start, precondition, tolerance, max_iter)
        x = from_columns(split_flat(solution, A.in_shape), A.in_shape, _names(A), fmt)
    if info.reason != CONVERGED:
        warn(info.reason, stacklevel=2)
    return x, info


# --------------------------------------------------------------------------------------------------
# Algorithm
# --------------------------------------------------------------------------------------------------
def _solve(
    A: PyTorchLinearOperator,
    b: Tensor,
    x0: Tensor | None,
    precondition: _Function | None,
    tolerance: float,
    max_iter: int,
) -> tuple[Tensor, SolverInfo]:
    """Run preconditioned conjugate gradients on flat columns ``[D, K]``."""
    dtype, num_columns = b.dtype, b.shape[1]
    b = widened(b)
    # Scaling by a power of two is exact, and keeps squares of small entries from underflow.
    scale = _power_of_two(b)  # [K]
    b = b / scale
    b_norms = _to_host(_inner(b, b)).sqrt()  # [K]
    threshold = max(tolerance, torch.finfo(b.dtype).eps ** 2)

    # Per column, on the host; a solver's arrays below hold the active columns only.
    reasons = [CONVERGED] * num_columns
    iterations = torch.zeros(num_columns, dtype=torch.int64)
    residuals = (b_norms > 0).double()  # [K], relative to b, of x = 0
    columns = torch.arange(num_columns)

    def stop(columns: Tensor, mask: Tensor, reason: str) -> None:
        """Note why columns stop."""
        for column in columns[mask].tolist():
            reasons[column] = reason

    not_finite = ~b_norms.isfinite()
    stop(columns, not_finite, _NOT_FINITE_B)
    residuals[not_finite] = math.inf
    x = torch.zeros_like(b)
    columns, (r,) = _keep(columns, b_norms.isfinite() & (b_norms > 0), b)
    if x0 is not None and len(columns):
        start, product = _apply(A.__matmul__, _select(widened(x0) / scale, columns), dtype)
        r = r - product
        norms = _to_host(_inner(r, r)).sqrt() / b_norms[columns]
        # an x0 that is not finite need not show in the product, for instance if A is zero there
        finite = norms.isfinite() & start.isfinite().all(dim=0).cpu()
        stop(columns, ~finite, _NOT_FINITE_START)
        columns, (r, start) = _keep(columns, finite, r, start)
        x.index_copy_(1, columns.to(x.device), start)
        residuals[columns] = norms[finite]
    columns, (r,) = _keep(columns, residuals[columns] > threshold, r)
    history = [residuals.max().item()] if num_columns else []

    p, rho, square = r, _inner(r, r), _inner(r, r)  # direction, rᴴ M r, rᴴ r
    for step in range(1, max_iter + 1):
        if not len(columns):
            break
        z = r if precondition is None else _apply(precondition, r, dtype)[1]
        previous, rho = rho, square if precondition is None else _inner(r, z)
        p = z if step == 1 else z + (rho / previous) * p
        p, q = _apply(A.__matmul__, p, dtype)
        curvature = _inner(p, q)
        alpha = rho / curvature
        r = r - alpha * q
        square = _inner(r, r)
        # the iteration's only transfer: everything that the host decides by
        numbers = _to_host(torch.stack([rho, curvature, square]))

        finite, positive = numbers.isfinite(), numbers[:2] > 0
        stop(columns, ~finite[2], _NOT_FINITE)  # or a division by a curvature of 0:
        stop(columns, ~positive[1], _INDEFINITE)
        stop(columns, ~positive[0], _INDEFINITE_PRECONDITIONER)
        stop(columns, ~finite[:2].all(0), _NOT_FINITE)
        # these columns end before the step: the product of a mask with NaN would still be NaN
        good = finite.all(0) & positive.all(0)
        columns, (p, r, rho, square, alpha) = _keep(columns, good, p, r, rho, square, alpha)
        _add_columns(x, columns, alpha * p)
        iterations[columns] = step
        residuals[columns] = numbers[2, good].sqrt() / b_norms[columns]
        if len(columns):
            history.append(residuals.max().item())
        going_on = residuals[columns] > threshold
        columns, (p, r, rho, square) = _keep(columns, going_on, p, r, rho, square)

    stop(columns, torch.ones_like(columns, dtype=torch.bool), f"max_iter = {max_iter} is reached")
    info = make_info("cg", tolerance, iterations, residuals, reasons, history)
    return (x * scale).to(dtype), info


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Return xᴴ y of each column, which is real for what conjugate gradients multiply: ``[K]``.

    Sums are cascaded, unlike in ``vector_norm`` along this axis: float32 stays accurate.
    """
    return (x.conj() * y).sum(0).real


def _add_columns(x: Tensor, columns: Tensor, update: Tensor) -> None:
    """Add an update ``[D, len(columns)]`` to some columns of x, in place."""
    if len(columns) == x.shape[1]:  # the usual case, and much faster
        x.add_(update)
    else:
        x.index_add_(1, columns.to(x.device), update)


def _to_host(numbers: Tensor) -> Tensor:
    """Copy a few numbers to the CPU, as float64 (which not every device has)."""
    return numbers.cpu().double()


def _select(matrix: Tensor, columns: Tensor) -> Tensor:
    """Return some columns of a matrix ``[D, K]`` or vector ``[K]``."""
    if len(columns) == matrix.shape[-1]:  # ascending numbers, hence all of them
        return matrix
    return matrix.index_select(-1, columns.to(matrix.device))


def _keep(columns: Tensor, mask: Tensor, *arrays: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """Drop columns from their list of numbers and from the arrays that hold them."""
    places = mask.nonzero().squeeze(1)
    return columns[places], [_select(array, places) for array in arrays]


def _apply(function: _Function, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Apply a function in a dtype; return what it was given and its result, in v's dtype.

    Rounding what is given keeps the iteration consistent: x and r move by the same direction.
    """
    if v.dtype == dtype:
        return v, function(v).to(dtype)
    scale = _power_of_two(v)  # float16 has a small range
    narrow = (v / scale).to(dtype)
    return narrow.to(v.dtype) * scale, function(narrow).to(v.dtype) * scale


def _power_of_two(v: Tensor) -> Tensor:
    """Return the power of two below each column's largest entry; 1 if that is 0 or not finite."""
    real = v.abs()
    if not real.numel():
        return real.new_ones(v.shape[1])
    largest = real.amax(0)
    power = largest.log2().floor().exp2()
    return torch.where(largest.isfinite() & (largest > 0), power, torch.ones_like(power))


# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------
def _check_operator(A: PyTorchLinearOperator) -> None:
    """Raise if A is not an operator from a space to itself."""
    if not isinstance(A, PyTorchLinearOperator):
        raise TypeError(
            f"A must be a linear operator, got {type(A).__name__}; wrap a matrix in "
            "TensorLinearOperator."
        )
    if A.in_shape != A.out_shape:
        raise ValueError(
            f"cg needs an operator from a space to itself, but {A!r} maps {describe(A.in_shape)} "
            f"to {describe(A.out_shape)}."
        )


def _check_tolerance(tolerance: float) -> float:
    """Return the tolerance as a float; raise if it is no finite number of at least 0."""
    try:
        value = float(tolerance)
    except (TypeError, ValueError) as error:
        raise TypeError(f"tolerance must be a number, got {tolerance!r}.") from error
    if not 0 <= value < math.inf:
        raise ValueError(f"tolerance must be a finite number of at least 0, got {value}.")
    return value


def _check_max_iter(max_iter: int) -> int:
    """Return the number of iterations as an int; raise if it is no integer of at least 0."""
    try:
        value = operator.index(max_iter)
    except TypeError as error:
        raise TypeError(f"max_iter must be an integer or None, got {max_iter!r}.") from error
    if value < 0:
        raise ValueError(f"max_iter must be at least 0, got {value}.")
    return value


def _as_function(preconditioner: Preconditioner | None, A: PyTorchLinearOperator) -> Any:
    """Return the preconditioner as a function of flat columns ``[D, K]``."""
    if preconditioner is None:
        return None
    if isinstance(preconditioner, PyTorchLinearOperator):
        for shape in (preconditioner.in_shape, preconditioner.out_shape):
            if shape != A.in_shape:
                raise ValueError(
                    f"Shape mismatch: the preconditioner {preconditioner!r} maps "
                    f"{describe(preconditioner.in_shape)} to "
                    f"{describe(preconditioner.out_shape)}, but {A!r} acts on "
                    f"{describe(A.in_shape)}."
                )
        check_same("a preconditioned solve", A, preconditioner)
        return preconditioner.__matmul__
    if not callable(preconditioner):
        raise TypeError(
            "The preconditioner must be a linear operator or a function of flat columns [D, K], "
            f"got {type(preconditioner).__name__}; wrap a matrix in TensorLinearOperator."
        )

    def precondition(r: Tensor) -> Tensor:
        z = preconditioner(r)
        if not isinstance(z, Tensor) or z.shape != r.shape:
            got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(
                f"The preconditioner must return a tensor of shape {list(r.shape)}, as it was "
                f"given, but returned {got}."
            )
        return z

    return precondition


def _names(A: PyTorchLinearOperator) -> list[str] | None:
    """Return the names of the tensors of A's space."""
    return A._out_names if A._in_names is None else A._in_names


def _flatten(A: PyTorchLinearOperator, v: Any, what: str) -> tuple[Tensor, Format]:
    """Return v as flat columns ``[D, K]`` of A's dtype and device, and its format."""
    columns, fmt = to_columns(v, A.in_shape, _names(A), leading=False)
    for attribute in ("dtype", "device"):
        found = {getattr(c, attribute) for c in columns}
        own = getattr(A, attribute)
        wrong = found - {own}
        if own is not None and wrong:
            raise ValueError(
                f"{attribute.capitalize()} mismatch: {A!r} has {own}, but {what} has "
                f"{', '.join(map(str, wrong))}. Convert one of them with .to(...)."
            )
        if len(found) > 1:
            raise ValueError(
                f"{attribute.capitalize()} mismatch: the tensors of {what} have "
                f"{', '.join(sorted(map(str, found)))}."
            )
    flat = concatenate(columns)
    if not (flat.is_floating_point() or flat.is_complex()):
        raise ValueError(f"{what} must be of floating-point or complex dtype, got {flat.dtype}.")
    return flat, fmt


def _start(A: PyTorchLinearOperator, x0: Any, b: Tensor) -> Tensor:
    """Return x0 as flat columns ``[D, K]`` like those of b."""
    start, _ = _flatten(A, x0, "x0")
    if start.shape != b.shape:
        raise ValueError(
            f"Shape mismatch: x0 has {start.shape[1]} columns, but b has {b.shape[1]}."
        )
    if (start.dtype, start.device) != (b.dtype, b.device):
        raise ValueError(
            f"Dtype or device mismatch: x0 has {start.dtype} on {start.device}, but b has "
            f"{b.dtype} on {b.device}."
        )
    return start
