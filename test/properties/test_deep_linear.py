"""Deep linear networks with square loss: KFAC is exact for any number of different data."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from property_cases import (
    BACKENDS,
    DEEP_LINEAR,
    JOINT,
    REDUCTIONS,
    SEVERAL_POSITIONS,
    C,
    Problem,
    chain,
    deep_linear,
    draw,
    grid,
    linears,
    problem,
)
from torch import Tensor
from torch.nn import functional as F

from curvlinops import EKFACLinearOperator, KFACLinearOperator, KFOCLinearOperator

each_network = grid(
    "architecture backend",
    DEEP_LINEAR,
    BACKENDS,
    fast=[("sequences", "hooks")],
)


def kfac(
    case: Problem, joint: bool, backend: str, cls: Any = KFACLinearOperator, **options: Any
) -> Any:
    arguments = {"fisher_type": "type-2", **options}
    return case.build(cls, separate_weight_and_bias=not joint, backend=backend, **arguments)


@grid(
    "architecture backend",
    DEEP_LINEAR,
    BACKENDS,
    fast=[*product(["vectors", "pixels", "patches"], ["hooks"]), ("sequences", "make_fx")],
)
def test_type2_is_the_ggn(architecture: str, backend: str) -> None:
    """Also with S > 1 positions that are as many loss terms, with both ways to keep these apart.

    Catches input factors that are not divided by all positions, gradient factors that are divided
    by them, batches that are weighted equally, and cross terms between positions.
    """
    for reduction, joint in product(REDUCTIONS, JOINT):
        case = deep_linear(architecture, reduction)
        for loss_terms in ("signs", "exact"):
            K = kfac(case, joint, backend, loss_terms=loss_terms)
            case.assert_exact(K, case.ggn, joint)
        if len(case.groups(joint)) > 1:  # what is between blocks is dropped
            assert (case.ggn - K.to_dense()).norm() > 1e-2 * case.ggn.norm()


@each_network
def test_blocks_in_canonical_form(architecture: str, backend: str) -> None:
    """The Kronecker block of a layer is the full block, with the bias as last column."""
    for reduction, joint in product(REDUCTIONS, JOINT):
        case = deep_linear(architecture, reduction)
        K = kfac(case, joint, backend)
        assert [tuple(group.values()) for group in K.mapping] == case.groups(joint)
        for names, exact in case.blocks(case.ggn, joint):
            block = K.block(names[0])
            torch.testing.assert_close(block.to_dense(), exact, rtol=0, atol=1e-11 * exact.norm())
            assert len(K.factors(names[0])) == (1 if names[0].endswith("bias") else 2)


@grid(
    "architecture backend",
    [name for name in DEEP_LINEAR if name not in SEVERAL_POSITIONS],
    BACKENDS,
    fast=[("vectors", "hooks"), ("conv", "hooks")],
)
def test_reduce_is_exact_for_one_position(architecture: str, backend: str) -> None:
    """There is nothing to pool."""
    for reduction, joint in product(REDUCTIONS, JOINT):
        case = deep_linear(architecture, reduction)
        case.assert_exact(kfac(case, joint, backend, kfac_approx="reduce"), case.ggn, joint)


@grid(
    "architecture backend",
    SEVERAL_POSITIONS,
    BACKENDS,
    fast=[("sequences", "hooks"), ("pixels", "hooks")],
)
def test_reduce_differs_for_several_positions(architecture: str, backend: str) -> None:
    """The loss terms' inputs are not to be averaged. Catches expand that is taken for reduce."""
    for reduction, joint in product(REDUCTIONS, JOINT):
        case = deep_linear(architecture, reduction)
        K = kfac(case, joint, backend, kfac_approx="reduce", loss_terms="exact")
        errors = case.errors(K.to_dense(), case.ggn, joint)
        # gradients of one term are those of one position, so that a bias alone is exact
        for name, error in errors.items():
            assert error < 1e-10 if name.endswith("bias") else error > 1e-2, errors


@each_network
def test_monte_carlo_converges(architecture: str, backend: str) -> None:
    """The input factor is exact; the gradient factor's error is that of Gaussian samples.

    For B = E u uᵀ and T samples u of N(0, B), E‖error‖² = ((tr B)² + ‖B‖²) / T.
    """
    runs = [((3, 2), 40), ((900, 1100), 3)] if backend == "hooks" else [((900, 1100), 3)]
    for (sizes, samples), reduction, joint in product(runs, REDUCTIONS, JOINT):
        case = deep_linear(architecture, reduction, sizes)
        K = kfac(case, joint, backend, fisher_type="mc", mc_samples=samples).to_dense()
        terms = case.y.numel() // C
        limit = kfac(case, joint, backend, loss_terms="exact").to_dense()
        if sum(sizes) < 10:
            limit = case.block_diagonal(case.ggn, joint)
        for names, exact in case.blocks(limit, joint):
            where = case.places(names)
            B = gradient_factor(exact, len(case.params[names[0]]))
            variance = (B.trace() ** 2 / B.square().sum() + 1) / (terms * samples)  # relative
            squared = ((K[where][:, where] - exact).norm() / exact.norm()) ** 2
            assert 1e-4 * variance < squared < 9 * variance, names
        assert sum(sizes) < 10 or 3 * variance.sqrt() < 0.1


def gradient_factor(block: Tensor, d_out: int) -> Tensor:
    """Return the first factor of a Kronecker product, up to a multiple."""
    d_in = len(block) // d_out
    return torch.einsum("oipi->op", block.reshape(d_out, d_in, d_out, d_in))


@each_network
def test_empirical_differs(architecture: str, backend: str) -> None:
    """From the empirical Fisher, and from the GGN; a bias alone is the empirical Fisher's.

    Catches an empirical Fisher that is the GGN in disguise, as with would-be gradients.
    """
    for reduction, joint in product(REDUCTIONS, JOINT):
        case = deep_linear(architecture, reduction)
        K = kfac(case, joint, backend, fisher_type="empirical").to_dense()
        assert min(case.errors(K, case.ggn, joint).values()) > 0.05
        for name, error in case.errors(K, case.ef, joint).items():
            assert error < 1e-10 if name.endswith("bias") else error > 0.02


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_plain_function(reduction: str) -> None:
    """A network that is no module, with a weight that is used through a matrix product."""

    def predict(params: dict[str, Tensor], X: Tensor) -> Tensor:
        h = F.linear(X, params["a.weight"], params["a.bias"])
        return F.linear(h @ params["b.weight"].T, params["c.weight"], params["c.bias"])

    shapes = {
        "a.weight": (4, 3),
        "a.bias": (4,),
        "b.weight": (2, 4),
        "c.weight": (C, 2),
        "c.bias": (C,),
    }
    params = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    case = deep_linear("sequences", reduction)
    case = Problem(predict, case.loss, params, case.data)
    for joint in JOINT:
        case.assert_exact(kfac(case, joint, "make_fx"), case.ggn, joint)


@pytest.mark.parametrize("cls", [EKFACLinearOperator, KFOCLinearOperator])
@grid(
    "architecture backend",
    DEEP_LINEAR,
    BACKENDS,
    fast=[("vectors", "hooks")],
)
def test_refinements_are_exact_too(architecture: str, backend: str, cls: Any) -> None:
    """What is never further from the GGN than KFAC, is the GGN here."""
    for reduction, joint in product(REDUCTIONS, JOINT):
        case = deep_linear(architecture, reduction)
        A = kfac(case, joint, backend, cls, loss_terms="exact").to_dense()
        errors = case.errors(A, case.ggn, joint)
        assert max(errors.values()) < 1e-8, errors


@grid(
    "activation loss backend",
    ["none", "tanh", "sigmoid", "relu"],
    ["mse", "ce", "bce"],
    BACKENDS,
    fast=[("none", "mse", "hooks"), ("tanh", "mse", "hooks"), ("none", "ce", "hooks")],
)
def test_exact_only_for_linear_networks_and_square_loss(
    activation: str, loss: str, backend: str
) -> None:
    """With an activation, or another loss, type-2 differs from the GGN; catches a trivial test."""
    exact = (activation, loss) == ("none", "mse")
    network = chain(*linears(3, 4, 2, C), activation=activation)
    case = problem(network, loss, "mean", [draw(3, 3, seed=1), draw(2, 3, seed=2)])
    for joint in JOINT:
        errors = case.errors(kfac(case, joint, backend).to_dense(), case.ggn, joint)
        if exact:
            assert max(errors.values()) < 1e-10, errors
            continue
        assert errors["l0.weight"] > 0.05, errors
        if not joint:  # with one position, the block of a bias alone is the GGN's
            assert all(errors[f"l{i}.bias"] < 1e-10 for i in range(3)), errors
