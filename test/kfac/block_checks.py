"""Comparisons of Kronecker-factored operators with the slow reference, block by block."""

from __future__ import annotations

from typing import Any

import torch
from kfac_reference import Setup
from layer_reference import (
    Block,
    assemble_blocks,
    ekfac_eigenvalues,
    exact_block,
    layer_examples,
    layer_groups,
    reference_blocks,
    without_coupling,
)
from torch import Tensor

from curvlinops import BlockDiagonalLinearOperator, EKFACLinearOperator, KFACLinearOperator
from curvlinops._random import RandomSource
from curvlinops.risk import loss_entry


def assert_close(actual: Tensor, expected: Tensor, scale: float | None = None) -> None:
    """Compare relative to the largest entry."""
    scale = max(expected.abs().max().item(), 1e-9) if scale is None else scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * scale)


def check_kfac(
    K: KFACLinearOperator,
    problem: Setup,
    joint: bool,
    fisher_type: str,
    approx: str,
    vectors: Any = None,
    **options: Any,
) -> None:
    """Compare groups, each group's block, and the whole matrix; arguments as in the reference."""
    assert [dict(sorted(g.items())) for g in K.mapping] == layer_groups(problem, joint)
    blocks = reference_blocks(problem, joint, fisher_type, approx, vectors, **options)
    compare_blocks(K, blocks)
    assert_close(K.to_dense(), assemble_blocks(problem, blocks))


def compare_blocks(K: KFACLinearOperator, blocks: list[Block]) -> None:
    """Compare an operator's blocks with some of the reference."""
    for block in blocks:
        assert_close(K.block(first_name(block)).to_dense(), block.dense)


def check_ekfac(
    E: EKFACLinearOperator,
    problem: Setup,
    joint: bool,
    fisher_type: str,
    approx: str,
    vectors: Any = None,
) -> None:
    """Compare groups, basis and eigenvalues of each block; arguments as in the reference."""
    assert [dict(sorted(g.items())) for g in E.mapping] == layer_groups(problem, joint)
    blocks = reference_blocks(problem, joint, fisher_type, approx, vectors)
    compare_eigenvalues(E, problem, blocks, fisher_type, vectors)


def compare_eigenvalues(
    E: EKFACLinearOperator,
    problem: Setup,
    blocks: list[Block],
    fisher_type: str,
    vectors: Any = None,
) -> None:
    """Compare basis and eigenvalues of an operator's blocks with some of the reference.

    The basis has to make the reference's factors diagonal. The eigenvalues are the exact diagonal
    in it, so that the block has the exact trace, and is not further from the exact one than KFAC.
    """
    for block in blocks:
        eigen = E.block(first_name(block))
        parts = parts_of(eigen)
        bases = [[as_tensor(Q) for Q in part.eigenvectors] for part in parts]
        for basis, factors in zip(bases, block.parts, strict=True):
            given = [factor for factor in factors if factor is not None]
            for Q, factor in zip(basis, given, strict=True):
                rotated = Q.T @ factor @ Q
                assert_close(rotated, rotated.diag().diag(), rotated.abs().max() + 1e-9)
                assert_close(Q.T @ Q, torch.eye(len(Q), dtype=Q.dtype))
        Q_g = [Q[0] for Q in bases]
        Q_a = [Q[1] if len(Q) > 1 else None for Q in bases]
        expected = ekfac_eigenvalues(problem, block, Q_g, Q_a, fisher_type, vectors)
        scale = max(1e-9, *(values.abs().max().item() for values in expected))
        for part, values in zip(parts, expected, strict=True):
            assert_close(part.eigenvalues, values.flatten(), scale)
        exact = without_coupling(block, exact_block(problem, block.group, fisher_type, vectors))
        assert_close(eigen.trace(), exact.trace(), scale)
        ours, theirs = ((A - exact).norm() for A in (eigen.to_dense(), block.dense))
        assert ours <= theirs + 1e-9 * exact.norm() + 1e-12


def first_name(block: Block) -> str:
    """Return the name of a block's first parameter."""
    return next(iter(block.group.values()))


def parts_of(block: Any) -> list[Any]:
    """Return the blocks of the parts of a weight, as convolution groups."""
    return list(block) if isinstance(block, BlockDiagonalLinearOperator) else [block]


def as_tensor(factor: Any) -> Tensor:
    """Return a factor, or the eigenvectors of one, as dense matrix."""
    return (factor if isinstance(factor, Tensor) else factor.to_dense()).contiguous()


def given_samples(problem: Setup, num_samples: int, seed: int) -> list[list[Tensor]]:
    """Return the Monte-Carlo vectors ``[R, C]`` of each example, in the order of the data."""
    entry, _ = loss_entry(problem.loss)
    examples = layer_examples(problem)
    F, targets = entry.terms(
        torch.cat([example.F for example in examples]),
        torch.cat([example.targets for example in examples]),
    )
    draws = entry.draws(F.shape[1])
    uniforms = RandomSource(seed).uniforms("samples", 0, len(F), num_samples * draws)
    samples = entry.sample(F, targets, uniforms.reshape(len(F), num_samples, draws))
    sizes = [len(example.F) for example in examples]
    return [list(s / num_samples**0.5) for s in samples.split(sizes, dim=1)]


def kept_apart(vectors: list[list[Tensor]]) -> list[list[Tensor]]:
    """Return R vectors with one loss term each in place of each vector ``[R, C]``."""
    return [[row.unsqueeze(1) * v for v in own for row in torch.eye(len(v))] for own in vectors]
