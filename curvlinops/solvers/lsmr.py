"""Least squares, for rectangular and singular systems."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from curvlinops._formats import from_columns, split_flat
from curvlinops._operator import PyTorchLinearOperator
from curvlinops.solvers._arguments import as_bound, as_max_iter, check_operator, flatten
from curvlinops.solvers._columns import (
    NOT_FINITE,
    Columns,
    apply,
    divided,
    inner,
    like,
    select,
    to_host,
)
from curvlinops.solvers._info import CONVERGED, SolverInfo, warn_of

_LEAST_SQUARES = "converged to a least-squares solution"
_ILL_CONDITIONED = "the condition number of A exceeds the inverse of its dtype's precision"


def lsmr(
    A: PyTorchLinearOperator,
    b: Any,
    *,
    atol: float = 1e-6,
    btol: float = 1e-6,
    max_iter: int | None = None,
    damp: float = 0.0,
) -> tuple[Any, SolverInfo]:
    r"""Minimise :math:`\lVert b - A x \rVert^2 + \text{damp}^2 \lVert x \rVert^2` by LSMR.

    A may be of any shape and rank. Of all minimisers, x is the shortest one. After k steps,
    :math:`x_k` minimises :math:`\lVert A^H (b - A x) - \text{damp}^2 x \rVert` over
    :math:`\operatorname{span}\{A^H b, (A^H A) A^H b, \dots, (A^H A)^{k-1} A^H b\}`, as MINRES does
    on the normal equations, but without their rounding errors. The method is that of

    - Fong, D. C.-L., & Saunders, M. (2011). LSMR: an iterative algorithm for sparse least-squares
      problems. SIAM Journal on Scientific Computing, 33(5), 2950-2971.

    Each column of b is a system with its own steps. All columns that are still iterated share one
    product with A and one with its adjoint per iteration; there is one more with the adjoint at
    the start. With :math:`r = b - A x` (of the extended system where ``damp`` is not 0) and
    estimates of the norms, a column stops for good, as in SciPy's ``lsmr`` with ``conlim=0``, once

    - :math:`\lVert r \rVert \le \text{btol} \lVert b \rVert + \text{atol} \lVert A \rVert
      \lVert x \rVert`: it solves :math:`A x = b`; or
    - :math:`\lVert A^H r \rVert \le \text{atol} \lVert A \rVert \lVert r \rVert`: x is a
      least-squares solution; or
    - it can do no better in its precision.

    ``info.reasons`` tells which of these. All of them count as converged, except for a condition
    number beyond the precision. Running out of iterations and overflow are no errors: ``info``
    tells, and one warning.

    bfloat16 and float16 operators multiply in their own dtype, but the iteration is in float32.
    Gradients are not recorded.

    Args:
        A: Operator of any shape, that has an adjoint.
        b: Right-hand side in A's output space, in any format that operators multiply: one tensor
            ``[M]``, a list, tuple or dict of tensors ``[*M_i]``; or K of them, ``[M, K]`` or
            tensors ``[*M_i, K]``.
        atol: Relative precision of A to solve for.
        btol: Relative precision of b to solve for.
        max_iter: Largest number of iterations. Default: ten times the smaller side of A.
        damp: Weight of the norm of x.

    Returns:
        The solution in the format of b (a list for a dict, where A's input space has no names),
        and a :class:`~curvlinops.solvers.SolverInfo`, whose ``residual_norms`` and
        ``normal_residual_norms`` are the estimates above, relative to
        :math:`\lVert b \rVert` and :math:`\lVert A \rVert \lVert r \rVert`.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or if an argument is out of range.
        TypeError: If A is no operator, or something else has a wrong type.
        NotImplementedError: If A does not implement its adjoint.

    Warns:
        UserWarning: With ``info.reason``, once, if any column has not converged.

    Example:
        >>> import torch
        >>> from curvlinops import TensorLinearOperator, lsmr
        >>> A = TensorLinearOperator(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]))
        >>> x, info = lsmr(A, torch.tensor([6.0, 0.0, 0.0]))  # a regression line
        >>> x.round(decimals=4)
        tensor([ 5., -3.])
        >>> info.reasons, info.iterations
        (['converged to a least-squares solution'], tensor([2]))
    """
    check_operator(A)
    atol, btol, damp = as_bound("atol", atol), as_bound("btol", btol), as_bound("damp", damp)
    max_iter = as_max_iter(max_iter, default=10 * min(A.shape))
    with torch.no_grad():
        rhs, fmt = flatten(A, b, "b", A.out_shape, A._out_names)
        solution, info = solve(A, A.adjoint(), rhs, atol, btol, damp, max_iter)
        x = from_columns(split_flat(solution, A.in_shape), A.in_shape, A._in_names, fmt)
    warn_of(info, stacklevel=2)
    return x, info


def solve(
    A: PyTorchLinearOperator,
    adjoint: PyTorchLinearOperator,
    b: Tensor,
    atol: float,
    btol: float,
    damp: float,
    max_iter: int,
) -> tuple[Tensor, SolverInfo]:
    """Run LSMR on flat columns ``[M, K]``, without a warning.

    Orthonormal vectors u and v make A bidiagonal: A v = α u + β₊ u₊, and Aᴴ u = β v₋ + α v.
    """
    columns = Columns(b, A.shape[1])
    columns.begin()
    rounding = torch.finfo(columns.x.dtype).eps
    normal_residuals = torch.zeros_like(columns.residuals)
    beta = inner(columns.b, columns.b).sqrt()
    u, v = apply(adjoint.__matmul__, columns.b / beta, columns.dtype)
    unit = columns.set_unit(v)  # squares of tiny products would underflow
    v = v / unit
    alpha = inner(v, v).sqrt()
    alpha_host, beta_host = to_host(torch.stack([alpha, beta]))
    columns.stop(alpha_host == 0, _LEAST_SQUARES, converged=True)
    columns.stop(~alpha_host.isfinite(), NOT_FINITE)
    good = alpha_host.isfinite() & (alpha_host > 0)
    scalars = _start(alpha_host, beta_host)
    u, v, unit, alpha, scalars = columns.keep(good, u, v, unit, alpha, scalars)
    v = v / alpha
    h, h_bar, ratio = torch.zeros_like(v), torch.zeros_like(v), torch.zeros_like(alpha)

    for step in range(1, max_iter + 1):
        if not len(columns.active):
            break
        v, p = apply(A.__matmul__, v, columns.dtype)
        h = v - ratio * h
        p = p / unit - alpha * u
        beta = inner(p, p).sqrt()
        u, q = apply(adjoint.__matmul__, divided(p, beta), columns.dtype)
        q = q / unit - beta * v
        alpha = inner(q, q).sqrt()
        v = divided(q, alpha)
        alpha_host, beta_host, units = to_host(torch.stack([alpha, beta, unit]))
        scalars, steps, estimates = _rotate(scalars, alpha_host, beta_host, damp / units, step)
        ratio_bar, size, ratio = like(steps, v)
        h_bar = h - ratio_bar * h_bar

        finite = (alpha_host + beta_host).isfinite() & steps.isfinite().all(0)
        columns.stop(~finite, NOT_FINITE)
        columns.advance(finite, size * h_bar, estimates[0])
        arrays = (u, v, h, h_bar, unit, alpha, ratio, scalars, estimates)
        u, v, h, h_bar, unit, alpha, ratio, scalars, estimates = columns.keep(finite, *arrays)

        residual, normal, norm, inverse_condition = estimates
        x = select(columns.x, columns.active)
        b_norm = columns.b_norms[columns.active]
        size_of_b = norm * to_host(inner(x, x)).sqrt() / b_norm  # ‖A‖ ‖x‖ / ‖b‖
        residual = residual / b_norm
        normal_residuals[columns.active] = normal
        ill_conditioned = inverse_condition <= rounding / 2
        squares = normal <= max(atol, rounding / 2)
        compatible = (residual <= btol + atol * size_of_b) | (
            residual <= rounding / 2 * (1 + size_of_b)
        )
        columns.stop(ill_conditioned, _ILL_CONDITIONED)
        columns.stop(squares, _LEAST_SQUARES, converged=True)
        columns.stop(compatible, CONVERGED, converged=True)
        going_on = ~(ill_conditioned | squares | compatible)
        u, v, h, h_bar, unit, alpha, ratio, scalars = columns.keep(
            going_on, u, v, h, h_bar, unit, alpha, ratio, scalars
        )
    columns.close(max_iter)
    return columns.finish("lsmr", f"atol={atol:g} or btol={btol:g}", normal_residuals)


def _start(alpha: Tensor, beta: Tensor) -> Tensor:
    """Return the numbers that rotations start from ``[16, K]``."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    triangle = [alpha, alpha * beta, one, one, one, zero]
    residual = [beta, zero, one, zero, zero, zero, zero]
    return torch.stack([*triangle, *residual, alpha**2, zero, zero + math.inf])


def _rotate(
    scalars: Tensor, alpha: Tensor, beta: Tensor, damp: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate one more column of the bidiagonal matrix B, and then of Rᵀ with B = Q R, to triangles.

    The names are those of Fong and Saunders (2011), sections 2.2 to 2.8 and 3; d for a dot.

    Returns:
        Numbers for the next call; those of the step, and estimates of ‖r‖, ‖Aᴴr‖ / (‖A‖ ‖r‖), ‖A‖
        and the inverse condition number.
    """
    alpha_bar, zeta_bar, rho_old, rho_bar_old, c_bar, s_bar, *rest = scalars
    beta_dd, beta_d, rho_d, tau_tilde, theta_tilde_old, zeta_old, d, square, largest, least = rest

    c_hat, s_hat, alpha_hat = _rotation(alpha_bar, damp)
    c, s, rho = _rotation(alpha_hat, beta)
    theta, alpha_bar = s * alpha, c * alpha
    theta_bar, rho_temp = s_bar * rho, c_bar * rho
    c_bar, s_bar, rho_bar = _rotation(rho_temp, theta)
    zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
    steps = torch.stack(
        [theta_bar * rho / (rho_old * rho_bar_old), zeta / (rho * rho_bar), theta / rho]
    )

    beta_acute, beta_check = c_hat * beta_dd, -s_hat * beta_dd
    beta_hat, beta_dd = c * beta_acute, -s * beta_acute
    c_tilde, s_tilde, rho_tilde = _rotation(rho_d, theta_bar)
    theta_tilde, rho_d = s_tilde * rho_bar, c_tilde * rho_bar
    beta_d = -s_tilde * beta_d + c_tilde * beta_hat
    tau_tilde = (zeta_old - theta_tilde_old * tau_tilde) / rho_tilde
    tau_d = (zeta - theta_tilde * tau_tilde) / rho_d
    d = d + beta_check**2
    residual = (d + (beta_d - tau_d) ** 2 + beta_dd**2).sqrt()

    norm = (square + beta**2).sqrt()
    if step > 1:
        largest, least = largest.maximum(rho_bar_old), least.minimum(rho_bar_old)
    inverse_condition = least.minimum(rho_temp) / largest.maximum(rho_temp)
    normal = zeta_bar.abs() / (norm * residual)
    triangle = [alpha_bar, zeta_bar, rho, rho_bar, c_bar, s_bar]
    numbers = [beta_dd, beta_d, rho_d, tau_tilde, theta_tilde, zeta, d]
    state = torch.stack([*triangle, *numbers, norm**2 + alpha**2, largest, least])
    return state, steps, torch.stack([residual, normal, norm, inverse_condition])


def _rotation(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return cosine, sine and r of the plane rotation that turns (a, b) to (r, 0)."""
    r = torch.hypot(a, b)
    return divided(a, r), divided(b, r), r
