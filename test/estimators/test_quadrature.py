"""Tests of stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlinops import TensorLinearOperator
from curvlinops.estimators import hutchinson_trace, slq_logdet, slq_trace
from curvlinops.solvers._lanczos import lanczos_quadrature

F64, C128 = torch.float64, torch.complex128


def hermitian(eigenvalues: Tensor, dtype: torch.dtype = F64) -> Tensor:
    """Return a matrix with these eigenvalues and random eigenvectors."""
    dim = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=dtype))
    matrix = (Q * eigenvalues.to(dtype)) @ Q.mH
    return (matrix + matrix.mH) / 2


@given(
    dim=st.integers(1, 25),
    steps=st.integers(1, 25),
    distinct=st.integers(1, 25),
    is_complex=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_exact_for_polynomials(
    dim: int, steps: int, distinct: int, is_complex: bool, seed: int
) -> None:
    """n nodes integrate polynomials of degree 2n - 1 exactly; fewer if a subspace is invariant.

    Catches weights of the wrong end of the eigenvectors, and steps beyond an invariant subspace.
    """
    torch.manual_seed(seed)
    steps, dtype = min(steps, dim), C128 if is_complex else F64
    spectrum = torch.linspace(-1, 1, distinct, dtype=F64)[torch.arange(dim) % distinct]
    A, v = hermitian(spectrum, dtype), torch.randn(dim, dtype=dtype)
    ((nodes, weights),) = lanczos_quadrature(TensorLinearOperator(A), v.unsqueeze(1), steps)
    assert len(nodes) <= steps
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    values, Q = torch.linalg.eigh(A)
    exact = (Q.mH @ v).abs() ** 2 / v.abs().square().sum()
    for degree in range(2 * steps):
        polynomial = (weights * nodes**degree).sum().item()
        assert polynomial == pytest.approx((exact * values**degree).sum().item(), abs=1e-12)


def test_processes_that_share_products() -> None:
    """They are those of the vectors alone; one that has ended takes no further columns."""
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=F64))
    starts = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]], dtype=F64).T
    columns: list[int] = []

    class Recorder(TensorLinearOperator):
        def _matmat(self, X: Any) -> Any:
            columns.append(X[0].shape[1])
            return super()._matmat(X)

    together = lanczos_quadrature(Recorder(A), starts, 4)
    assert columns == [3, 2, 1, 1]
    for k, (nodes, weights) in enumerate(together):
        ((alone, alone_weights),) = lanczos_quadrature(Recorder(A), starts[:, [k]], 4)
        assert torch.allclose(nodes, alone)
        assert torch.allclose(weights, alone_weights)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7])
@pytest.mark.parametrize("estimate", ["trace", "logdet"])
def test_chunks_have_no_influence(estimate: str, chunk_size: int) -> None:
    A = hermitian(torch.linspace(1, 3, 12, dtype=F64))

    def compute(**options: Any) -> tuple[Tensor, Tensor]:
        options |= {"return_standard_error": True, "generator": torch.Generator().manual_seed(0)}
        if estimate == "trace":
            return slq_trace(A, torch.exp, 5, 5, **options)
        return slq_logdet(A, 5, 5, **options)

    for actual, expected in zip(compute(chunk_size=chunk_size), compute(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_invariant_subspace() -> None:
    """The process ends where nothing is left, without random numbers of its own."""
    state = torch.get_rng_state()
    A = TensorLinearOperator(torch.diag(torch.tensor([2.0, 2.0, 3.0, 3.0], dtype=F64)))
    ((nodes, weights),) = lanczos_quadrature(A, torch.ones(4, 1, dtype=F64), 4)
    assert torch.allclose(nodes, torch.tensor([2.0, 3.0], dtype=F64))
    assert torch.allclose(weights, torch.tensor([0.5, 0.5], dtype=F64))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("function", [torch.exp, torch.log, lambda x: x.abs().sqrt()])
def test_equals_hutchinson_on_the_function(
    function: Callable[[Tensor], Tensor], distribution: Any, dtype: torch.dtype
) -> None:
    """With enough steps it is Hutchinson's estimate for f(A), with its standard error.

    Catches a missing norm of the vector, for normal vectors.
    """
    spectrum = torch.linspace(0.5, 3, 40, dtype=F64)
    A = hermitian(spectrum, dtype)
    values, Q = torch.linalg.eigh(A)
    fA = (Q * function(values).to(dtype)) @ Q.mH
    results = []
    for estimate in (
        lambda **kw: slq_trace(A, function, 30, 7, distribution, **kw),
        lambda **kw: hutchinson_trace(fA, 7, distribution, **kw),
    ):
        generator = torch.Generator().manual_seed(5)
        results.append(estimate(generator=generator, return_standard_error=True))
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours, expected.real, rtol=1e-8)
        assert ours.dtype == F64 and ours.shape == ()


@pytest.mark.parametrize("estimate", ["exp", "logdet"])
def test_unbiased(estimate: str) -> None:
    """The mean of many repeats is within five standard errors, which fall as they should."""
    spectrum = torch.logspace(-2, 0, 25, dtype=F64)
    A = TensorLinearOperator(hermitian(spectrum))
    errors = []
    for repeats in (30, 480):
        if estimate == "exp":
            value, error = slq_trace(A, torch.exp, 10, repeats, return_standard_error=True)
            exact = spectrum.exp().sum()
        else:
            value, error = slq_logdet(A, 25, repeats, return_standard_error=True)
            exact = spectrum.log().sum()
        assert (value - exact).abs() <= 5 * error
        errors.append(error.item())
    assert 3 <= errors[0] / errors[1] <= 5.5  # 4 in theory


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_low_precision(dtype: torch.dtype, tol: float) -> None:
    """Results have the operator's dtype."""
    A = hermitian(torch.linspace(1, 2, 30, dtype=F64))
    results = []
    for matrix in (A, A.to(dtype)):
        torch.manual_seed(0)
        results.append(slq_logdet(matrix, 10))
    assert results[1].dtype == dtype
    assert results[1].item() == pytest.approx(results[0].item(), rel=tol)


@pytest.mark.parametrize(
    "spectrum",
    [
        torch.linspace(-1e-3, 1, 40, dtype=F64),
        -torch.linspace(1, 2, 40, dtype=F64),
        torch.cat([torch.zeros(20, dtype=F64), torch.linspace(1, 2, 20, dtype=F64)]),
        torch.zeros(40, dtype=F64),
    ],
    ids=["indefinite", "negative", "singular", "zero"],
)
def test_logdet_of_not_positive_definite(spectrum: Tensor) -> None:
    """The error says that A is not positive definite, and what to do; there is no NaN."""
    with pytest.raises(ValueError, match=r"not positive definite.*Add a multiple of the identity"):
        slq_logdet(hermitian(spectrum), 38)


def test_bad_functions() -> None:
    """A function that is not finite on the spectrum, or has a wrong result, is refused."""
    A = hermitian(torch.linspace(-1, 1, 20, dtype=F64))
    with pytest.raises(ValueError, match="not finite at -"):
        slq_trace(A, torch.log, 10)
    with pytest.raises(ValueError, match=r"must return a tensor of shape \[10\]"):
        slq_trace(A, torch.sum, 10)
    with pytest.raises(ValueError, match="returned float"):
        slq_trace(A, lambda x: 1.0, 10)  # type: ignore[arg-type, return-value]


def test_bad_arguments() -> None:
    """Arguments out of range are refused by name."""
    A = torch.eye(20)
    for ncv in (0, 21):
        with pytest.raises(ValueError, match="ncv must be"):
            slq_logdet(A, ncv)
    with pytest.raises(ValueError, match="num_repeats must be"):
        slq_logdet(A, 3, 0)
    with pytest.raises(ValueError, match="num_repeats >= 2"):
        slq_logdet(A, 3, 1, return_standard_error=True)
    with pytest.raises(ValueError, match="Unknown distribution"):
        slq_logdet(A, 3, 3, "uniform")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="square"):
        slq_logdet(torch.ones(3, 4), 2)
    with pytest.raises(TypeError):
        slq_trace("A", torch.exp, 2)  # type: ignore[arg-type]
