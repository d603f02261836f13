"""Estimators of norms."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops.estimators._sampling import (
    Distribution,
    Matrix,
    Result,
    Sampler,
    as_operator,
    estimator,
    sample_mean,
    split_products,
)


@estimator
def hutchinson_squared_fro(
    A: Matrix,
    num_matvecs: int,
    distribution: Distribution = "rademacher",
    *,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    return_standard_error: bool = False,
) -> Result:
    r"""Estimate the square of the Frobenius norm of a matrix by Hutchinson's method.

    .. math::
        \lVert A \rVert_F^2 = \operatorname{tr}(A^H A) = \mathbb{E} \lVert A v \rVert^2
        \approx \frac{1}{m} \sum_{k=1}^m \lVert A v_k \rVert^2, \qquad \mathbb{E}[v v^H] = I

    The estimate is unbiased, and not negative. Its variance is that of
    :func:`~curvlinops.hutchinson_trace` for :math:`A^H A`.

    Args:
        A: Operator, or matrix ``[M, N]``, which may be rectangular. If M < N, its adjoint has the
            same norm and shorter vectors.
        num_matvecs: The number m of products with single vectors, smaller than N.
        distribution: ``"rademacher"`` or ``"normal"``, see :func:`~curvlinops.hutchinson_trace`.
        generator: Random numbers, on the device of A. Default: PyTorch's global ones.
        chunk_size: How many vectors to multiply at once. Default: all. No more than that many
            vectors and products are held.
        return_standard_error: Whether to return the standard error of the mean, too: the standard
            deviation of the m independent samples, divided by :math:`\sqrt{m}`.

    Returns:
        The estimate, a real number (tensor ``[]``) in the precision and on the device of A. On
        request a pair of it and of its standard error.

    Raises:
        ValueError: As :func:`~curvlinops.hutchinson_trace`, but A need not be square.
        TypeError: As :func:`~curvlinops.hutchinson_trace`.

    Example:
        >>> import torch
        >>> from curvlinops import hutchinson_squared_fro
        >>> hutchinson_squared_fro(2 * torch.eye(5, 4), num_matvecs=3)
        tensor(16.)
    """
    op = as_operator(A)
    num = split_products(
        op,
        num_matvecs,
        return_standard_error,
        name="hutchinson_squared_fro",
        parts=1,
        exact="A.frobenius_norm() ** 2",
    )
    sampler = Sampler(op, distribution, generator, chunk_size)
    mean = sample_mean(op, sampler, num, lambda V, AV: _squared_norms(AV))
    return mean.result(op.dtype, return_standard_error)


def _squared_norms(X: Tensor) -> Tensor:
    """Return the squared norms ``[K]`` of columns ``[M, K]``."""
    return X.abs().square().sum(0)
