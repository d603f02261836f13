"""Estimators of the trace."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.estimators._sampling import (
    Distribution,
    Matrix,
    Mean,
    Result,
    Sampler,
    as_operator,
    check_square,
    estimator,
    inner,
    sample_mean,
    split_products,
)
from curvlinops.estimators._sketch import leave_one_out, range_basis

_EXACT = "A.trace()"


@estimator
def hutchinson_trace(
    A: Matrix,
    num_matvecs: int,
    distribution: Distribution = "rademacher",
    *,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    return_standard_error: bool = False,
) -> Result:
    r"""Estimate the trace of a square matrix by Hutchinson's method.

    .. math::
        \operatorname{tr}(A) = \mathbb{E}[v^H A v]
        \approx \frac{1}{m} \sum_{k=1}^m v_k^H A v_k, \qquad \mathbb{E}[v v^H] = I

    The estimate is unbiased. For a real symmetric matrix its variance is
    :math:`\frac{2}{m} (\lVert A \rVert_F^2 - \sum_i a_{ii}^2)` with signs, and
    :math:`\frac{2}{m} \lVert A \rVert_F^2` with normal vectors. The method is that of

    - Hutchinson, M. F. (1989). A stochastic estimator of the trace of the influence matrix for
      Laplacian smoothing splines. Communications in Statistics - Simulation and Computation.

    What follows holds for all estimators. The vectors of complex matrices are real signs, or
    circular complex normal vectors. They are drawn one after another: the result does not depend
    on ``chunk_size``, and with a larger ``num_matvecs`` come further vectors. bfloat16 and float16
    operators multiply in their own dtype; sums and decompositions are in float32. Gradients are
    recorded inside of :func:`~curvlinops.record_gradients` only.

    Args:
        A: Square operator on any space, or a matrix (tensor ``[D, D]``). It need not be Hermitian.
        num_matvecs: The number m of products with single vectors, smaller than D.
        distribution: ``"rademacher"``, vectors of independent signs, or ``"normal"``.
        generator: Random numbers, on the device of A. Default: PyTorch's global generator of that
            device.
        chunk_size: How many vectors to multiply at once. Default: all. No more than that many
            vectors and products are held.
        return_standard_error: Whether to return the standard error of the mean, too: the standard
            deviation of the m independent samples, divided by :math:`\sqrt{m}`.

    Returns:
        The estimate, a number (tensor ``[]``) in the dtype and on the device of A. On request a
        pair of it and of its standard error, which is real.

    Raises:
        ValueError: If A is not square, if ``num_matvecs`` is not between 1 and D - 1 (or is 1 and
            a standard error is wanted), for an unknown distribution or a wrong ``chunk_size``, and
            if the generator is on another device.
        TypeError: If A is neither operator nor tensor, or a number is no integer.

    Example:
        >>> import torch
        >>> from curvlinops import hutchinson_trace
        >>> A = torch.ones(50, 50) + torch.diag(torch.arange(50.0))  # trace 1275
        >>> generator = torch.Generator().manual_seed(0)
        >>> trace, error = hutchinson_trace(
        ...     A, num_matvecs=30, generator=generator, return_standard_error=True
        ... )
        >>> bool((trace - 1275).abs() < 3 * error)
        True
    """
    op = as_operator(A)
    check_square(op, "trace")
    num = split_products(
        op, num_matvecs, return_standard_error, name="hutchinson_trace", parts=1, exact=_EXACT
    )
    sampler = Sampler(op, distribution, generator, chunk_size)
    return sample_mean(op, sampler, num, inner).result(op.dtype, return_standard_error)


@estimator
def hutchpp_trace(
    A: Matrix,
    num_matvecs: int,
    distribution: Distribution = "rademacher",
    *,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    return_standard_error: bool = False,
) -> Result:
    r"""Estimate the trace of a square matrix by Hutch++.

    A third of the products finds a basis Q of the approximate range of A, from :math:`A S` with
    random vectors S. The trace on it is exact, and Hutchinson's method estimates the rest, which
    is small if the singular values decay:

    .. math::
        \operatorname{tr}(A) \approx \operatorname{tr}(Q^H A Q)
        + \frac{3}{m} \sum_{k=1}^{m/3} v_k^H (I - Q Q^H) A (I - Q Q^H) v_k

    The estimate is unbiased, and exact if the rank of A is at most m/3 (for almost all S). For a
    positive semi-definite A, its relative error is of order 1/m, that of Hutchinson's method of
    order :math:`1/\sqrt{m}`. The method is that of

    - Meyer, R. A., Musco, C., Musco, C., & Woodruff, D. P. (2021). Hutch++: Optimal stochastic
      trace estimation. Symposium on Simplicity in Algorithms.

    Args:
        A: Square operator or matrix ``[D, D]``, see :func:`~curvlinops.hutchinson_trace`.
        num_matvecs: The number m of products with single vectors, divisible by 3 and smaller
            than D.
        distribution: ``"rademacher"`` or ``"normal"``.
        generator: Random numbers, on the device of A. Default: PyTorch's global ones.
        chunk_size: How many vectors to multiply at once. Default: all. Besides, m vectors are held.
        return_standard_error: Whether to return the standard error, too: that of the mean of the
            m/3 samples of the second term. The first one has no error given Q.

    Returns:
        The estimate, a number (tensor ``[]``) in the dtype and on the device of A. On request a
        pair of it and of its standard error.

    Raises:
        ValueError: If ``num_matvecs`` is not divisible by 3 (or is 3 and a standard error is
            wanted), and as :func:`~curvlinops.hutchinson_trace`.
        TypeError: As :func:`~curvlinops.hutchinson_trace`.

    Example:
        >>> import torch
        >>> from curvlinops import hutchpp_trace
        >>> A = torch.outer(torch.arange(50.0), torch.arange(50.0))  # of rank 1
        >>> hutchpp_trace(A, num_matvecs=6).round()
        tensor(40425.)
        >>> A.trace()
        tensor(40425.)
    """
    op = as_operator(A)
    check_square(op, "trace")
    num = split_products(
        op, num_matvecs, return_standard_error, name="hutchpp_trace", parts=3, exact=_EXACT
    )
    sampler = Sampler(op, distribution, generator, chunk_size)
    Q = range_basis(sampler.multiply(op, sampler.draw(num)))  # [D, m/3]
    Q = sampler.rounded(Q)  # what is multiplied
    on_range = inner(Q, sampler.multiply(op, Q)).sum()
    V = sampler.draw(num).to(Q.dtype)
    with torch.autocast(V.device.type, enabled=False):
        X = V - Q @ (Q.mH @ V)
    mean = Mean()
    mean.update(inner(X, sampler.multiply(op, X)))
    return mean.result(op.dtype, return_standard_error, offset=on_range)


@estimator
def xtrace(
    A: Matrix,
    num_matvecs: int,
    distribution: Distribution = "rademacher",
    *,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    return_standard_error: bool = False,
) -> Result:
    r"""Estimate the trace of a square matrix by XTrace.

    Hutch++ with every vector used for both purposes: :math:`P_i` projects onto the range of
    :math:`A V` without its i-th column, and what it leaves is estimated with the i-th vector:

    .. math::
        \operatorname{tr}(A) \approx \frac{2}{m} \sum_{i=1}^{m/2} t_i, \qquad
        t_i = \operatorname{tr}(P_i A P_i) + v_i^H (I - P_i) A (I - P_i) v_i

    All the :math:`P_i` come from one decomposition. The estimate is unbiased, and exact if the
    rank of A is less than m/2 (for almost all V). It is usually more accurate than Hutch++ with as
    many products. The method is that of

    - Epperly, E. N., Tropp, J. A., & Webber, R. J. (2024). XTrace: Making the most of every
      sample in stochastic trace estimation. SIAM Journal on Matrix Analysis and Applications.

    Args:
        A: Square operator or matrix ``[D, D]``, see :func:`~curvlinops.hutchinson_trace`.
        num_matvecs: The number m of products with single vectors, even and smaller than D.
        distribution: ``"rademacher"`` or ``"normal"``.
        generator: Random numbers, on the device of A. Default: PyTorch's global ones.
        chunk_size: How many vectors to multiply at once. Default: all. Besides, some multiples of
            m vectors are held.
        return_standard_error: Whether to return the authors' estimate of the error, too: the
            standard deviation of the :math:`t_i`, divided by :math:`\sqrt{m/2}`. As they share
            vectors, they are not independent: it tells the size of the error, but tends to be too
            small, by factors of up to 1.6 in experiments.

    Returns:
        The estimate, a number (tensor ``[]``) in the dtype and on the device of A. On request a
        pair of it and of the estimate of its error.

    Raises:
        ValueError: If ``num_matvecs`` is odd (or is 2 and a standard error is wanted), and as
            :func:`~curvlinops.hutchinson_trace`.
        TypeError: As :func:`~curvlinops.hutchinson_trace`.

    Example:
        >>> import torch
        >>> from curvlinops import xtrace
        >>> A = torch.diag(1 / torch.arange(1.0, 501) ** 2)
        >>> trace, error = xtrace(A, num_matvecs=40, return_standard_error=True)
        >>> bool((trace - A.trace()).abs() < 0.02), bool(error < 0.02)
        (True, True)
    """
    op = as_operator(A)
    check_square(op, "trace")
    num = split_products(
        op, num_matvecs, return_standard_error, name="xtrace", parts=2, exact=_EXACT
    )
    sampler = Sampler(op, distribution, generator, chunk_size)
    V = sampler.draw(num)  # [D, k]
    Y = sampler.multiply(op, V)
    U, S = leave_one_out(Y)  # [D, k], [k, k]
    U = sampler.rounded(U)  # what is multiplied
    mean = Mean()
    mean.update(_leave_one_out_traces(V.to(Y.dtype), Y, U, sampler.multiply(op, U), S))
    return mean.result(op.dtype, return_standard_error)


def _leave_one_out_traces(V: Tensor, Y: Tensor, U: Tensor, Z: Tensor, S: Tensor) -> Tensor:
    """Return XTrace's samples ``[k]`` from V, Y = A V, U, Z = A U ``[D, k]`` and S ``[k, k]``."""
    with torch.autocast(V.device.type, enabled=False):
        H = U.mH @ Z  # [k, k]
        traces = H.diagonal().sum() - inner(S, H @ S)  # of P_i A P_i
        W = U.mH @ V
        W = W - S * inner(S, W)  # P_i v_i = U w_i
        return traces + inner(V - U @ W, Y - Z @ W)
