"""EKFAC's eigenvalues are the best diagonal in KFAC's basis, with the exact trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from property_cases import BACKENDS, JOINT, REDUCTIONS, Problem, draw, grid
from sampled_cases import network, sampled
from torch import Tensor

from curvlinops import EKFACLinearOperator, KFACLinearOperator

SEED, SAMPLES = 3, 2
TYPES = ("type-2", "mc", "empirical")


def exact_matrix(case: Problem, fisher_type: str) -> Tensor:
    """Return the matrix whose blocks are approximated, dense."""
    if fisher_type == "mc":
        return sampled(case, SAMPLES, SEED)
    return case.exact(fisher_type)


def build(
    case: Problem, cls: Any, joint: bool, fisher_type: str, backend: str, **options: Any
) -> Any:
    mc = {"mc_samples": SAMPLES, "seed": SEED} if fisher_type == "mc" else {}
    return case.build(
        cls,
        fisher_type=fisher_type,
        separate_weight_and_bias=not joint,
        backend=backend,
        loss_terms="exact",
        **mc,
        **options,
    )


def basis(block: Any) -> Tensor:
    """Return a block's eigenvectors as dense matrix, from its Kronecker factors."""
    factors = list(block.eigenvectors)
    return factors[0] if len(factors) == 1 else torch.kron(*factors)


@grid(
    "name loss fisher_type backend",
    ("mlp", "cnn", "attention"),
    ("mse", "ce-options", "bce-options"),
    TYPES,
    BACKENDS,
    fast=[
        ("cnn", "bce-options", "mc", "hooks"),
        ("attention", "ce-options", "type-2", "hooks"),
    ],
)
def test_eigenvalues_are_the_best_diagonal(
    name: str, loss: str, fisher_type: str, backend: str
) -> None:
    """In KFAC's own basis, against the dense matrix; with all of Frobenius-optimality.

    Catches eigenvalues of KFAC, squares of summed (instead of summed squares of) gradients, the
    gradients of reduce, another sample in the second pass, and a scale of the first pass alone.
    """
    for reduction, joint in zip((*REDUCTIONS, "sum", "mean"), (*JOINT, *JOINT), strict=True):
        case = network(name, loss, reduction)
        exact = exact_matrix(case, fisher_type)
        approx = "reduce" if joint else "expand"  # the eigenvalues are exact in both bases
        E, K = (
            build(case, cls, joint, fisher_type, backend, kfac_approx=approx)
            for cls in (EKFACLinearOperator, KFACLinearOperator)
        )
        torch.testing.assert_close(E.trace(), exact.trace())
        for names, own in case.blocks(exact, joint):
            block, kfac = E.block(names[0]), K.block(names[0])
            Q, values = basis(block), block.eigenvalues
            eye = torch.eye(len(Q), dtype=Q.dtype)
            torch.testing.assert_close(Q.T @ Q, eye, rtol=0, atol=1e-12)
            # the basis is KFAC's
            rotated = Q.T @ kfac.to_dense() @ Q
            torch.testing.assert_close(
                rotated, rotated.diag().diag(), rtol=0, atol=1e-12 * rotated.norm().item()
            )
            # the diagonal is the exact one, and so is the trace
            scale = own.norm().item()
            torch.testing.assert_close(values, (Q.T @ own @ Q).diag(), rtol=0, atol=1e-12 * scale)
            torch.testing.assert_close(block.trace(), own.trace())
            # the best one: moving it by d adds ‖d‖² to the squared distance
            residual = own - block.to_dense()
            for seed in range(3):
                d = draw(len(values), seed=seed) * scale * 0.01
                other = own - Q @ (values + d).diag() @ Q.T
                torch.testing.assert_close(
                    other.square().sum(), residual.square().sum() + d.square().sum()
                )
            distance = (own - kfac.to_dense()).norm()
            assert residual.norm() <= distance + 1e-12 * scale
        # and better than KFAC, whose own diagonal is another one
        whole = case.block_diagonal(exact, joint)
        ours, theirs = ((A.to_dense() - whole).norm() for A in (E, K))
        assert ours < 0.999 * theirs


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_signs_are_not_exact_where_positions_mix(fisher_type: str) -> None:
    """The exact mode matters: with random signs, the eigenvalues are right in expectation only."""
    case = network("attention", "mse", "mean")
    exact = case.exact(fisher_type)
    options = {"fisher_type": fisher_type, "loss_terms": "signs"}
    E = case.build(EKFACLinearOperator, **options)
    Q = basis(E.block("l0.weight"))
    where = case.places(("l0.weight",))
    values = (Q.T @ exact[where][:, where] @ Q).diag()
    assert (E.block("l0.weight").eigenvalues - values).norm() > 1e-2 * values.norm()
