"""Spectral densities of Hermitian operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from curvlinops._operator import PyTorchLinearOperator
from curvlinops._scalars import as_integer
from curvlinops._tensors import widened
from curvlinops.estimators._sampling import Matrix, Mean, Sampler, as_operator, check_square
from curvlinops.solvers._lanczos import (
    dense_eigenpairs,
    lanczos_quadrature,
    restarted_lanczos,
)

_BASIS = 20  # Lanczos vectors to estimate the ends of the spectrum


# --------------------------------------------------------------------------------------------------
# Functions
# --------------------------------------------------------------------------------------------------
def lanczos_approximate_spectrum(
    A: Matrix,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 3.0,
    boundaries: tuple[float, float] | None = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
    *,
    generator: torch.Generator | None = None,
    chunk_size: int = 1,
    return_standard_error: bool = False,
) -> tuple[Tensor, ...]:
    r"""Approximate the spectral density of a Hermitian operator by Lanczos processes.

    .. math::
        p(t) = \frac{1}{D} \sum_{i=1}^D g_\sigma(t - \lambda_i)
        \approx \frac{1}{m} \sum_{k=1}^m \sum_{j=1}^n w_{kj}\, g_\sigma(t - \theta_{kj})

    with a Gaussian :math:`g_\sigma` of standard deviation σ. Each of m random normal vectors starts
    a Lanczos process of n = ``ncv`` steps, whose nodes θ and weights w are those of
    :func:`~curvlinops.estimators.slq_trace`. The density integrates to one over the real line. What
    lies outside of the grid is little if σ is small compared to the margin, thus for large ``ncv``.
    The method, and the choice of σ by κ, are those of

    - Papyan, V. (2020). Traces of class/cross-class structure pervade deep learning spectra.
      Journal of Machine Learning Research, 21(252).
    - Lin, L., Saad, Y. & Yang, C. (2016). Approximating spectral densities of large matrices. SIAM
      Review, 58(1).
    - Ghorbani, B., Krishnan, S. & Xiao, Y. (2019). An investigation into neural net optimization
      via Hessian eigenvalue density. ICML.

    On the interval of the grid scaled to [-1, 1], :math:`\sigma = 2 / ((n - 1) \sqrt{8 \log
    \kappa})`: the larger κ, the finer the density.

    All ``ncv`` vectors of a process are held, and orthogonalised twice. bfloat16 and float16
    operators multiply in their own dtype, but the process is in float32. Gradients are not
    recorded. To try several ``kappa`` or more repeats without new products, use
    :class:`~curvlinops.LanczosApproximateSpectrumCached`.

    Args:
        A: Hermitian operator on any space, or a matrix (tensor ``[D, D]``); this is trusted.
        ncv: The number n of steps, from 2 to D. Each is one product.
        num_points: The number of grid points.
        num_repeats: The number m of random vectors.
        kappa: The width of the Gaussians, see above; greater than 1.
        boundaries: The smallest and the largest eigenvalue, or estimates of them. Default:
            estimated by restarted Lanczos, which takes products of its own.
        margin: How far the grid extends beyond the boundaries to each side, relative to their
            distance.
        boundaries_tol: Accuracy of the estimated boundaries, relative to their distance. 0 stands
            for machine precision.
        generator: Random numbers, on the device of A. Default: PyTorch's global generator of that
            device. Vectors are drawn one after another, first one for the boundaries if they are
            to be estimated.
        chunk_size: How many processes share products. Each holds ``ncv + 1`` vectors. The result
            does not depend on it.
        return_standard_error: Whether to return the standard error of the density, too: that of the
            mean of m independent processes, at each grid point.

    Returns:
        Evenly spaced grid points and the density there, both ``[num_points]``, on the device of A
        and in its precision (float32 at least). On request the standard error as a third.

    Raises:
        ValueError: If A is not square or its products are not finite, and if an argument is out of
            range.
        TypeError: If A is neither operator nor tensor.

    Example:
        >>> import torch
        >>> from curvlinops import lanczos_approximate_spectrum
        >>> A = torch.diag(torch.cat([torch.zeros(90), torch.linspace(1, 2, 10)]))
        >>> generator = torch.Generator().manual_seed(0)
        >>> grid, density = lanczos_approximate_spectrum(A, 50, num_repeats=5, generator=generator)
        >>> print(torch.trapezoid(density, grid).round(decimals=3))
        tensor(1.)
        >>> near_zero = grid.abs() < 0.5
        >>> print(torch.trapezoid(density[near_zero], grid[near_zero]).round(decimals=1))
        tensor(0.9000)
    """
    cached = LanczosApproximateSpectrumCached(
        A, ncv, boundaries, margin, boundaries_tol, generator=generator, chunk_size=chunk_size
    )
    return cached.approximate_spectrum(num_repeats, num_points, kappa, return_standard_error)


def lanczos_approximate_log_spectrum(
    A: Matrix,
    ncv: int,
    num_points: int = 1024,
    num_repeats: int = 1,
    kappa: float = 1.04,
    boundaries: tuple[float, float] | None = None,
    margin: float = 0.05,
    boundaries_tol: float = 1e-2,
    epsilon: float = 1e-5,
    *,
    generator: torch.Generator | None = None,
    chunk_size: int = 1,
    return_standard_error: bool = False,
) -> tuple[Tensor, ...]:
    r"""Approximate the density of the logarithms of the eigenvalues' magnitudes.

    It is the spectral density of :math:`\log(|A| + \epsilon I)`, as a function of
    :math:`t = \log(|\lambda| + \epsilon)`,

    .. math::
        p(t) \approx \frac{1}{m} \sum_{k=1}^m \sum_{j=1}^n w_{kj}\,
        g_\sigma(t - \log(|\theta_{kj}| + \epsilon))

    with the Lanczos processes of :func:`~curvlinops.lanczos_approximate_spectrum` for A itself. It
    tells apart scales of eigenvalues where the other one has a single peak at zero. Eigenvalues
    below ε are seen at ε. The grid is :math:`e^t` for evenly spaced t; the density integrates to
    one over t: ``torch.trapezoid(density, grid.log())``.

    Args:
        A: Hermitian operator on any space, or a matrix (tensor ``[D, D]``); this is trusted.
        ncv: The number n of steps, from 2 to D.
        num_points: The number of grid points.
        num_repeats: The number m of random vectors.
        kappa: The width of the Gaussians in t, on the interval of the grid scaled to [-1, 1]; see
            :func:`~curvlinops.lanczos_approximate_spectrum`.
        boundaries: The smallest and the largest magnitude of an eigenvalue, or estimates of them.
            Default: from estimates of the smallest and the largest eigenvalue. If they differ in
            sign, the smallest magnitude is taken to be 0.
        margin: How far the grid extends beyond the boundaries to each side, relative to their
            distance in t.
        boundaries_tol: Accuracy of the estimated smallest and largest eigenvalues, relative to
            their distance.
        epsilon: What is added to the magnitudes; positive.
        generator: Random numbers, as for :func:`~curvlinops.lanczos_approximate_spectrum`.
        chunk_size: How many processes share products.
        return_standard_error: Whether to return the standard error of the density, too.

    Returns:
        Grid points :math:`e^t`, evenly spaced in their logarithm, and the density in t, both
        ``[num_points]``. On request the standard error as a third.

    Raises:
        ValueError: If A is not square or its products are not finite, and if an argument is out of
            range.
        TypeError: If A is neither operator nor tensor.

    Example:
        >>> import torch
        >>> from curvlinops import lanczos_approximate_log_spectrum
        >>> A = torch.diag(torch.logspace(-4, 0, 100))
        >>> generator = torch.Generator().manual_seed(0)
        >>> grid, density = lanczos_approximate_log_spectrum(A, 80, generator=generator)
        >>> abs(torch.trapezoid(density, grid.log()).item() - 1) < 0.01
        True
    """
    cached = LanczosApproximateLogSpectrumCached(
        A, ncv, boundaries, margin, boundaries_tol, generator=generator, chunk_size=chunk_size
    )
    return cached.approximate_log_spectrum(
        num_repeats, num_points, kappa, epsilon, return_standard_error
    )


# --------------------------------------------------------------------------------------------------
# Classes that keep the processes
# --------------------------------------------------------------------------------------------------
class _LanczosCached:
    """Lanczos processes of one operator, computed when they are first needed, and kept."""

    def __init__(
        self,
        A: Matrix,
        ncv: int,
        boundaries: tuple[float, float] | None = None,
        margin: float = 0.05,
        boundaries_tol: float = 1e-2,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int = 1,
    ):
        self._A = as_operator(A)
        check_square(self._A, "spectral density")
        self._ncv = as_integer("ncv", ncv, least=2)
        if self._ncv > self._A.shape[1]:
            raise ValueError(f"ncv must be at most the dimension {self._A.shape[1]}, got {ncv}.")
        if not 0 <= margin < math.inf:
            raise ValueError(f"margin must be a number of at least 0, got {margin}.")
        if not 0 <= boundaries_tol < math.inf:
            raise ValueError(
                f"boundaries_tol must be a number of at least 0, got {boundaries_tol}."
            )
        self._given = None if boundaries is None else self._checked(boundaries)
        self._estimated: tuple[float, float] | None = None
        self._margin, self._boundaries_tol = margin, boundaries_tol
        self._generator = generator
        self._sampler = Sampler(self._A, "normal", generator, chunk_size)
        self._processes: list[tuple[Tensor, Tensor]] = []  # nodes and weights

    @staticmethod
    def _checked(boundaries: Any) -> tuple[float, float]:
        """Return boundaries as two numbers."""
        try:
            low, high = map(float, boundaries)
        except (TypeError, ValueError) as error:
            raise ValueError(f"boundaries must be two numbers, got {boundaries!r}.") from error
        if not -math.inf < low <= high < math.inf:
            raise ValueError(f"boundaries must be finite and ascending, got {boundaries!r}.")
        return low, high

    def _ends(self) -> tuple[float, float]:
        """Return estimates of the smallest and the largest eigenvalue, or bounds close to them."""
        if self._estimated is None:
            with torch.no_grad():
                self._estimated = _estimate_ends(
                    self._A, self._sampler, self._boundaries_tol, self._generator
                )
        return self._estimated

    def _density(
        self,
        num_repeats: int,
        num_points: int,
        kappa: float,
        interval: tuple[float, float],
        transform: Any,
        return_standard_error: bool,
    ) -> tuple[Tensor, ...]:
        """Return an even grid and the density there of what a function makes of eigenvalues."""
        if return_standard_error and num_repeats == 1:
            raise ValueError("A standard error needs two processes, num_repeats >= 2, got 1.")
        low, high = interval
        distance = high - low
        if distance == 0:  # one eigenvalue: any width shows it
            distance = 0.01 * abs(low) or 1.0
        low, high = low - self._margin * distance, high + self._margin * distance
        if low == high:
            low, high = low - distance / 2, high + distance / 2
        with torch.no_grad():
            for width in self._sampler.chunks(max(num_repeats - len(self._processes), 0)):
                V = widened(self._sampler.draw(width))
                self._processes += lanczos_quadrature(self._A, V, self._ncv)
        sigma = (high - low) / ((self._ncv - 1) * math.sqrt(8 * math.log(kappa)))
        grid = torch.linspace(low, high, num_points, dtype=torch.float64)
        mean = Mean()
        for nodes, weights in self._processes[:num_repeats]:
            scaled = (grid.unsqueeze(1) - transform(nodes)) / sigma  # [num_points, n]
            density = (-(scaled**2) / 2).exp() @ weights / (sigma * math.sqrt(2 * math.pi))
            mean.update(density.unsqueeze(-1))
        result = mean.result(grid.dtype, return_standard_error)
        return (grid, *result) if isinstance(result, tuple) else (grid, result)

    def _delivered(self, values: Tensor) -> Tensor:
        """Return values on the operator's device, in its precision."""
        dtype = widened(torch.empty(0, dtype=self._sampler.dtype)).dtype.to_real()
        return values.to(device=self._sampler.device, dtype=dtype)


class LanczosApproximateSpectrumCached(_LanczosCached):
    """Spectral densities of one operator for several settings, without products in vain.

    The boundaries and the Lanczos processes are computed when they are first needed, and kept: for
    more repeats, only the further ones are computed; for fewer, the first ones are used.

    Args:
        A: Hermitian operator on any space, or a matrix (tensor ``[D, D]``); this is trusted.
        ncv: The number of steps of each process.
        boundaries: The smallest and the largest eigenvalue. Default: estimated.
        margin: How far the grid extends beyond the boundaries, relative to their distance.
        boundaries_tol: Accuracy of estimated boundaries, relative to their distance.
        generator: Random numbers. Default: PyTorch's global generator of A's device.
        chunk_size: How many processes share products.

    Raises:
        ValueError: If A is not square, or an argument is out of range.
        TypeError: If A is neither operator nor tensor.

    Example:
        >>> import torch
        >>> from curvlinops import LanczosApproximateSpectrumCached
        >>> cached = LanczosApproximateSpectrumCached(torch.diag(torch.arange(50.0)), ncv=20)
        >>> grid, density = cached.approximate_spectrum(num_repeats=2)
        >>> grid, finer = cached.approximate_spectrum(num_repeats=2, kappa=10)  # no product
        >>> finer.shape
        torch.Size([1024])
    """

    def approximate_spectrum(
        self,
        num_repeats: int = 1,
        num_points: int = 1024,
        kappa: float = 3.0,
        return_standard_error: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return grid and density, see :func:`~curvlinops.lanczos_approximate_spectrum`.

        Args:
            num_repeats: The number of random vectors.
            num_points: The number of grid points.
            kappa: The width of the Gaussians; greater than 1.
            return_standard_error: Whether to return the standard error, too.

        Raises:
            ValueError: If an argument is out of range.
        """
        num_repeats, num_points = _check_settings(num_repeats, num_points, kappa)
        ends = self._ends() if self._given is None else self._given
        results = self._density(
            num_repeats, num_points, kappa, ends, lambda nodes: nodes, return_standard_error
        )
        return tuple(map(self._delivered, results))


class LanczosApproximateLogSpectrumCached(_LanczosCached):
    """Densities of the logarithms of eigenvalues for several settings, without products in vain.

    As :class:`~curvlinops.LanczosApproximateSpectrumCached`, but ``boundaries`` are those of the
    eigenvalues' magnitudes.

    Args:
        A: Hermitian operator on any space, or a matrix (tensor ``[D, D]``); this is trusted.
        ncv: The number of steps of each process.
        boundaries: The smallest and the largest magnitude of an eigenvalue. Default: estimated.
        margin: How far the grid extends beyond the boundaries, relative to their distance in the
            logarithm.
        boundaries_tol: Accuracy of the estimated ends of the spectrum, relative to their distance.
        generator: Random numbers. Default: PyTorch's global generator of A's device.
        chunk_size: How many processes share products.

    Raises:
        ValueError: If A is not square, or an argument is out of range.
        TypeError: If A is neither operator nor tensor.

    Example:
        >>> import torch
        >>> from curvlinops import LanczosApproximateLogSpectrumCached
        >>> cached = LanczosApproximateLogSpectrumCached(torch.diag(torch.arange(50.0)), ncv=20)
        >>> grid, density = cached.approximate_log_spectrum(num_repeats=2)
        >>> grid, density = cached.approximate_log_spectrum(num_repeats=2, epsilon=1e-3)
        >>> density.shape
        torch.Size([1024])
    """

    @staticmethod
    def _checked(boundaries: Any) -> tuple[float, float]:
        """Return boundaries as two numbers, not negative."""
        low, high = _LanczosCached._checked(boundaries)
        if low < 0:
            raise ValueError(f"boundaries are of magnitudes, not negative, got {boundaries!r}.")
        return low, high

    def approximate_log_spectrum(
        self,
        num_repeats: int = 1,
        num_points: int = 1024,
        kappa: float = 1.04,
        epsilon: float = 1e-5,
        return_standard_error: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return grid and density, see :func:`~curvlinops.lanczos_approximate_log_spectrum`.

        Args:
            num_repeats: The number of random vectors.
            num_points: The number of grid points.
            kappa: The width of the Gaussians; greater than 1.
            epsilon: What is added to the magnitudes; positive.
            return_standard_error: Whether to return the standard error, too.

        Raises:
            ValueError: If an argument is out of range.
        """
        num_repeats, num_points = _check_settings(num_repeats, num_points, kappa)
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon must be a positive number, got {epsilon}.")
        if self._given is None:
            low, high = self._ends()
            smaller, larger = sorted((abs(low), abs(high)))
            magnitudes = (0.0 if low <= 0 <= high else smaller, larger)
        else:
            magnitudes = self._given
        interval = math.log(magnitudes[0] + epsilon), math.log(magnitudes[1] + epsilon)
        t, *densities = self._density(
            num_repeats,
            num_points,
            kappa,
            interval,
            lambda nodes: (nodes.abs() + epsilon).log(),
            return_standard_error,
        )
        return tuple(map(self._delivered, (t.exp(), *densities)))


def _check_settings(num_repeats: Any, num_points: Any, kappa: float) -> tuple[int, int]:
    """Raise if a setting of a density is out of range; return the integers."""
    if not 1 < kappa < math.inf:
        raise ValueError(f"kappa must be a number greater than 1, got {kappa}.")
    repeats = as_integer("num_repeats", num_repeats, least=1)
    return repeats, as_integer("num_points", num_points, least=2)


def _estimate_ends(
    A: PyTorchLinearOperator,
    sampler: Sampler,
    tolerance: float,
    generator: torch.Generator | None,
) -> tuple[float, float]:
    """Return estimates of the extreme eigenvalues, moved outwards by their residual norms."""
    dim = A.shape[1]
    if dim <= _BASIS:
        values = dense_eigenpairs(A, dim, "LA", False).values
        return values[0].item(), values[-1].item()

    def criterion(values: Tensor, residuals: Tensor, scale: float) -> Tensor:
        distance = values.max() - values.min()
        return residuals <= max(tolerance * distance.item(), 4 * eps * scale)

    start = widened(sampler.draw(1).squeeze(1))
    eps = torch.finfo(start.dtype).eps
    pairs = restarted_lanczos(
        A,
        2,
        "BE",
        ncv=_BASIS,
        start=start,
        max_iter=10 * dim,
        criterion=criterion,
        generator=generator,
        return_vectors=False,
    )
    (low, high), (below, above) = pairs.values.tolist(), pairs.residual_norms.tolist()
    return low - below, high + above
