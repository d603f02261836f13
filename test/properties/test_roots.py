"""Linear networks with square loss: spectra of Kronecker blocks, and F v = L (Lᵀ v) for roots L."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from property_cases import (
    BACKENDS,
    JOINT,
    REDUCTIONS,
    C,
    Problem,
    chain,
    draw,
    grid,
    linears,
    problem,
)
from torch import Tensor

from curvlinops import (
    BlockDiagonalLinearOperator,
    EFLinearOperator,
    EighDecomposedLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    KroneckerProductLinearOperator,
    PerExampleGradientLinearOperator,
    TensorLinearOperator,
    TransposedJacobianLinearOperator,
)
from curvlinops._random import RandomSource
from curvlinops.risk import loss_entry

SHAPES = ((4,), (3, 4))  # of inputs: vectors, sequences
each_case = grid(
    "shape reduction backend",
    SHAPES,
    REDUCTIONS,
    BACKENDS,
    fast=[((3, 4), "mean", "hooks")],
)


def network(shape: tuple[int, ...], reduction: str) -> Problem:
    """Return a deep linear network whose factors have full rank: it does not widen inside."""
    inputs = [draw(n, *shape, seed=n) for n in (5, 3)]
    return problem(chain(*linears(4, 2, 2, C)), "mse", reduction, inputs)


def kfac(case: Problem, joint: bool, backend: str, cls: Any = KFACLinearOperator) -> Any:
    options = {"fisher_type": "type-2", "loss_terms": "exact", "backend": backend}
    return case.build(cls, separate_weight_and_bias=not joint, **options)


# ---- spectra -------------------------------------------------------------------------------------
@each_case
def test_eigenvalues_are_outer_products(
    shape: tuple[int, ...], reduction: str, backend: str
) -> None:
    """Those of a block B ⊗ A of the GGN are all products of those of B and A, which it equals.

    Catches sums instead of products, and eigenvalues in the order of another Kronecker product.
    """
    case = network(shape, reduction)
    for joint in JOINT:
        K = kfac(case, joint, backend)
        for names, exact in case.blocks(case.ggn, joint):
            factors = K.factors(names[0])
            values = torch.linalg.eigvalsh(factors[0])
            if len(factors) == 2:
                values = torch.outer(values, torch.linalg.eigvalsh(factors[1])).flatten()
            eigen = K.block(names[0]).eigh()
            for own in (values, eigen.eigenvalues):
                torch.testing.assert_close(own.sort().values, torch.linalg.eigvalsh(exact))
            # in the same order: each with its own eigenvector
            Q = eigen.eigenvectors
            Q = Q if isinstance(Q, Tensor) else Q.to_dense()
            torch.testing.assert_close(exact @ Q, Q * eigen.eigenvalues)


# ---- roots ---------------------------------------------------------------------------------------
def check_root(F: Any, L: Any, dense: Tensor) -> None:
    """Check L Lᵀ = F for single vectors and several, where F is a given matrix."""
    for columns in ((), (3,)):
        v = draw(len(dense), *columns, seed=9)
        torch.testing.assert_close(F @ v, dense @ v)
        torch.testing.assert_close(L @ (L.T @ v), dense @ v)
        torch.testing.assert_close(L @ (L.adjoint() @ v), F @ v)


def blockwise(K: Any, root: Callable[[Any], Any]) -> Any:
    """Return P L, with a root for each block."""
    P, blocks, _ = K
    return P @ BlockDiagonalLinearOperator([root(block) for block in blocks])


def cholesky(block: Any) -> Any:
    return KroneckerProductLinearOperator(*(torch.linalg.cholesky(factor) for factor in block))


def scaled_eigenvectors(block: Any) -> Any:
    """Return Q √Λ."""
    eigen = block.eigh()
    Q = eigen.eigenvectors
    Q = Q if isinstance(Q, Tensor) else Q.to_dense()
    return TensorLinearOperator(Q * eigen.eigenvalues.sqrt())


def roots_of_kfac(K: Any) -> Iterator[Any]:
    yield K.sqrt()
    yield blockwise(K, lambda block: block.sqrt())
    yield blockwise(K, scaled_eigenvectors)
    if type(K) is KFACLinearOperator:
        yield blockwise(K, cholesky)


@each_case
def test_roots_of_kronecker_factored_matrices(
    shape: tuple[int, ...], reduction: str, backend: str
) -> None:
    """Symmetric, Cholesky and eigenvector roots, blockwise and with the permutation around.

    Catches a root that is transposed (L needs to be lower), a root of the scale that is applied
    to each factor, and a permutation on the wrong side.
    """
    case = network(shape, reduction)
    for joint, cls in product(JOINT, (KFACLinearOperator, EKFACLinearOperator)):
        K = kfac(case, joint, backend, cls)
        exact = case.block_diagonal(case.ggn, joint)
        assert torch.linalg.eigvalsh(exact).min() > 1e-6
        roots = list(roots_of_kfac(K))
        assert len(roots) == (4 if cls is KFACLinearOperator else 3)
        for L in roots:
            check_root(K, L, exact)
            check_root(3 * K, 3**0.5 * L, 3 * exact)
    assert isinstance(K.block("l0.weight"), EighDecomposedLinearOperator)
    # a root of the transposed factors is none
    wrong = blockwise(kfac(case, False, backend), lambda block: cholesky(block).T)
    v = draw(len(exact))
    assert (wrong @ (wrong.T @ v) - kfac(case, False, backend) @ v).norm() > 1e-2


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_roots_of_exact_matrices(shape: tuple[int, ...], reduction: str) -> None:
    """Jᵀ S of the GGN; gradients of the empirical Fisher; would-be gradients of its estimate."""
    case = network(shape, reduction)
    c = case.scale
    JT = TransposedJacobianLinearOperator(case.model, case.params, case.data)
    check_root(case.build(GGNLinearOperator), (2 * c) ** 0.5 * JT, case.ggn)
    A = case.build(PerExampleGradientLinearOperator)
    check_root(case.build(EFLinearOperator), c**0.5 * A.T, case.ef)
    # samples of the loss terms: Jᵀ g, with a row of g for each sample
    terms, samples = case.y.numel() // C, 4
    entry, _ = loss_entry(case.loss)
    F, y = entry.terms(case.predict(case.theta), case.y)
    uniforms = RandomSource(5).uniforms("samples", 0, terms, samples * C)
    g = entry.sample(F, y, uniforms.reshape(terms, samples, C))  # [samples, terms, C]
    columns = torch.zeros(terms * C, samples * terms, dtype=torch.float64)
    for s, m in product(range(samples), range(terms)):
        columns[m * C : (m + 1) * C, s * terms + m] = g[s, m]
    L = case.jacobian.T @ columns * (c / samples) ** 0.5
    G = case.build(GGNLinearOperator, mc_samples=samples, seed=5)
    check_root(G, TensorLinearOperator(L), L @ L.T)
    S = TensorLinearOperator(columns * (c / samples) ** 0.5)
    v = draw(len(L))
    flat = torch.cat([t.flatten() for t in [JT.T @ v]])
    torch.testing.assert_close(S @ (S.T @ flat), S.to_dense() @ (L.T @ v))
