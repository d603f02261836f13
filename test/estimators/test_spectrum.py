"""Tests of the spectral densities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlinops import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    PyTorchLinearOperator,
    TensorLinearOperator,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
)

F64, C128 = torch.float64, torch.complex128
BOTH = [lanczos_approximate_spectrum, lanczos_approximate_log_spectrum]
SPECTRA = {
    "positive": torch.logspace(-3, 1, 60, dtype=F64),
    "indefinite": torch.linspace(-1, 3, 60, dtype=F64) ** 3,
    "singular": torch.cat([torch.zeros(40, dtype=F64), torch.linspace(1, 5, 20, dtype=F64)]),
}


def hermitian(eigenvalues: Tensor, dtype: torch.dtype = F64) -> Tensor:
    """Return a matrix with these eigenvalues and random eigenvectors."""
    dim = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=dtype))
    matrix = (Q * eigenvalues.to(dtype)) @ Q.mH
    return (matrix + matrix.mH) / 2


def broadened(t: Tensor, points: Tensor, weights: Tensor, ncv: int, kappa: float) -> Tensor:
    """Return a weighted sum of Gaussians on an even grid t, one after another.

    On the grid scaled to [-1, 1], the standard deviation is 2 / ((ncv - 1) sqrt(8 log kappa)).
    """
    half = (t[-1] - t[0]) / 2
    sigma = half * 2 / ((ncv - 1) * math.sqrt(8 * math.log(kappa)))
    result = torch.zeros_like(t)
    for point, weight in zip(points, weights, strict=True):
        result += weight * torch.distributions.Normal(point, sigma).log_prob(t).exp()
    return result


class Counting(PyTorchLinearOperator):
    """A matrix that counts products."""

    SELF_ADJOINT = True

    def __init__(self, matrix: Tensor):
        super().__init__([(matrix.shape[0],)], [(matrix.shape[0],)])
        self.matrix = matrix
        self.products = 0

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        self.products += X[0].shape[1]
        return [self.matrix @ X[0]]


# --------------------------------------------------------------------------------------------------
# Densities
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kappa", [1.04, 3.0])
@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("log", [False, True])
def test_all_steps(log: bool, name: str, dtype: torch.dtype, kappa: float) -> None:
    """With as many steps as dimensions, it is the broadened spectrum with the vectors' weights.

    These are known for a planted spectrum: squares of the vectors' components along eigenvectors.
    Catches a wrong width, norm, weight or transform, weights that are not squared or normalised,
    and averages over repeats that are sums.
    """
    spectrum, epsilon, repeats = SPECTRA[name], 1e-3, 3
    A = hermitian(spectrum, dtype)
    ends = (spectrum.min().item(), spectrum.max().item())
    if log:
        ends = (spectrum.abs().min().item(), spectrum.abs().max().item())
    generator = torch.Generator().manual_seed(1)
    extra = {"epsilon": epsilon} if log else {}
    grid, density = (lanczos_approximate_log_spectrum if log else lanczos_approximate_spectrum)(
        A, 60, 200, repeats, kappa, ends, 0.2, generator=generator, **extra
    )
    t, points = grid, spectrum
    if log:
        t, points = grid.log(), (spectrum.abs() + epsilon).log()
    low, high = (math.log(end + epsilon) if log else end for end in ends)
    margin = 0.2 * (high - low)
    assert torch.allclose(t, torch.linspace(low - margin, high + margin, 200, dtype=F64))
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(60, dtype=dtype, generator=generator) for _ in range(repeats)]
    values, Q = torch.linalg.eigh(A)
    order = points if log else spectrum.sort().values
    order = (values.abs() + epsilon).log() if log else order
    weights = torch.stack([(Q.mH @ v).abs() ** 2 / v.abs().square().sum() for v in vectors])
    expected = broadened(t, order, weights.mean(0), 60, kappa)
    assert density.dtype == F64
    assert torch.allclose(density, expected, atol=1e-8 * expected.max())


@pytest.mark.parametrize("log", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_convergence_in_repeats(log: bool) -> None:
    """The mean over many vectors is the broadened spectrum, in which all eigenvalues count alike.

    Catches vectors of a wrong distribution.
    """
    spectrum = torch.logspace(-2, 0, 15, dtype=F64)
    ends = (0.01, 1.0)
    function = lanczos_approximate_log_spectrum if log else lanczos_approximate_spectrum
    errors = []
    for repeats in (10, 640):
        grid, density = function(torch.diag(spectrum), 15, 100, repeats, boundaries=ends)
        t, points = (grid.log(), (spectrum + 1e-5).log()) if log else (grid, spectrum)
        uniform = torch.full((15,), 1 / 15, dtype=F64)
        expected = broadened(t, points, uniform, 15, 1.04 if log else 3.0)
        errors.append(((density - expected).norm() / expected.norm()).item())
    assert errors[1] <= 0.05
    assert 3 <= errors[0] / errors[1] <= 20  # 8 in theory


def test_convergence_in_steps() -> None:
    """Fewer steps than dimensions give the density at their own width: its integrals converge."""
    spectrum = torch.cat([torch.zeros(400, dtype=F64), torch.linspace(2, 3, 100, dtype=F64)])
    grid, density = lanczos_approximate_spectrum(hermitian(spectrum), 60, 2000, 20)
    near_zero = grid < 1
    assert torch.trapezoid(density[near_zero], grid[near_zero]).item() == pytest.approx(
        0.8, abs=0.02
    )
    mean = torch.trapezoid(density * grid, grid).item()
    assert mean == pytest.approx(spectrum.mean().item(), abs=0.06)


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("name", SPECTRA)
def test_integrates_to_one(name: str, function: Callable[..., Any]) -> None:
    """The density integrates to one: in the logarithm's variable for the log variant."""
    grid, density = function(hermitian(SPECTRA[name]), 60, kappa=30.0, margin=0.2)
    t = grid if function is lanczos_approximate_spectrum else grid.log()
    assert torch.trapezoid(density, t).item() == pytest.approx(1, abs=1e-3)
    assert (density >= 0).all()


# --------------------------------------------------------------------------------------------------
# Boundaries
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tolerance", [1e-5, 1e-2])
@pytest.mark.parametrize("name", SPECTRA)
def test_estimated_boundaries(name: str, tolerance: float) -> None:
    """Estimates are as accurate as they should be, also for the log variant."""
    spectrum = SPECTRA[name]
    A = hermitian(spectrum)
    low, high = spectrum.min().item(), spectrum.max().item()
    accuracy = (2 * tolerance + 1e-13) * (high - low)
    grid, _ = lanczos_approximate_spectrum(A, 10, margin=0.0, boundaries_tol=tolerance)
    assert grid[0].item() == pytest.approx(low, abs=accuracy)
    assert grid[-1].item() == pytest.approx(high, abs=accuracy)
    grid, _ = lanczos_approximate_log_spectrum(
        A, 10, margin=0.0, boundaries_tol=tolerance, epsilon=1e-2
    )
    smallest = low if low > 0 else 0.0
    assert grid[0].item() == pytest.approx(smallest + 1e-2, abs=accuracy + 1e-13)
    assert grid[-1].item() == pytest.approx(max(-low, high) + 1e-2, abs=accuracy + 1e-13)


@pytest.mark.parametrize("dim", [2, 5, 30])
@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("value", [0.0, 2.0, -2.0])
def test_one_eigenvalue(value: float, function: Callable[..., Any], dim: int) -> None:
    """A multiple of the identity has a single peak, at its eigenvalue; no NaN."""
    grid, density = function(value * torch.eye(dim, dtype=F64), 2, 501, kappa=50.0, margin=1.0)
    assert density.isfinite().all()
    place = value if function is lanczos_approximate_spectrum else abs(value) + 1e-5
    assert grid[density.argmax()].item() == pytest.approx(place, rel=0.02, abs=0.02)


# --------------------------------------------------------------------------------------------------
# Cached processes, random numbers
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("log", [False, True])
def test_cached(log: bool) -> None:
    """Repeats are computed once; more of them are added; results are those of the functions.

    Catches processes that are recomputed, and fewer repeats that average all of them.
    """
    A = hermitian(SPECTRA["positive"])
    counting = Counting(A)
    cls = LanczosApproximateLogSpectrumCached if log else LanczosApproximateSpectrumCached
    function = lanczos_approximate_log_spectrum if log else lanczos_approximate_spectrum
    cached = cls(TensorLinearOperator(A), 10, generator=torch.Generator().manual_seed(1))
    cached._A = counting  # has no dtype, but that is known by now
    density = cached.approximate_log_spectrum if log else cached.approximate_spectrum
    assert counting.products == 0
    density(num_repeats=2)
    ends = counting.products - 20
    assert ends >= 20  # to find the boundaries
    density(num_repeats=2, num_points=50, kappa=5.0)
    first = density(num_repeats=1)
    assert counting.products == ends + 20
    more = density(num_repeats=5)
    assert counting.products == ends + 50
    for repeats, result in [(1, first), (5, more)]:
        generator = torch.Generator().manual_seed(1)
        expected = function(A, 10, num_repeats=repeats, generator=generator)
        assert all(torch.allclose(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("chunk_size", [2, 4, 9])
@pytest.mark.parametrize("log", [False, True])
def test_chunks(log: bool, chunk_size: int) -> None:
    """Processes share products, and so do those that are added later; densities stay the same."""
    A = hermitian(SPECTRA["positive"])
    widths: list[int] = []

    class Recorder(TensorLinearOperator):
        def _matmat(self, X: Any) -> Any:
            widths.append(X[0].shape[1])
            return super()._matmat(X)

    cls = LanczosApproximateLogSpectrumCached if log else LanczosApproximateSpectrumCached
    results = []
    for size in (1, chunk_size):
        options = {"boundaries": (0.1, 12.0), "chunk_size": size}
        cached = cls(Recorder(A), 6, generator=torch.Generator().manual_seed(0), **options)
        density = cached.approximate_log_spectrum if log else cached.approximate_spectrum
        widths.clear()
        density(num_repeats=3)
        results.append(density(num_repeats=7))
    chunks = [*[chunk_size] * (3 // chunk_size), 3 % chunk_size]
    chunks += [*[chunk_size] * (4 // chunk_size), 4 % chunk_size]
    assert widths == [width for width in chunks if width for _ in range(6)]
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("function", BOTH)
def test_standard_error(function: Callable[..., Any]) -> None:
    """It is that of the mean of single processes, and the density stays the same."""
    A, options = hermitian(SPECTRA["positive"]), {"boundaries": (0.1, 12.0), "num_points": 40}
    generator = torch.Generator().manual_seed(0)
    singles = [function(A, 6, generator=generator, **options)[1] for _ in range(5)]
    singles = torch.stack(singles)
    generator = torch.Generator().manual_seed(0)
    options |= {"num_repeats": 5, "generator": generator}
    _, density, error = function(A, 6, return_standard_error=True, **options)
    torch.testing.assert_close(density, singles.mean(0))
    torch.testing.assert_close(error, singles.std(0) / 5**0.5)
    with pytest.raises(ValueError, match="num_repeats >= 2"):
        function(A, 6, return_standard_error=True)


def test_random_numbers() -> None:
    """Without a generator the global one is used, one vector after another."""
    A = hermitian(SPECTRA["positive"])
    torch.manual_seed(3)
    _, density = lanczos_approximate_spectrum(A, 5, num_repeats=2, boundaries=(0.0, 10.0))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    parts = [lanczos_approximate_spectrum(A, 5, boundaries=(0.0, 10.0))[1] for _ in range(2)]
    assert torch.equal(after, torch.get_rng_state())
    assert torch.allclose(density, (parts[0] + parts[1]) / 2)
    lanczos_approximate_spectrum(A, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype, function: Callable[..., Any]) -> None:
    """Densities of low precision are in float32, and near those of float64."""
    A = hermitian(torch.linspace(1, 2, 40, dtype=F64))
    results = []
    for matrix in (A, A.to(dtype)):
        torch.manual_seed(0)
        results.append(function(matrix, 6, 50, 200, boundaries=(1.0, 2.0))[1])
    assert results[1].dtype == torch.float32
    assert (results[1].double() - results[0]).abs().max() <= 0.15 * results[0].max()


@pytest.mark.parametrize("function", BOTH)
@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"ncv": 1}, "ncv must be"),
        ({"ncv": 31}, "ncv must be"),
        ({"num_points": 1}, "num_points must be"),
        ({"num_repeats": 0}, "num_repeats must be"),
        ({"kappa": 1.0}, "kappa must be"),
        ({"margin": -0.1}, "margin must be"),
        ({"boundaries_tol": -1.0}, "boundaries_tol must be"),
        ({"boundaries": (1.0, 0.0)}, "boundaries must be"),
        ({"boundaries": (0.0, math.nan)}, "boundaries must be"),
        ({"boundaries": 1.0}, "boundaries must be"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], match: str, function: Callable[..., Any]) -> None:
    """Arguments out of range are refused by name."""
    with pytest.raises(ValueError, match=match):
        function(torch.eye(30), **{"ncv": 5, **kwargs})


def test_bad_input() -> None:
    """What is no Hermitian operator is refused, and what only the log variant refuses."""
    for function in BOTH:
        with pytest.raises(TypeError):
            function("A", 5)
        with pytest.raises(ValueError, match="square"):
            function(torch.ones(4, 5), 2)
        with pytest.raises(ValueError, match="not finite"):
            function(torch.full((30, 30), torch.nan), 2)
    with pytest.raises(ValueError, match="not negative"):
        lanczos_approximate_log_spectrum(torch.eye(30), 5, boundaries=(-1.0, 1.0))
    with pytest.raises(ValueError, match="epsilon"):
        lanczos_approximate_log_spectrum(torch.eye(30), 5, epsilon=0.0)
