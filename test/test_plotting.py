"""Tests of ``curvlinops.plotting``."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import matplotlib
import pytest
import torch

from curvlinops import lanczos_approximate_log_spectrum, lanczos_approximate_spectrum
from curvlinops.plotting import plot_eigenvalue_histogram, plot_spectral_density


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    """Draw without a screen, and close all figures."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield
    pyplot.close("all")


@pytest.mark.parametrize("log_x", [False, True])
def test_spectral_density(log_x: bool) -> None:
    """The curve is the density, on a logarithmic axis whose limits show it; it can be drawn."""
    A = torch.diag(torch.linspace(1, 5, 30, dtype=torch.float64))
    function = lanczos_approximate_log_spectrum if log_x else lanczos_approximate_spectrum
    grid, density = function(A, 20)
    ax = plot_spectral_density(grid, density, log_x=log_x, label="A", color="red")
    (line,) = ax.lines
    assert (line.get_label(), line.get_color()) == ("A", "red")
    assert torch.equal(torch.tensor(line.get_xdata(), dtype=torch.float64), grid)
    visible = density > 1e-8 * density.max()
    drawn = torch.tensor(line.get_ydata(), dtype=torch.float64)
    assert torch.equal(drawn[visible], density[visible])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log" if log_x else "linear", "log")
    assert ax.get_ylim()[0] < density.max() < ax.get_ylim()[1]
    ax.figure.canvas.draw()
    # a second one in the same axis: both stay visible, whichever is higher
    for factor in (1e-3, 1e3):
        assert plot_spectral_density(grid, factor * density, ax=ax) is ax
        assert ax.get_ylim()[1] > max(1.0, factor) * density.max()


@pytest.mark.parametrize("log_x", [False, True])
def test_histogram(log_x: bool) -> None:
    """All eigenvalues are counted, each in its bin; zeros are none on a logarithmic axis."""
    values = torch.tensor([-1.0, 0.0, 0.001, 0.1, 1.0, 1.0])
    ax = plot_eigenvalue_histogram(values, bins=4, log_x=log_x)
    heights = [bar.get_height() for bar in ax.patches]
    # edges: -1, -1/2, 0, 1/2, 1; or 10 to the powers -3, -9/4, -3/2, -3/4, 0
    assert heights == ([1, 0, 1, 3] if log_x else [1, 0, 3, 2])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log" if log_x else "linear", "log")
    assert ax.get_ylim()[0] < 1
    ax.figure.canvas.draw()


@pytest.mark.parametrize("log_x", [False, True])
def test_one_value(log_x: bool) -> None:
    """Equal eigenvalues have a bin, too."""
    ax = plot_eigenvalue_histogram(torch.full((7,), 3.0), log_x=log_x)
    assert sum(bar.get_height() for bar in ax.patches) == 7


def test_bad_input() -> None:
    """What cannot be drawn is refused."""
    with pytest.raises(ValueError, match="same number of entries, but differ in shape"):
        plot_spectral_density(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="no positive value"):
        plot_spectral_density(torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match="must be finite"):
        plot_spectral_density(torch.ones(1), torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match="must be real"):
        plot_eigenvalue_histogram(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="bins must be"):
        plot_eigenvalue_histogram(torch.ones(3), bins=0)
    with pytest.raises(ValueError, match="no eigenvalues"):
        plot_eigenvalue_histogram(torch.zeros(3), log_x=True)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib the error names it, and how to get it."""
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for plot in (
        lambda: plot_spectral_density(torch.ones(3), torch.ones(3)),
        lambda: plot_eigenvalue_histogram(torch.ones(3)),
    ):
        with pytest.raises(ImportError, match="pip install matplotlib"):
            plot()
