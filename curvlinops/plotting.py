"""Plots of spectra; needs matplotlib, which is imported when something is plotted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_spectral_density(
    grid: Tensor, density: Tensor, *, ax: Axes | None = None, log_x: bool = False, **kwargs: Any
) -> Axes:
    """Plot a spectral density on a logarithmic scale, on which single outliers can be seen.

    The axis ends where single eigenvalues would not be visible any more: densities below 1e-8 of
    the largest value are the flanks of Gaussians, not eigenvalues.

    Args:
        grid: Points ``[num_points]``, as returned by
            :func:`~curvlinops.lanczos_approximate_spectrum` or its log variant.
        density: The density there ``[num_points]``.
        ax: Axis to draw in. Default: a new figure's.
        log_x: Whether the horizontal axis is logarithmic, for the log variant.
        **kwargs: For matplotlib's ``plot``, for instance ``label``.

    Returns:
        The axis.

    Raises:
        ImportError: If a new axis is needed and matplotlib is not installed.
        ValueError: If the shapes differ, or there is no positive value to show.

    Example:
        >>> import torch
        >>> from curvlinops import lanczos_approximate_spectrum
        >>> from curvlinops.plotting import plot_spectral_density
        >>> A = torch.diag(torch.arange(50.0))
        >>> ax = plot_spectral_density(*lanczos_approximate_spectrum(A, ncv=20))
        >>> ax.get_ylabel()
        'spectral density'
    """
    x, y = _numbers(grid, "grid"), _numbers(density, "density")
    if x.shape != y.shape:
        raise ValueError(
            "grid and density must have the same number of entries, but differ in shape: "
            f"{list(x.shape)} and {list(y.shape)}."
        )
    if not bool((y > 0).any()):
        raise ValueError("The density has no positive value, which a logarithmic axis needs.")
    ax = _new_axis() if ax is None else ax
    ax.plot(x.tolist(), y.clamp(min=torch.finfo(y.dtype).tiny).tolist(), **kwargs)
    ax.set_yscale("log")
    peak = max(y.max().item(), ax.get_ylim()[1] / 3 if len(ax.lines) > 1 else 0.0)
    ax.set_ylim(1e-8 * peak, 3 * peak)
    if log_x:
        ax.set_xscale("log")
    ax.set_xlabel(r"$|\lambda| + \epsilon$" if log_x else r"eigenvalue $\lambda$")
    ax.set_ylabel("spectral density")
    return ax


def plot_eigenvalue_histogram(
    eigenvalues: Tensor,
    *,
    ax: Axes | None = None,
    bins: int = 50,
    log_x: bool = False,
    **kwargs: Any,
) -> Axes:
    """Plot how many eigenvalues are in each of several bins, on a logarithmic scale.

    Args:
        eigenvalues: Real tensor, of any shape.
        ax: Axis to draw in. Default: a new figure's.
        bins: The number of bins, all of the same width on the horizontal axis.
        log_x: Whether the horizontal axis is logarithmic. Then magnitudes are counted, and zeros
            are left out.
        **kwargs: For matplotlib's ``hist``, for instance ``label``.

    Returns:
        The axis.

    Raises:
        ImportError: If a new axis is needed and matplotlib is not installed.
        ValueError: If there is nothing to show.

    Example:
        >>> import torch
        >>> from curvlinops.plotting import plot_eigenvalue_histogram
        >>> ax = plot_eigenvalue_histogram(torch.randn(100), bins=10)
        >>> int(sum(bar.get_height() for bar in ax.patches))
        100
    """
    values = _numbers(eigenvalues, "eigenvalues")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}.")
    if log_x:
        values = values.abs()
        values = values[values > 0]
    if not len(values):
        kind = "eigenvalues other than zero" if log_x else "eigenvalues"
        raise ValueError(f"There are no {kind} to show: at least one is needed.")
    low, high = values.min(), values.max()
    if low == high:  # one value: a bin around it
        low, high = (low / 2, high * 2) if log_x else (low - 0.5, high + 0.5)
    if log_x:
        edges = torch.linspace(low.log10(), high.log10(), bins + 1, dtype=values.dtype)
        edges = 10**edges
    else:
        edges = torch.linspace(low, high, bins + 1, dtype=values.dtype)
    edges[0], edges[-1] = low, high  # rounding must not lose the ends
    ax = _new_axis() if ax is None else ax
    ax.hist(values.tolist(), bins=edges.tolist(), **kwargs)
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.5)  # single eigenvalues are visible
    if log_x:
        ax.set_xscale("log")
    ax.set_xlabel(r"$|\lambda|$" if log_x else r"eigenvalue $\lambda$")
    ax.set_ylabel("number of eigenvalues")
    return ax


def _numbers(values: Tensor, what: str) -> Tensor:
    """Return finite numbers as a flat tensor in float64 on the CPU."""
    if values.is_complex():
        raise ValueError(f"{what} must be real, got {values.dtype}.")
    flat = values.detach().cpu().double().flatten()
    if not bool(flat.isfinite().all()):
        wrong = flat[~flat.isfinite()]
        raise ValueError(f"{what} must be finite, got {wrong[0].item()}.")
    return flat


def _new_axis() -> Axes:
    """Return the axis of a new figure."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Plotting needs matplotlib, which is no dependency of curvlinops: "
            "pip install matplotlib, or pass the axis to draw in as ax."
        ) from error
    return pyplot.subplots(layout="constrained")[1]
