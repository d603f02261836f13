"""KFAC and EKFAC of every kind of layer, against a slow reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import LAYER_CASES, layer_setup
from layer_reference import (
    assemble_blocks,
    ekfac_eigenvalues,
    exact_block,
    layer_groups,
    reference_blocks,
    without_coupling,
)
from torch import Tensor

from curvlinops import (
    BlockDiagonalLinearOperator,
    EKFACLinearOperator,
    KFACLinearOperator,
)

# PyTorch's own remark about an even kernel with padding "same"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

APPROXIMATIONS = ("expand", "reduce")
CASES = [(name, joint) for name, case in LAYER_CASES.items() for joint in case.joint]
each_case = pytest.mark.parametrize(("name", "joint"), CASES, ids=lambda x: str(x))
each_approx = pytest.mark.parametrize("approx", APPROXIMATIONS)


def build(cls: Any, name: str, joint: bool, approx: str, fisher_type: str, **options: Any) -> Any:
    return cls(
        **layer_setup(name).kwargs(),
        fisher_type=fisher_type,
        kfac_approx=approx,
        separate_weight_and_bias=not joint,
        loss_terms="exact",
        **options,
    )


def assert_close(actual: Tensor, expected: Tensor, scale: float | None = None) -> None:
    """Compare relative to the largest entry."""
    scale = max(expected.abs().max().item(), 1e-9) if scale is None else scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * scale)


@each_approx
@each_case
def test_kfac(name: str, joint: bool, approx: str) -> None:
    problem = layer_setup(name)
    for fisher_type in ("type-2", "empirical", "forward-only"):
        K = build(KFACLinearOperator, name, joint, approx, fisher_type)
        assert [dict(sorted(g.items())) for g in K.mapping] == [
            dict(sorted(g.items())) for g in layer_groups(problem, joint)
        ]
        blocks = reference_blocks(problem, joint, fisher_type, approx)
        for block in blocks:
            assert_close(K.block(next(iter(block.group.values()))).to_dense(), block.dense)
        assert_close(K.to_dense(), assemble_blocks(problem, blocks))


@pytest.mark.parametrize("size", [1, 3])
@each_approx
@each_case
def test_wide_factors(name: str, joint: bool, approx: str, size: int) -> None:
    K = build(KFACLinearOperator, name, joint, approx, "type-2", max_factor_size=size)
    blocks = reference_blocks(layer_setup(name), joint, "type-2", approx, max_factor_size=size)
    assert_close(K.to_dense(), assemble_blocks(layer_setup(name), blocks))
    if size == 1 and any(len(B) > 1 for block in blocks for B, _ in block.parts):
        assert "diagonal only" in K.summary()


@each_approx
@each_case
def test_ekfac(name: str, joint: bool, approx: str) -> None:
    """The eigenvalues are exact in the basis, and the block nearer to the exact one than KFAC's."""
    problem = layer_setup(name)
    for fisher_type in ("type-2", "empirical"):
        E = build(EKFACLinearOperator, name, joint, approx, fisher_type)
        K = build(KFACLinearOperator, name, joint, approx, fisher_type)
        for block in reference_blocks(problem, joint, fisher_type, approx):
            first = next(iter(block.group.values()))
            eigen = E.block(first)
            parts = list(eigen) if isinstance(eigen, BlockDiagonalLinearOperator) else [eigen]
            bases = [[as_tensor(Q) for Q in part.eigenvectors] for part in parts]
            expected = ekfac_eigenvalues(
                problem,
                block,
                [Q[0] for Q in bases],
                [Q[1] if len(Q) > 1 else None for Q in bases],
                fisher_type,
            )
            scale = max(1e-9, *(values.abs().max().item() for values in expected))
            for part, values in zip(parts, expected, strict=True):
                assert_close(part.eigenvalues, values.flatten(), scale)
            # the basis is KFAC's
            kfac = K.block(first)
            for part, basis in zip(
                list(kfac) if isinstance(kfac, BlockDiagonalLinearOperator) else [kfac],
                bases,
                strict=True,
            ):
                for factor, Q in zip(part, basis, strict=True):
                    rotated = Q.T @ as_tensor(factor) @ Q
                    assert_close(rotated, rotated.diag().diag(), rotated.abs().max() + 1e-9)
            exact = without_coupling(block, exact_block(problem, block.group, fisher_type))
            ours, theirs = ((A.to_dense() - exact).norm() for A in (eigen, kfac))
            assert ours <= theirs + 1e-9 * exact.norm() + 1e-12
            assert_close(eigen.trace(), exact.trace(), scale)


def as_tensor(factor: Any) -> Tensor:
    return (factor if isinstance(factor, Tensor) else factor.to_dense()).contiguous()


@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
@each_case
def test_closed_forms(name: str, joint: bool, cls: Any) -> None:
    A = build(cls, name, joint, "expand", "type-2")
    dense = A.to_dense()
    damping = 0.1
    shifted = dense + damping * torch.eye(len(dense), dtype=torch.float64)
    expected = torch.linalg.inv(shifted)
    # KFAC's exact damping is that of the whole block
    options = {"use_exact_damping": True} if cls is KFACLinearOperator else {}
    assert_close(A.inverse(damping=damping, **options).to_dense(), expected)
    assert_close(A.trace(), dense.trace())
    assert_close(A.diagonal(), dense.diagonal())
    assert_close(A.frobenius_norm(), dense.norm())
    # A itself may be singular
    damped = A + damping * A**0
    sign, logabsdet = torch.linalg.slogdet(shifted)
    assert_close(damped.logdet(), logabsdet)
    assert_close(damped.det(), sign * logabsdet.exp())
    assert_close(A.inverse(damping=damping, **options).logdet(), -logabsdet)
    inverse = A.inverse(damping=damping)  # KFAC's damps each factor
    assert_close(inverse.logdet(), torch.linalg.slogdet(inverse.to_dense()).logabsdet)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", [n for n, case in LAYER_CASES.items() if case.exact == "expand"])
def test_exact(name: str, joint: bool) -> None:
    """Deep linear networks with square loss."""
    problem = layer_setup(name)
    K = build(KFACLinearOperator, name, joint, "expand", "type-2")
    for block in reference_blocks(problem, joint, "type-2", "expand"):
        exact = without_coupling(block, exact_block(problem, block.group, "type-2"))
        assert_close(K.block(next(iter(block.group.values()))).to_dense(), exact)
