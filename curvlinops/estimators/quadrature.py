"""Traces of matrix functions and log-determinants, by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlinops._operator import PyTorchLinearOperator
from curvlinops._scalars import as_integer
from curvlinops._tensors import widened
from curvlinops.estimators._sampling import (
    Distribution,
    Matrix,
    Mean,
    Result,
    Sampler,
    as_operator,
    check_square,
)
from curvlinops.solvers._lanczos import lanczos_quadrature

_ROUNDING = 4  # machine epsilons of the largest eigenvalue that count as zero


def slq_trace(
    A: Matrix,
    function: Callable[[Tensor], Tensor],
    ncv: int,
    num_repeats: int = 10,
    distribution: Distribution = "rademacher",
    *,
    generator: torch.Generator | None = None,
    chunk_size: int = 1,
    return_standard_error: bool = False,
) -> Result:
    r"""Estimate the trace of a function of a Hermitian matrix by stochastic Lanczos quadrature.

    .. math::
        \operatorname{tr} f(A) = \mathbb{E}[v^H f(A) v] \approx \frac{1}{m} \sum_{k=1}^m
        \lVert v_k \rVert^2 \sum_{i=1}^{n} w_{ki} f(\theta_{ki})

    Each random vector :math:`v_k` starts a Lanczos process of n steps. Eigenvalues θ of its
    tridiagonal matrix, and squares w of the first entries of the eigenvectors, are the nodes and
    weights of Gaussian quadrature. There are two errors. That of the mean is as in
    :func:`~curvlinops.hutchinson_trace`, falls with :math:`1 / \sqrt{m}`, and is what the standard
    error tells. That of the quadrature is none for polynomials of degree :math:`2n - 1`, and falls
    exponentially with n for functions that are analytic around the spectrum; increase n to see it.
    The method is that of

    - Ubaru, S., Chen, J. & Saad, Y. (2017). Fast estimation of tr(f(A)) via stochastic Lanczos
      quadrature. SIAM Journal on Matrix Analysis and Applications, 38(4), 1075-1099.

    All vectors of a process are held, and orthogonalised twice. bfloat16 and float16 operators
    multiply in their own dtype, but the process is in float32. Gradients are not recorded.

    Args:
        A: Hermitian operator on any space, or a matrix (tensor ``[D, D]``); this is trusted.
        function: f, from a real tensor of eigenvalues (float64 on the CPU) to one of that shape.
        ncv: The number n of steps, from 1 to D. Each is one product.
        num_repeats: The number m of random vectors.
        distribution: ``"rademacher"``, vectors of independent signs, or ``"normal"``.
        generator: Random numbers, on the device of A. Default: PyTorch's global generator of that
            device. Vectors are drawn one after another.
        chunk_size: How many processes share products. Each holds n + 1 vectors. The result does not
            depend on it.
        return_standard_error: Whether to return the standard error of the mean, too.

    Returns:
        The estimate (tensor ``[]``), in the precision and on the device of A. On request a pair of
        it and of its standard error.

    Raises:
        ValueError: If A is not square or its products are not finite, if f is not finite where it
            is needed, and if a number is out of range.
        TypeError: If A is neither operator nor tensor.

    Example:
        >>> import torch
        >>> from curvlinops.estimators import slq_trace
        >>> A = torch.diag(torch.linspace(0, 1, 50))
        >>> generator = torch.Generator().manual_seed(0)
        >>> print(slq_trace(A, torch.exp, 10, generator=generator).round(decimals=2))
        tensor(86.0600)
        >>> print(A.diagonal().exp().sum().round(decimals=2))
        tensor(86.0600)
    """
    A = as_operator(A)
    check_square(A, "trace")

    def integrand(nodes: Tensor) -> Tensor:
        values = function(nodes)
        if not isinstance(values, Tensor) or values.shape != nodes.shape:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"The function must return a tensor of shape {list(nodes.shape)}, as it was given, "
                f"but returned {got}."
            )
        finite = values.isfinite()
        if not bool(finite.all()):
            raise ValueError(
                f"The function is not finite at {nodes[~finite][0].item():.3e}, which is within "
                f"the spectrum of {A!r}. Use a function that is finite there, or add a multiple "
                "of the identity to the operator."
            )
        return values

    return _estimate(
        A, integrand, ncv, num_repeats, distribution, generator, chunk_size, return_standard_error
    )


def slq_logdet(
    A: Matrix,
    ncv: int,
    num_repeats: int = 10,
    distribution: Distribution = "rademacher",
    *,
    generator: torch.Generator | None = None,
    chunk_size: int = 1,
    return_standard_error: bool = False,
) -> Result:
    r"""Estimate the log-determinant of a positive definite matrix.

    .. math::
        \log \det A = \operatorname{tr} \log A

    by :func:`~curvlinops.estimators.slq_trace`, whose arguments it has. The smaller the smallest
    eigenvalue relative to the largest, the more steps are needed: the error of the quadrature falls
    like :math:`\exp(-4 n / \sqrt{\kappa})` with the condition number κ.

    Args:
        A: Hermitian positive definite operator, or a matrix. Add a multiple of the identity to one
            that is only semi-definite: ``A + 1e-3 * A**0``.
        ncv: The number n of steps for each vector, from 1 to D.
        num_repeats: The number of random vectors.
        distribution: ``"rademacher"`` or ``"normal"``.
        generator: Random numbers, on the device of A. Default: PyTorch's global ones.
        chunk_size: How many processes share products.
        return_standard_error: Whether to return the standard error, too.

    Returns:
        The estimate (tensor ``[]``), or a pair of it and of its standard error.

    Raises:
        ValueError: As :func:`~curvlinops.estimators.slq_trace`, and if A is not positive definite
            as far as the process sees: if one of its eigenvalue estimates is negative, or zero up
            to rounding. These are never below the smallest eigenvalue. Hence few steps may miss
            that A is singular.
        TypeError: If A is neither operator nor tensor.

    Example:
        >>> import torch
        >>> from curvlinops.estimators import slq_logdet
        >>> A = torch.diag(torch.linspace(1, 2, 50))
        >>> generator = torch.Generator().manual_seed(0)
        >>> print(slq_logdet(A, 10, generator=generator).round(decimals=2))
        tensor(19.2700)
        >>> print(A.logdet().round(decimals=2))
        tensor(19.2700)
    """
    A = as_operator(A)
    check_square(A, "logdet")

    def integrand(nodes: Tensor) -> Tensor:
        dtype = torch.get_default_dtype() if A.dtype is None else A.dtype
        smallest, largest = nodes[0].item(), nodes[-1].item()
        if smallest <= _ROUNDING * torch.finfo(dtype).eps * abs(largest):
            raise ValueError(
                f"{A!r} is not positive definite: it has eigenvalues of at most {smallest:.3e} "
                f"(and of at least {largest:.3e}). Add a multiple of the identity."
            )
        return nodes.log()

    return _estimate(
        A, integrand, ncv, num_repeats, distribution, generator, chunk_size, return_standard_error
    )


def _estimate(
    A: PyTorchLinearOperator,
    integrand: Callable[[Tensor], Tensor],
    ncv: int,
    num_repeats: int,
    distribution: Distribution,
    generator: torch.Generator | None,
    chunk_size: int,
    return_standard_error: bool,
) -> Result:
    """Average ``vᴴ f(A) v`` over random vectors."""
    ncv = as_integer("ncv", ncv, least=1)
    if ncv > A.shape[1]:
        raise ValueError(f"ncv must be at most the dimension {A.shape[1]}, got {ncv}.")
    num_repeats = as_integer("num_repeats", num_repeats, least=1)
    if return_standard_error and num_repeats == 1:
        raise ValueError("A standard error needs two samples, num_repeats >= 2, got 1.")
    sampler, mean = Sampler(A, distribution, generator, chunk_size), Mean()
    with torch.no_grad():
        for width in sampler.chunks(num_repeats):
            V = widened(sampler.draw(width))
            squares = V.abs().double().square().sum(0).cpu()
            rules = lanczos_quadrature(A, V, ncv)
            values = [(weights * integrand(nodes)).sum() for nodes, weights in rules]
            mean.update(squares * torch.stack(values))
    result = mean.result(A.dtype, return_standard_error)
    if isinstance(result, tuple):
        return result[0].to(sampler.device), result[1].to(sampler.device)
    return result.to(sampler.device)
