"""Deep linear networks that pool positions: where reduce is exact and expand is not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from property_cases import (
    ACTIVATIONS,
    BACKENDS,
    JOINT,
    REDUCTIONS,
    C,
    Problem,
    alive,
    chain,
    draw,
    grid,
    linears,
    problem,
)
from torch import Tensor, nn

from curvlinops import KFACLinearOperator

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda h: h.flatten(1, -2).sum(1),
    "mean": lambda h: h.flatten(1, -2).mean(1),
}
#: As images, with channels first.
IMAGE_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda h: h.flatten(2).sum(2),
    "mean": lambda h: h.flatten(2).mean(2),
}


def kfac(case: Problem, joint: bool, backend: str, approx: str, **options: Any) -> Any:
    arguments = {"fisher_type": "type-2", **options}
    return case.build(
        KFACLinearOperator,
        separate_weight_and_bias=not joint,
        backend=backend,
        kfac_approx=approx,
        **arguments,
    )


# ---- where the network pools ---------------------------------------------------------------------
#: The number of layers, the layer after whose output the network pools, the shape of inputs.
PLACES = {
    "final": (3, 2, (4, 3)),
    "final-grid": (2, 1, (2, 3, 3)),
    "inside-1": (3, 0, (4, 3)),
    "inside-2": (4, 1, (4, 3)),
    "inside-grid": (3, 1, (2, 3, 3)),
}


def pooled(place: str, pool: str, reduction: str) -> tuple[Problem, set[str]]:
    """Return a problem, and the names of the parameters before its pooling."""
    depth, after, shape = PLACES[place]
    widths = (*(3, 4, 2, 3, 4)[:depth], C)
    network = chain(*linears(*widths), **{f"l{after}": POOLS[pool]})
    inputs = [draw(n, *shape, seed=n) for n in (3, 2)]
    case = problem(network, "mse", reduction, inputs)
    return case, {name for name in case.params if int(name[1]) <= after}


def pixels(pool: str, reduction: str) -> tuple[Problem, set[str]]:
    """The same for convolutions of single pixels."""
    layers = [nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1), nn.Linear(2, C)]
    network = chain(*layers, l1=IMAGE_POOLS[pool])
    case = problem(network, "mse", reduction, [draw(n, 2, 2, 3, seed=n) for n in (3, 2)])
    return case, {name for name in case.params if int(name[1]) <= 1}


@grid(
    "place pool backend",
    [*PLACES, "pixels"],
    POOLS,
    BACKENDS,
    fast=[("final", "sum", "hooks"), ("final", "mean", "hooks"), ("inside-2", "mean", "hooks"),
          ("pixels", "sum", "hooks")],
)  # fmt: skip
def test_reduce_is_exact_and_expand_only_after_the_pooling(
    place: str, pool: str, backend: str
) -> None:
    """Final pooling, or inside of the network.

    Catches reduce that averages gradients or sums inputs, and one that is expand. After the
    pooling there is one position, so that both approximations are the same; before it even the
    input factors differ.
    """
    for reduction, joint in product(REDUCTIONS, JOINT):
        case, before = (pixels if place == "pixels" else lambda *a: pooled(place, *a))(
            pool, reduction
        )
        reduce, expand = (kfac(case, joint, backend, approx) for approx in ("reduce", "expand"))
        case.assert_exact(reduce, case.ggn, joint)
        errors = case.errors(expand.to_dense(), case.ggn, joint)
        assert before and (before == set(case.params)) == place.startswith("final")
        for name, error in errors.items():
            factors = list(zip(expand.factors(name), reduce.factors(name), strict=True))
            if name not in before:
                assert error < 1e-10, name
                for ours, theirs in factors:
                    torch.testing.assert_close(ours, theirs)
                continue
            assert error > 0.05, name
            for ours, theirs in factors:  # the gradient factor, then the input factor
                assert (ours - theirs).norm() > 0.01 * theirs.norm()


@grid("pool backend", POOLS, BACKENDS, fast=[("mean", "hooks")])
def test_reduce_is_not_exact_with_an_activation_before_the_pooling(pool: str, backend: str) -> None:
    """Then the positions of a layer have gradients of their own."""
    layers = linears(3, 4, 2, C)
    network = chain(*layers, l0=lambda h: torch.tanh(h), l1=POOLS[pool])
    case = problem(network, "mse", "mean", [draw(n, 4, 3, seed=n) for n in (3, 2)])
    for joint in JOINT:
        errors = case.errors(kfac(case, joint, backend, "reduce").to_dense(), case.ggn, joint)
        assert errors["l0.weight"] > 1e-2
        assert errors["l1.weight"] < 1e-10  # one vector of gradients, averaged inputs


# ---- convolutions directly before global pooling -------------------------------------------------
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2), (2, 8)),
    "conv2d": (
        lambda: nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(1, 2)),
        (2, 3, 7),
    ),
    "conv2d-same": (lambda: nn.Conv2d(2, 3, 3, padding="same", bias=False), (2, 3, 4)),
    "conv2d-circular": (
        lambda: nn.Conv2d(2, 3, (2, 3), padding=(1, 2), padding_mode="circular"),
        (2, 3, 4),
    ),
    "conv3d": (lambda: nn.Conv3d(1, 3, 2, padding=(0, 1, 0)), (1, 2, 2, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), (2, 4)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(2, 3, (2, 3), stride=(2, 1), dilation=(1, 2)),
        (2, 2, 3),
    ),
}


def convolved(
    name: str, pool: Callable[[Tensor], Tensor], activation: str, loss: str, reduction: str, n: int
) -> Problem:
    """Return a convolution, pooling, and linear layers, with an activation after each layer."""
    make, shape = CONVOLUTIONS[name]
    conv, act = make(), ACTIVATIONS[activation]()
    layers = [conv, nn.Linear(conv.out_channels, 3), nn.Linear(3, C)]
    network = chain(*layers, l0=lambda h: act(pool(h)), l1=act, l2=act)
    # sums over many positions of small inputs do not saturate activations
    inputs = [0.3 * draw(k, *shape, seed=4 + k) for k in (1, 2)[:n]]
    return alive(lambda seed: problem(network, loss, reduction, inputs, seed))


def convolution_differs(case: Problem, K: Any, exact: Tensor, joint: bool) -> None:
    """Check that the convolution's weight is not exact, in contrast to what follows."""
    errors = case.errors(K.to_dense(), exact, joint)
    assert errors["l0.weight"] > 0.02
    assert all(error < 1e-10 for name, error in errors.items() if name[1] != "0")


@grid(
    "name pool backend",
    CONVOLUTIONS,
    IMAGE_POOLS,
    BACKENDS,
    fast=[("conv1d", "mean", "hooks"), ("conv2d", "sum", "hooks"),
          ("transposed2d", "mean", "hooks")],
)  # fmt: skip
def test_convolution_before_global_pooling_of_a_linear_network(
    name: str, pool: str, backend: str
) -> None:
    """Square loss and any data. Catches patches in another order, and wrong paddings."""
    for reduction, joint in product(REDUCTIONS, JOINT):
        case = convolved(name, IMAGE_POOLS[pool], "none", "mse", reduction, 2)
        case.assert_exact(kfac(case, joint, backend, "reduce"), case.ggn, joint)
        convolution_differs(case, kfac(case, joint, backend, "expand"), case.ggn, joint)


@grid(
    "name pool activation loss backend",
    CONVOLUTIONS,
    IMAGE_POOLS,
    ["tanh", "sigmoid", "relu"],
    ["mse", "ce-options", "bce"],
    BACKENDS,
    fast=[
        ("conv2d", "mean", "tanh", "ce-options", "hooks"),
        ("conv1d", "sum", "sigmoid", "bce", "hooks"),
    ],
)
def test_convolution_before_global_pooling_of_one_datum(
    name: str, pool: str, activation: str, loss: str, backend: str
) -> None:
    """Any activations after the pooling, and any loss; type-2 and empirical."""
    for reduction, joint in product(REDUCTIONS, JOINT):
        case = convolved(name, IMAGE_POOLS[pool], activation, loss, reduction, 1)
        for fisher_type in ("type-2", "empirical"):
            exact = case.exact(fisher_type)
            K = kfac(case, joint, backend, "reduce", fisher_type=fisher_type)
            case.assert_exact(K, exact, joint)
        K = kfac(case, joint, backend, "expand", fisher_type=fisher_type)
        convolution_differs(case, K, exact, joint)
