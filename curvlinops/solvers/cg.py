"""Conjugate gradients for several right-hand sides at once."""

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
    inner,
    to_host,
)
from curvlinops.solvers._info import SolverInfo, warn_of

_INDEFINITE = (
    "A is not positive definite, a search direction p has pᴴ A p <= 0; add a multiple of the "
    "identity to A"
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
    check_square("cg", A)
    tolerance = as_bound("tolerance", tolerance)
    max_iter = as_max_iter(max_iter, default=10 * A.shape[1])
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
    """Run preconditioned conjugate gradients on flat columns ``[D, K]``, without a warning."""
    columns = Columns(b, A.shape[1])
    r = columns.start(A, x0, tolerance)
    p, rho, square = r, inner(r, r), inner(r, r)  # direction, rᴴ M r, rᴴ r
    for step in range(1, max_iter + 1):
        if not len(columns.active):
            break
        z = r if precondition is None else apply(precondition, r, columns.dtype)[1]
        previous, rho = rho, square if precondition is None else inner(r, z)
        p = z if step == 1 else z + (rho / previous) * p
        p, q = apply(A.__matmul__, p, columns.dtype)
        curvature = inner(p, q)
        alpha = rho / curvature
        r = r - alpha * q
        square = inner(r, r)
        # the iteration's only transfer: everything that the host decides by
        numbers = to_host(torch.stack([rho, curvature, square]))

        finite, positive = numbers.isfinite(), numbers[:2] > 0
        columns.stop(~finite[2], NOT_FINITE)  # or a division by a curvature of 0:
        columns.stop(~positive[1], _INDEFINITE)
        columns.stop(~positive[0], INDEFINITE_PRECONDITIONER)
        columns.stop(~finite[:2].all(0), NOT_FINITE)
        # these columns end before the step: the product of a mask with NaN would still be NaN
        good = finite.all(0) & positive.all(0)
        going_on = columns.advance(good, alpha * p, numbers[2].sqrt())
        p, r, rho, square = columns.keep(going_on, p, r, rho, square)
    columns.close(max_iter)
    return columns.finish("cg", f"the tolerance {tolerance:g}")
