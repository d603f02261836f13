"""Monte-Carlo: matrices are those of the documented samples, whoever asks, between blocks too."""

from __future__ import annotations

import copy
from typing import Any

import torch
from property_cases import BACKENDS, JOINT, ONE_POSITION, REDUCTIONS, grid, one_datum
from sampled_cases import network, sampled

from curvlinops import (
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
)

SAMPLES, SEED = 3, 17


def options(seed: int = SEED) -> dict[str, Any]:
    return {"mc_samples": SAMPLES, "seed": seed}


@grid(
    "name loss reduction",
    ("mlp", "cnn", "attention"),
    ("mse", "ce", "ce-options", "ce-soft", "bce", "bce-options"),
    REDUCTIONS,
    fast=[("mlp", "mse", "mean"), ("cnn", "bce", "sum"), ("attention", "ce-options", "sum")],
)  # fmt: skip
def test_products_are_those_of_the_dense_matrix(name: str, loss: str, reduction: str) -> None:
    """All products, in any order, and blocks between different layers.

    Catches samples that are drawn anew for each product or column, that are shared by loss terms
    or by layers drawn separately, and a second batch that starts with the samples of the first.
    """
    if (name, loss) == ("attention", "ce-soft"):
        loss = "ce"
    case = network(name, loss, reduction)
    dense = sampled(case, SAMPLES, SEED)
    G = case.build(GGNLinearOperator, **options())
    for columns in ((), (2,), (5,)):
        v = torch.randn(len(dense), *columns, dtype=torch.float64)
        torch.testing.assert_close(G @ v, dense @ v)
        torch.testing.assert_close(
            v.mT @ G if columns else v @ G, (dense @ v).mT if columns else dense @ v
        )
        torch.rand(3)
    torch.testing.assert_close(copy.deepcopy(G).to_dense(), dense)
    between = dense - case.block_diagonal(dense, True)
    torch.testing.assert_close(G.to_dense() - case.block_diagonal(G.to_dense(), True), between)
    assert between.norm() > 0.1 * dense.norm()  # it says something
    diagonal = case.build(GGNDiagonalLinearOperator, **options()).diagonal()
    torch.testing.assert_close(diagonal, dense.diagonal())
    other = case.build(GGNLinearOperator, **options(SEED + 1)).to_dense()
    assert (other - dense).norm() > 0.02 * dense.norm()
    torch.testing.assert_close(other, sampled(case, SAMPLES, SEED + 1))


@grid(
    "architecture activation loss backend",
    ONE_POSITION,
    ("tanh", "sigmoid", "relu"),
    ("mse", "ce-options", "bce-options"),
    BACKENDS,
    fast=[("mlp", "tanh", "mse", "hooks"), ("conv2d", "relu", "ce-options", "hooks"),
          ("skip", "sigmoid", "bce-options", "make_fx")],
)  # fmt: skip
def test_kfac_of_one_datum_is_the_block_diagonal_of_the_same_samples(
    architecture: str, activation: str, loss: str, backend: str
) -> None:
    """KFAC and EKFAC, whose second pass has the same samples; both have the GGN's of the seed."""
    for reduction, joint in zip(
        (*REDUCTIONS, *REDUCTIONS), (*JOINT, *reversed(JOINT)), strict=True
    ):
        case = one_datum(architecture, activation, loss, reduction, (1,), True)
        dense = sampled(case, SAMPLES, SEED)
        G = case.build(GGNLinearOperator, **options()).to_dense()
        torch.testing.assert_close(G, dense)
        for cls in (KFACLinearOperator, EKFACLinearOperator):
            K = case.build(
                cls,
                fisher_type="mc",
                separate_weight_and_bias=not joint,
                backend=backend,
                **options(),
            )
            case.assert_exact(K, dense, joint)
        # which are not the GGN
        assert (dense - case.ggn).norm() > 0.02 * case.ggn.norm()
