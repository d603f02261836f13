"""Errors of solvers, estimators and plots."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
from error_cases import Cases
from torch import Tensor

from curvlinops import (
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
    PyTorchLinearOperator,
    TensorLinearOperator,
    cg,
    eigsh,
    hutchinson_trace,
    hutchpp_trace,
    svds,
    xtrace,
)
from curvlinops.estimators import slq_logdet, slq_trace
from curvlinops.plotting import plot_eigenvalue_histogram, plot_spectral_density
from curvlinops.solvers import nystrom

cases = Cases()

D = 4
I4 = torch.eye(D)
EYE = TensorLinearOperator(I4)
SMALL = TensorLinearOperator(torch.eye(2))
INFINITE = TensorLinearOperator(I4 * torch.inf)
ones = torch.ones(D)
inf = float("inf")


class Untyped(PyTorchLinearOperator):
    """An operator without dtype, on one vector or two, that is the identity times a number."""

    SELF_ADJOINT = True

    def __init__(self, *sizes: int, factor: Any = 1.0):
        shapes = [(size,) for size in sizes]
        super().__init__(shapes, shapes)
        self.factor = factor

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self.factor * x for x in X]


# ---- plotting ------------------------------------------------------------------------------------
cases(
    ValueError,
    r"\[3\] and \[2\]",
    "must have the same number of entries",
    lambda: plot_spectral_density(torch.ones(3), torch.ones(2)),
)
cases(
    ValueError,
    "density has no positive value",
    "a logarithmic axis needs",
    lambda: plot_spectral_density(ones, 0 * ones),
)
cases(
    ValueError, "got 0", "bins must be at least 1", lambda: plot_eigenvalue_histogram(ones, bins=0)
)
cases(
    ValueError,
    "no eigenvalues other than zero",
    "at least one is needed",
    lambda: plot_eigenvalue_histogram(0 * ones, log_x=True),
)
cases(
    ValueError,
    "got torch.complex64",
    "eigenvalues must be real",
    lambda: plot_eigenvalue_histogram(1j * ones),
)
cases(
    ValueError,
    "got inf",
    "eigenvalues must be finite",
    lambda: plot_eigenvalue_histogram(inf * ones),
)


@cases(ImportError, "needs matplotlib", "pip install matplotlib")
def plot_without_matplotlib() -> None:
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        plot_eigenvalue_histogram(ones)


# ---- estimators ----------------------------------------------------------------------------------
cases(
    TypeError,
    "got list",
    "must be a linear operator or a matrix",
    lambda: hutchinson_trace([[1.0]], 2),
)  # type: ignore[arg-type]
cases(ValueError, "got 4", "use 3 or 6", lambda: hutchpp_trace(torch.eye(9), 4))
cases(
    ValueError, "num_matvecs = 6 .* 4 columns", r"use A\.trace\(\)", lambda: hutchpp_trace(EYE, 6)
)
cases(ValueError, "got 2", "num_matvecs >= 4", lambda: xtrace(EYE, 2, return_standard_error=True))
cases(TypeError, "got 1.5", "num_matvecs must be an integer", lambda: hutchinson_trace(EYE, 1.5))  # type: ignore[arg-type]
cases(ValueError, "got 0", "num_matvecs must be at least 1", lambda: hutchinson_trace(EYE, 0))
cases(
    ValueError,
    "Unknown distribution 'uniform'",
    "choose from .*rademacher",
    lambda: hutchinson_trace(EYE, 2, distribution="uniform"),
)  # type: ignore[arg-type]
cases(
    ValueError,
    "generator is on cpu, but .* on meta",
    r"Use torch\.Generator\('meta'\)",
    lambda: hutchinson_trace(torch.eye(3, device="meta"), 2, generator=torch.Generator()),
)
cases(
    ValueError,
    "returned float",
    r"must return a tensor of shape \[2\]",
    lambda: slq_trace(torch.diag(torch.arange(4.0)), lambda x: 1.0, 2),
)  # type: ignore[arg-type, return-value]
cases(
    ValueError,
    r"not finite at 1.000e\+00",
    "Use a function that is finite",
    lambda: slq_trace(EYE, lambda x: x / 0, 2),
)
cases(
    ValueError,
    "not positive definite: .* -1.000e",
    "Add a multiple of the identity",
    lambda: slq_logdet(-I4, 2),
)
cases(
    ValueError, "got 5", "ncv must be at most the dimension 4", lambda: slq_trace(EYE, torch.exp, 5)
)
cases(
    ValueError,
    "got 1",
    "num_repeats >= 2",
    lambda: slq_trace(EYE, torch.exp, 2, 1, return_standard_error=True),
)
cases(
    ValueError,
    "got 5",
    "ncv must be at most the dimension 4",
    lambda: LanczosApproximateSpectrumCached(EYE, 5),
)
cases(
    ValueError,
    "got -1",
    "margin must be a number of at least 0",
    lambda: LanczosApproximateSpectrumCached(EYE, 2, margin=-1),
)
cases(
    ValueError,
    "got nan",
    "boundaries_tol must be a number of at least 0",
    lambda: LanczosApproximateSpectrumCached(EYE, 2, boundaries_tol=float("nan")),
)
cases(
    ValueError,
    "got 3",
    "boundaries must be two numbers",
    lambda: LanczosApproximateSpectrumCached(EYE, 2, boundaries=3),
)  # type: ignore[arg-type]
cases(
    ValueError,
    r"got \(2, 1\)",
    "boundaries must be finite and ascending",
    lambda: LanczosApproximateSpectrumCached(EYE, 2, boundaries=(2, 1)),
)
cases(
    ValueError,
    "got 1",
    "num_repeats >= 2",
    lambda: LanczosApproximateSpectrumCached(EYE, 2).approximate_spectrum(
        return_standard_error=True
    ),
)
cases(
    ValueError,
    r"got \(-1, 1\)",
    "boundaries are of magnitudes, not negative",
    lambda: LanczosApproximateLogSpectrumCached(EYE, 2, boundaries=(-1, 1)),
)
cases(
    ValueError,
    "got 0",
    "epsilon must be a positive number",
    lambda: LanczosApproximateLogSpectrumCached(EYE, 2).approximate_log_spectrum(epsilon=0),
)
cases(
    ValueError,
    "got 1",
    "kappa must be a number greater than 1",
    lambda: LanczosApproximateSpectrumCached(EYE, 2).approximate_spectrum(kappa=1),
)
# ---- solvers: arguments --------------------------------------------------------------------------
cases(TypeError, "got Tensor", "wrap a matrix in TensorLinearOperator", lambda: cg(I4, ones))  # type: ignore[arg-type]
cases(
    ValueError,
    r"maps \[\(2,\)\] to \[\(4,\)\]",
    "needs an operator from a space to itself",
    lambda: cg(TensorLinearOperator(torch.ones(4, 2)), ones),
)
cases(TypeError, "got 'a'", "tolerance must be a number", lambda: cg(EYE, ones, tolerance="a"))  # type: ignore[arg-type]
cases(
    ValueError,
    "got -1.0",
    "tolerance must be a finite number of at least 0",
    lambda: cg(EYE, ones, tolerance=-1),
)
cases(
    TypeError, "got 1.5", "max_iter must be an integer or None", lambda: cg(EYE, ones, max_iter=1.5)
)  # type: ignore[arg-type]
cases(ValueError, "got -1", "max_iter must be at least 0", lambda: cg(EYE, ones, max_iter=-1))
cases(
    ValueError,
    r"Dense\(2×2\)> maps \[\(2,\)\]",
    "must be that of A",
    lambda: cg(EYE, ones, preconditioner=SMALL),
)
cases(
    TypeError,
    "got Tensor",
    "wrap a matrix in TensorLinearOperator",
    lambda: cg(EYE, ones, preconditioner=I4),
)  # type: ignore[arg-type]
cases(
    ValueError,
    "returned float",
    r"must return a tensor of shape \[4, 1\]",
    lambda: cg(EYE, ones, preconditioner=lambda r: 1.0),
)  # type: ignore[arg-type, return-value]
cases(
    ValueError, "torch.float32, but b has torch.float64", r"\.to\(", lambda: cg(EYE, ones.double())
)
cases(
    ValueError,
    "tensors of b have torch.float32, torch.float64",
    r"\.to\(",
    lambda: cg(Untyped(2, 2), [torch.ones(2), torch.ones(2).double()]),
)
cases(
    ValueError,
    "got torch.int64",
    "b must be of floating-point",
    lambda: cg(Untyped(4), ones.long()),
)
cases(
    ValueError,
    "x0 has 2 columns, but b has 1",
    "x0 needs as many as b",
    lambda: cg(EYE, ones, x0=I4[:, :2]),
)
cases(
    ValueError,
    "x0 has torch.float64 on cpu, but b has torch.float32",
    r"\.to\(",
    lambda: cg(Untyped(4), ones, x0=ones.double()),
)
# ---- solvers: eigenpairs -------------------------------------------------------------------------
cases(ValueError, "got 4 columns", "v0 must be one vector", lambda: eigsh(EYE, 1, v0=I4))
cases(
    ValueError,
    "got only zeros",
    "v0 must be finite and not zero",
    lambda: eigsh(EYE, 1, v0=0 * ones),
)
cases(
    ValueError,
    "got NaN or infinities",
    "v0 must be finite and not zero",
    lambda: eigsh(EYE, 1, v0=inf * ones),
)
cases(
    ValueError,
    "has no dtype, but its product is complex",
    "dtype, or a property",
    lambda: eigsh(Untyped(4, factor=1 + 1j), 1, ncv=2),
)
cases(ValueError, "with a unit vector is not finite", "Check", lambda: eigsh(INFINITE, 1, ncv=2))
cases(ValueError, "products of <4×4 .* not finite", "Check", lambda: eigsh(INFINITE, 1))
cases(TypeError, "got k = 4", r"use torch\.linalg\.eigh", lambda: eigsh(EYE, 4))
cases(ValueError, "Unknown which = 'XX'", "choose from", lambda: eigsh(EYE, 1, which="XX"))
cases(
    ValueError,
    "got 1 with k = 1 and D = 4",
    "must satisfy k < ncv <= D",
    lambda: eigsh(EYE, 1, ncv=1),
)
cases(ValueError, "got 5", "rank must be at most the dimension 4", lambda: nystrom(EYE, 5))
cases(
    ValueError,
    "got -1",
    "shift must be 'auto' or a positive number",
    lambda: nystrom(EYE, 2, shift=-1),
)  # type: ignore[arg-type]
cases(ValueError, "products of <4×4 .* not finite", "Check", lambda: nystrom(INFINITE, 2))
cases(
    ValueError,
    "not positive semi-definite: .* is -1.0e",
    "pass a larger shift",
    lambda: nystrom(TensorLinearOperator(-I4), 2),
)
cases(ValueError, "got k = 4", r"use torch\.linalg\.svd", lambda: svds(EYE, 4))
cases(ValueError, "Unknown which = 'XX'", "choose 'LM' or 'SM'", lambda: svds(EYE, 1, which="XX"))
