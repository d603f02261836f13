"""KFOC is a best Kronecker product: stationary, and as near as a singular value decomposition."""

from __future__ import annotations

from typing import Any

import torch
from property_cases import BACKENDS, JOINT, REDUCTIONS, Problem, draw, grid
from sampled_cases import network, sampled
from torch import Tensor

from curvlinops import KFACLinearOperator, KFOCLinearOperator

SEED, SAMPLES = 3, 2


def build(case: Problem, cls: Any, joint: bool, fisher_type: str, backend: str) -> Any:
    options = {"mc_samples": SAMPLES, "seed": SEED} if fisher_type == "mc" else {}
    return case.build(
        cls,
        fisher_type=fisher_type,
        separate_weight_and_bias=not joint,
        backend=backend,
        loss_terms="exact",
        **options,
    )


def reordered(block: Tensor, d_out: int) -> Tensor:
    """Return the matrix ``[d_out², d_in²]`` that is vec(B) vec(A)ᵀ for B ⊗ A."""
    d_in = len(block) // d_out
    return block.reshape(d_out, d_in, d_out, d_in).transpose(1, 2).reshape(d_out**2, d_in**2)


@grid(
    "name loss fisher_type backend",
    ("mlp", "cnn", "attention"),
    ("mse", "ce-options", "bce-options"),
    ("type-2", "mc"),
    BACKENDS,
    fast=[
        ("mlp", "ce-options", "type-2", "hooks"),
        ("attention", "mse", "mc", "hooks"),
    ],
)
def test_factors_are_stationary_and_optimal(
    name: str, loss: str, fisher_type: str, backend: str
) -> None:
    """First-order optimality in each factor, and the distance of the dense decomposition.

    With the reordered block R: R vec(A) = ‖A‖² vec(B) and Rᵀ vec(B) = ‖B‖² vec(A). Catches KFAC's
    factors, a pair of singular vectors that is not the leading one, and a wrong singular value.
    """
    for reduction, joint in zip(REDUCTIONS, JOINT, strict=True):
        case = network(name, loss, reduction)
        exact = case.ggn
        if fisher_type == "mc":
            exact = sampled(case, SAMPLES, SEED)
        K = build(case, KFOCLinearOperator, joint, fisher_type, backend)
        kfac = build(case, KFACLinearOperator, joint, fisher_type, backend)
        improved = False
        for names, own in case.blocks(exact, joint):
            factors, scale = K.factors(names[0]), own.norm()
            if len(factors) == 1:
                torch.testing.assert_close(factors[0], own, rtol=0, atol=1e-11 * scale.item())
                continue
            B, A = factors
            R = reordered(own, len(B))
            # stationary
            close = {"rtol": 0, "atol": 1e-7 * scale.item() ** 1.5}
            torch.testing.assert_close(R @ A.flatten(), A.square().sum() * B.flatten(), **close)
            torch.testing.assert_close(R.T @ B.flatten(), B.square().sum() * A.flatten(), **close)
            for factor in factors:
                assert torch.equal(factor, factor.T)
                assert torch.linalg.eigvalsh(factor).min() > -1e-12 * factor.norm()
            # the leading singular value, and no other
            U, s, Vh = torch.linalg.svd(R, full_matrices=False)
            assert s[1] < 0.99 * s[0], "the reference is unique"
            torch.testing.assert_close(B.norm() * A.norm(), s[0])
            best = s[0] * torch.outer(U[:, 0], Vh[0])
            ours = torch.outer(B.flatten(), A.flatten())
            torch.testing.assert_close(ours, best, rtol=0, atol=1e-7 * scale.item())
            distance = (own - torch.kron(B, A)).square().sum()
            least = s[1:].square().sum()
            assert (distance - least).abs() <= 1e-6 * least + 1e-14 * scale.square()
            # no neighbour is nearer
            for seed in range(4):
                dB, dA = draw(*B.shape, seed=seed), draw(*A.shape, seed=seed + 9)
                near = torch.kron(B + 1e-3 * B.norm() * dB, A + 1e-3 * A.norm() * dA)
                assert (own - near).square().sum() > distance
            theirs = (own - kfac.block(names[0]).to_dense()).square().sum()
            assert distance <= theirs + 1e-14 * scale.square()
            improved |= bool(distance < 0.99 * theirs)
        assert improved
