"""Minimal residuals, for Hermitian systems that need not be definite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlinops._formats import from_columns, split_flat
from curvlinops._operator import PyTorchLinearOperator
from curvlinops.solvers._arguments import (
    Function,
    Preconditioner,
    as_bound,
    as_function,
    as_max_iter,
    check_square,
    flatten,
    flatten_start,
    names_of,
)
from curvlinops.solvers._columns import (
    INDEFINITE_PRECONDITIONER,
    NOT_FINITE,
    Columns,
    apply,
    divided,
    inner,
    like,
    to_host,
)
from curvlinops.solvers._info import SolverInfo, warn_of

_LEAST_SQUARES = (
    "A is singular to rounding, and b not in its range; x is about a least-squares solution "
    "(curvlinops.lsmr finds the shortest one)"
)
_NORM = -1  # the place of ‖A‖, estimated from below, among the numbers of the rotations


def minres(
    A: PyTorchLinearOperator,
    b: Any,
    *,
    tolerance: float = 1e-5,
    max_iter: int | None = None,
    preconditioner: Preconditioner | None = None,
    x0: Any = None,
) -> tuple[Any, SolverInfo]:
    r"""Solve :math:`A x = b` for a Hermitian A that may be indefinite or singular, by MINRES.

    After k steps, :math:`x_k` minimises the residual :math:`\lVert b - A x \rVert_M`, where
    :math:`\lVert r \rVert_M^2 = r^H M r` (the Euclidean norm without a preconditioner M), over
    :math:`x_0 + \operatorname{span}\{M r_0, (M A) M r_0, \dots, (M A)^{k-1} M r_0\}` with
    :math:`r_0 = b - A x_0`. The method is that of

    - Paige, C. C., & Saunders, M. A. (1975). Solution of sparse indefinite systems of linear
      equations. SIAM Journal on Numerical Analysis, 12(4), 617-629.

    For a positive definite A, :func:`~curvlinops.cg` needs about as many iterations and less
    memory. For :math:`A - \sigma I`, pass ``A - sigma * A**0``.

    Each column of b is a system with its own steps. All columns that are still iterated share one
    product with A per iteration, and there is one more product if ``x0`` is given. A column stops
    for good once :math:`\lVert r \rVert \le \text{tolerance} \cdot \lVert b \rVert` in the
    Euclidean norm, also with a preconditioner. (SciPy's ``minres`` compares with
    :math:`\lVert A \rVert \lVert x \rVert` instead, and may stop earlier or later.) Here r is the
    residual that the iteration updates. It drifts from :math:`b - A x` by rounding, by up to the
    dtype's precision times the square of the condition number. Where this could be more than the
    tolerance, one more product verifies the columns that converged: ``info`` has their true
    residuals then, and those above the tolerance have not converged.

    If b is not in the range of a singular A, no x has a residual of zero. Such a column stops
    where a further step would move x along a null vector of A, to rounding: where the condition
    number seems to exceed :math:`10 / \sqrt{\varepsilon}` (7e8 in float64, 3e4 in float32). Its x
    then minimises :math:`\lVert b - A x \rVert_M`, but it has not converged. A column also stops,
    with the last iterate, where the preconditioner turns out not to be positive definite, or
    numbers overflow. This is no error: ``info`` tells, and one warning.

    bfloat16 and float16 operators multiply in their own dtype, but the iteration is in float32.
    Gradients are not recorded.

    Args:
        A: Hermitian operator from a space of tensors to itself, of dimension D.
        b: Right-hand side, in any format that A multiplies: one tensor ``[D]``, a list, tuple or
            dict of tensors ``[*N_i]``; or K of them, ``[D, K]`` or tensors ``[*N_i, K]``.
        tolerance: Bound on each column's norm of the residual, relative to that of b.
        max_iter: Largest number of iterations. Default: ``5 * D``.
        preconditioner: Hermitian positive definite approximation M of the inverse of
            :math:`\lvert A \rvert`: an operator on the same space, or a function from flat columns
            ``[D, K]`` to ``[D, K]``. K falls as columns stop.
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
        >>> from curvlinops import DiagonalLinearOperator, minres
        >>> A = DiagonalLinearOperator([torch.tensor([1.0, -2.0]), torch.tensor([4.0])])
        >>> x, info = minres(A, [torch.tensor([3.0, 8.0]), torch.tensor([4.0])])
        >>> [t.round(decimals=4) for t in x]
        [tensor([ 3., -4.]), tensor([1.])]
        >>> info.converged, info.iterations
        (tensor([True]), tensor([3]))
    """
    check_square("minres", A)
    tolerance = as_bound("tolerance", tolerance)
    max_iter = as_max_iter(max_iter, default=5 * A.shape[1])
    precondition = as_function(preconditioner, A)
    names = names_of(A)
    with torch.no_grad():
        rhs, fmt = flatten(A, b, "b", A.in_shape, names)
        start = flatten_start(A, x0, rhs)
        solution, info = solve(A, rhs, start, precondition, tolerance, max_iter)
        x = from_columns(split_flat(solution, A.in_shape), A.in_shape, names, fmt)
    warn_of(info, stacklevel=2)
    return x, info


def solve(
    A: PyTorchLinearOperator,
    b: Tensor,
    x0: Tensor | None,
    precondition: Function | None,
    tolerance: float,
    max_iter: int,
) -> tuple[Tensor, SolverInfo]:
    """Run preconditioned MINRES on flat columns ``[D, K]``, without a warning.

    Vectors v with vᴴ M v = 1, and z = M v, make A tridiagonal: A z = β v₋ + α v + β₊ v₊. The
    directions w = M u have A w of norm 1; the condition number is at least ‖A‖ ‖w‖.
    """
    columns = Columns(b, A.shape[1])
    rounding = torch.finfo(columns.x.dtype).eps
    normal_residuals = torch.zeros_like(columns.residuals)
    conditions = torch.zeros_like(columns.residuals)
    r = columns.start(A, x0, tolerance)
    y = _multiply(precondition, r, columns.dtype)
    square = inner(r, y)
    numbers = to_host(square)
    columns.stop(~(numbers > 0), INDEFINITE_PRECONDITIONER)
    columns.stop(~numbers.isfinite(), NOT_FINITE)
    good = numbers.isfinite() & (numbers > 0)
    r, y, square, unit = columns.keep(good, r, y, square, torch.ones_like(square))
    v, z, beta = r / square.sqrt(), y / square.sqrt(), torch.zeros_like(square)
    v_old = w = w_old = u = u_old = torch.zeros_like(v)
    scalars = _start(numbers[good].sqrt())

    for step in range(1, max_iter + 1):
        if not len(columns.active):
            break
        z, q = apply(A.__matmul__, z, columns.dtype)
        if step == 1:
            unit = columns.set_unit(q)
        q = q / unit
        p = q - beta * v_old
        alpha = inner(z, p)
        p = p - alpha * v  # β₊ v₊
        y = _multiply(precondition, p, columns.dtype)
        square = inner(p, y)
        beta = square.clamp(min=0).sqrt()
        numbers = to_host(torch.stack([alpha, square, inner(p, p), inner(q, q)]))
        scalars, steps, normal = _rotate(scalars, numbers[0], numbers[1].clamp(min=0).sqrt())
        gamma, delta, epsilon, phi, square_s, phi_c = like(steps, r)
        w, w_old = divided(z - epsilon * w_old - delta * w, gamma), w
        if precondition is None:
            u, u_old = w, w_old
        else:
            u, u_old = divided(v - epsilon * u_old - delta * u, gamma), u
        v, v_old, z = divided(p, beta), v, divided(y, beta)
        r = square_s * r - phi_c * v
        squares = to_host(torch.stack([inner(w, u), inner(r, r)]))

        condition = scalars[_NORM] * squares[0].abs().sqrt()
        # a step along a null vector, which changes x a lot and A x no more; gamma = 0 is one, too
        regular = (steps[0] > 0) & (condition <= 10 / rounding**0.5)
        # whatever norm M gives to a p of rounding errors, which ends the recurrence
        positive = (numbers[1] > 0) | (numbers[2] <= rounding**2 * numbers[3])
        finite = numbers.isfinite().all(0)
        columns.stop(~regular, _LEAST_SQUARES)
        columns.stop(~positive, INDEFINITE_PRECONDITIONER)
        columns.stop(~finite, NOT_FINITE)
        good = finite & positive & regular  # the others end before the step
        normal_residuals[columns.active] = normal
        known = conditions[columns.active]
        conditions[columns.active] = torch.where(good, known.maximum(condition), known)
        going_on = columns.advance(good, phi * w, squares[1].sqrt())
        arrays = (z, v, v_old, w, w_old, u, u_old, r, beta, unit, scalars)
        z, v, v_old, w, w_old, u, u_old, r, beta, unit, scalars = columns.keep(going_on, *arrays)
    columns.close(max_iter)
    drifting = (rounding * conditions**2 > max(tolerance, rounding)).nonzero().squeeze(1)
    columns.verify(A, b, drifting)
    return columns.finish("minres", f"the tolerance {tolerance:g}", normal_residuals)


def _multiply(precondition: Function | None, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Return M v; without a preconditioner, or without columns, v itself."""
    return v if precondition is None or not v.shape[1] else apply(precondition, v, dtype)[1]


def _start(norm: Tensor) -> Tensor:
    """Return the numbers that rotations start from, given the norm of r ``[K]``: ``[7, K]``."""
    zero = torch.zeros_like(norm)
    return torch.stack([zero - 1, zero, zero, zero, norm, zero, zero])


def _rotate(scalars: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring one more column of the tridiagonal matrix to the triangle, by a plane rotation.

    Args:
        scalars: Those of the call before, ``[7, K]``.
        alpha: The diagonal entry ``[K]``.
        beta: The entry below.

    Returns:
        Numbers for the next call, those of the step, and ‖A r‖ / (‖A‖ ‖r‖) before the step.
    """
    c, s, delta_bar, epsilon, phi_bar, beta_old, norm = scalars
    delta, gamma_bar = c * delta_bar + s * alpha, s * delta_bar - c * alpha
    epsilon_next, delta_bar = s * beta, -c * beta
    norm = norm.maximum(torch.stack([beta_old, alpha, beta]).norm(dim=0))
    normal = divided(torch.hypot(gamma_bar, delta_bar), norm)
    gamma = torch.hypot(gamma_bar, beta)
    c, s = divided(gamma_bar, gamma), divided(beta, gamma)
    phi, phi_bar = c * phi_bar, s * phi_bar
    state = torch.stack([c, s, delta_bar, epsilon_next, phi_bar, beta, norm])
    return state, torch.stack([gamma, delta, epsilon, phi, s**2, phi_bar * c]), normal
