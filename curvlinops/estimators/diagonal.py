"""Estimators of the diagonal."""

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
from curvlinops.estimators._sketch import leave_one_out

_EXACT = "A.diagonal()"


@estimator
def hutchinson_diag(
    A: Matrix,
    num_matvecs: int,
    distribution: Distribution = "rademacher",
    *,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    return_standard_error: bool = False,
) -> Result:
    r"""Estimate the diagonal of a square matrix by Hutchinson's method.

    .. math::
        \operatorname{diag}(A) = \mathbb{E}[\bar v \odot A v]
        \approx \frac{1}{m} \sum_{k=1}^m \bar v_k \odot A v_k, \qquad \mathbb{E}[v v^H] = I

    The estimate is unbiased. With signs, the variance of the i-th entry of a real matrix is
    :math:`\frac{1}{m} \sum_{j \ne i} a_{ij}^2`, and diagonal matrices are exact; normal vectors
    add :math:`\frac{2}{m} a_{ii}^2`. The method is that of

    - Bekas, C., Kokiopoulou, E., & Saad, Y. (2007). An estimator for the diagonal of a matrix.
      Applied Numerical Mathematics.

    They divide by the mean of :math:`\bar v_k \odot v_k`, which is 1 for signs. Normal vectors are
    not divided by it: the quotient of a single one has no mean, and that of two no variance.

    Args:
        A: Square operator or matrix ``[D, D]``, see :func:`~curvlinops.hutchinson_trace`.
        num_matvecs: The number m of products with single vectors, smaller than D.
        distribution: ``"rademacher"`` or ``"normal"``.
        generator: Random numbers, on the device of A. Default: PyTorch's global ones.
        chunk_size: How many vectors to multiply at once. Default: all. No more than that many
            vectors and products are held.
        return_standard_error: Whether to return the standard error of each entry's mean, too.

    Returns:
        The estimate ``[D]``, of the flattened space, in the dtype and on the device of A. On
        request a pair of it and of its standard errors ``[D]``, which are real.

    Raises:
        ValueError: As :func:`~curvlinops.hutchinson_trace`.
        TypeError: As :func:`~curvlinops.hutchinson_trace`.

    Example:
        >>> import torch
        >>> from curvlinops import DiagonalLinearOperator, hutchinson_diag
        >>> hutchinson_diag(DiagonalLinearOperator([torch.arange(4.0)]), num_matvecs=2)
        tensor([0., 1., 2., 3.])
    """
    op = as_operator(A)
    check_square(op, "diagonal")
    num = split_products(
        op, num_matvecs, return_standard_error, name="hutchinson_diag", parts=1, exact=_EXACT
    )
    sampler = Sampler(op, distribution, generator, chunk_size)
    mean = sample_mean(op, sampler, num, lambda V, AV: V.conj() * AV)
    return mean.result(op.dtype, return_standard_error)


@estimator
def xdiag(
    A: Matrix,
    num_matvecs: int,
    distribution: Distribution = "rademacher",
    *,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    return_standard_error: bool = False,
) -> Result:
    r"""Estimate the diagonal of a square matrix by XDiag.

    As in :func:`~curvlinops.xtrace`, :math:`P_i` projects onto the range of :math:`A V` without
    its i-th column. The diagonal of :math:`P_i A` is computed, that of the rest estimated with the
    i-th vector:

    .. math::
        \operatorname{diag}(A) \approx \frac{2}{m} \sum_{i=1}^{m/2} d_i, \qquad
        d_i = \operatorname{diag}(P_i A) + \bar v_i \odot (I - P_i) A v_i

    The estimate is unbiased, and exact if the rank of A is less than m/2 (for almost all V). Half
    of the products are with :math:`A^H`. The method is that of

    - Epperly, E. N., Tropp, J. A., & Webber, R. J. (2024). XTrace: Making the most of every
      sample in stochastic trace estimation. SIAM Journal on Matrix Analysis and Applications.

    Args:
        A: Square operator with an adjoint, or matrix ``[D, D]``, see
            :func:`~curvlinops.hutchinson_trace`.
        num_matvecs: The number m of products with single vectors, even and smaller than D: m/2
            with A, m/2 with its adjoint.
        distribution: ``"rademacher"`` or ``"normal"``.
        generator: Random numbers, on the device of A. Default: PyTorch's global ones.
        chunk_size: How many vectors to multiply at once. Default: all. Besides, some multiples of
            m vectors are held.
        return_standard_error: Whether to return an estimate of each entry's error, too: the
            standard deviation of that entry of the :math:`d_i`, divided by :math:`\sqrt{m/2}`. As
            these share vectors, they are not independent, see :func:`~curvlinops.xtrace`.

    Returns:
        The estimate ``[D]``, of the flattened space, in the dtype and on the device of A. On
        request a pair of it and of the estimates of its error ``[D]``, which are real.

    Raises:
        ValueError: If ``num_matvecs`` is odd (or is 2 and a standard error is wanted), and as
            :func:`~curvlinops.hutchinson_trace`.
        TypeError: As :func:`~curvlinops.hutchinson_trace`.
        NotImplementedError: If A has no adjoint.

    Example:
        >>> import torch
        >>> from curvlinops import xdiag
        >>> A = torch.outer(torch.arange(6.0), torch.arange(6.0))  # of rank 1
        >>> xdiag(A, num_matvecs=4).round().abs()
        tensor([ 0.,  1.,  4.,  9., 16., 25.])
    """
    op = as_operator(A)
    check_square(op, "diagonal")
    num = split_products(
        op, num_matvecs, return_standard_error, name="xdiag", parts=2, exact=_EXACT
    )
    sampler = Sampler(op, distribution, generator, chunk_size)
    V = sampler.draw(num)  # [D, k]
    Y = sampler.multiply(op, V)
    U, S = leave_one_out(Y)  # [D, k], [k, k]
    U = sampler.rounded(U)  # what is multiplied
    Z = sampler.multiply(op.adjoint(), U)
    common = (U * Z.conj()).sum(1)  # [D], diagonal of U Uᴴ A
    mean = Mean()
    mean.update(_leave_one_out_differences(V.to(Y.dtype), Y, U, Z, S))
    return mean.result(op.dtype, return_standard_error, offset=common)


def _leave_one_out_differences(V: Tensor, Y: Tensor, U: Tensor, Z: Tensor, S: Tensor) -> Tensor:
    """Return what XDiag's samples ``[D, k]`` add to the diagonal of U Uᴴ A.

    As y_i is in the range of U, (I - P_i) y_i = u_i (s_iᴴ Uᴴ y_i), with the direction u_i = U s_i
    that P_i lacks.
    """
    with torch.autocast(V.device.type, enabled=False):
        missing = U @ S
        rest = missing * inner(S, U.mH @ Y)
        return V.conj() * rest - missing * (Z @ S).conj()
