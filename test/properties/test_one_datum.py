"""One datum, or copies of it: KFAC is exact for any network and loss with one position."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from property_cases import (
    BACKENDS,
    JOINT,
    ONE_POSITION,
    REDUCTIONS,
    C,
    Problem,
    chain,
    draw,
    grid,
    linears,
    one_datum,
    problem,
)
from torch import Tensor

from curvlinops import KFACLinearOperator
from curvlinops.risk import losses

ACTS = ("tanh", "sigmoid", "relu")  # after every layer, the last one included
EXACT_LOSSES = ("mse", "ce", "ce-options", "ce-soft", "bce", "bce-options")


@grid(
    "architecture activation loss backend",
    ONE_POSITION,
    ACTS,
    EXACT_LOSSES,
    BACKENDS,
    fast=[
        ("mlp", "tanh", "mse", "hooks"),
        ("skip", "sigmoid", "ce-options", "hooks"),
        ("conv1d", "relu", "bce-options", "hooks"),
    ],
)
def test_type2_is_the_ggn_and_empirical_the_empirical_fisher(
    architecture: str, activation: str, loss: str, backend: str
) -> None:
    """Each block, for one datum, N equal data, and N copies of an input with other targets.

    Catches a factor that is averaged (or not) twice over N, a scale that differs between
    reductions, gradients of the mean loss that are squared, and a missing column of the bias.
    """
    for (sizes, same), reduction, joint in product(
        [((1,), True), ((2, 1), True), ((1, 3), False)], REDUCTIONS, JOINT
    ):
        case = one_datum(architecture, activation, loss, reduction, sizes, same)
        for fisher_type in ("type-2", "empirical"):
            # each approximation with each of the other options
            approx = ("expand", "reduce")[(joint + (fisher_type == "type-2") + len(sizes)) % 2]
            K = case.build(
                KFACLinearOperator,
                fisher_type=fisher_type,
                kfac_approx=approx,
                separate_weight_and_bias=not joint,
                backend=backend,
            )
            case.assert_exact(K, case.exact(fisher_type), joint)


# ---- Monte-Carlo ---------------------------------------------------------------------------------
def fourth_moments(case: Problem, joint: bool) -> Tensor:
    """Return E‖u uᵀ‖² − ‖E u uᵀ‖², summed over blocks, of a would-be gradient u of one datum."""
    f = case.predict(case.theta).flatten()
    summed = case.loss_hessian / case.scale
    total = torch.zeros((), dtype=torch.float64)
    for names in case.groups(joint):
        J = case.jacobian[:, case.places(names)]
        M = J.T @ summed @ J
        if case.is_cross_entropy:
            p = f.softmax(0)
            k = summed.trace() / (1 - p.square().sum())
            vectors, weights = k.sqrt() * (p - torch.eye(C).double()), p
        elif not isinstance(case.loss, torch.nn.MSELoss):
            p = f.sigmoid()
            k = summed.diagonal() / (p * (1 - p))
            labels = torch.tensor(list(product([0.0, 1.0], repeat=C))).double()
            vectors = k.sqrt() * (p - labels)
            weights = (labels * p + (1 - labels) * (1 - p)).prod(1)
        else:  # Gaussian: E‖u‖⁴ = (tr M)² + 2 ‖M‖²
            total += M.trace() ** 2 + M.square().sum()
            continue
        fourth = weights @ (vectors @ J).square().sum(1).square()
        torch.testing.assert_close((vectors @ J).T @ (weights[:, None] * (vectors @ J)), M)
        total += fourth - M.square().sum()
    return total


def convergence(architecture: str, activation: str, loss: str, backend: str) -> list[float]:
    """Return squared errors over their expectations, for growing numbers of samples."""
    runs = [(1, 40), (400, 3), (4000, 4)]
    if backend == "make_fx":  # each sample is part of the trace
        runs = [(1, 8), (4000, 4)]
    ratios = []
    for index, (copies, samples) in enumerate(runs):
        reduction, joint = REDUCTIONS[index % 2], JOINT[(index + 1) % 2]
        case = one_datum(architecture, activation, loss, reduction, (1,), True)
        X = case.X.repeat(copies, *[1] * (case.X.ndim - 1))
        data = [(X, case.y.repeat_interleave(copies, 0))]
        K = Problem(case.model, case.loss, case.params, data).build(
            KFACLinearOperator,
            fisher_type="mc",
            mc_samples=samples,
            seed=3 * index,
            separate_weight_and_bias=not joint,
            backend=backend,
        )
        # as if for one datum: a sum has one term for each copy
        K = K.to_dense() / (copies if reduction == "sum" else 1)
        limit = case.block_diagonal(case.ggn, joint)
        variance = case.scale**2 * fourth_moments(case, joint) / (copies * samples)
        ratios.append(((K - limit).square().sum() / variance).item())
    assert 3 * variance.sqrt() < 0.1 * limit.norm()  # the last one says something
    return ratios


@grid(
    "architecture activation loss backend",
    ONE_POSITION,
    ACTS,
    ("mse", "ce", "ce-options", "bce", "bce-options"),
    BACKENDS,
    fast=[
        ("mlp", "tanh", "mse", "hooks"),
        ("conv2d", "sigmoid", "ce-options", "hooks"),
    ],
)
def test_monte_carlo_converges_to_the_ggn(
    architecture: str, activation: str, loss: str, backend: str
) -> None:
    """The error is that of a mean of independent samples, whose variance is known in closed form.

    Samples come from `mc_samples`, and from copies. Catches a wrong scale of the samples, samples
    shared between data, and the empirical Fisher.
    """
    ratios = convergence(architecture, activation, loss, backend)
    assert all(1e-4 < ratio < 9 for ratio in ratios), ratios


@grid("loss", ["mse", "ce", "bce"], fast=[("mse",)])
def test_tolerance_of_monte_carlo_is_narrow(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are 4 % too large do not pass the test above."""
    cls = {"mse": losses.MSE, "ce": losses.CrossEntropy, "bce": losses.BCEWithLogits}[loss]
    right = cls.sample
    monkeypatch.setattr(cls, "sample", lambda *args: 1.04 * right(*args))
    assert convergence("mlp", "tanh", loss, "hooks")[-1] > 9


# ---- where it must not be exact ------------------------------------------------------------------
@grid("loss backend", ["mse", "ce", "bce"], BACKENDS, fast=[("ce", "hooks")])
def test_different_data_differ(loss: str, backend: str) -> None:
    """With two inputs, nothing is exact any more: the tests above are about copies."""
    for reduction, joint in product(REDUCTIONS, JOINT):
        inputs = [draw(1, 3, seed=1), draw(1, 3, seed=2)]
        case = problem(chain(*linears(3, 4, 2, C), activation="tanh"), loss, reduction, inputs)
        for fisher_type in ("type-2", "empirical"):
            K = case.build(
                KFACLinearOperator,
                fisher_type=fisher_type,
                separate_weight_and_bias=not joint,
                backend=backend,
            )
            errors = case.errors(K.to_dense(), case.exact(fisher_type), joint)
            # the block of a bias alone is the exact one
            for name, error in errors.items():
                assert error < 1e-10 if name.endswith("bias") else error > 1e-2, errors
