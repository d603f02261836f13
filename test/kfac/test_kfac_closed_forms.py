"""KFAC as an operator, against dense matrices: closed forms, damped inverses, algebra, formats."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from kfac_cases import setup
from kfac_reference import assemble
from torch import Tensor

from curvlinops import (
    EighDecomposedLinearOperator,
    IdentityLinearOperator,
    KFACLinearOperator,
    KroneckerProductLinearOperator,
)
from curvlinops.testing import check_operator

DAMPING = 0.03
JOINT = pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])


@cache
def full_rank(joint: bool) -> KFACLinearOperator:
    """Return KFAC of full rank: as many positions and vectors as its factors are wide."""
    return KFACLinearOperator(
        **setup("attention", "mse", "sum").kwargs(),
        fisher_type="type-2",
        separate_weight_and_bias=not joint,
    )


@cache
def singular(joint: bool) -> KFACLinearOperator:
    """Return KFAC with singular factors, of convolutions too."""
    return KFACLinearOperator(
        **setup("cnn", "ce").kwargs(), fisher_type="empirical", separate_weight_and_bias=not joint
    )


def from_blocks(K: KFACLinearOperator, function: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Return the dense matrix whose blocks are a function of the blocks' factors."""
    factors = [K.factors(next(iter(group.values()))) for group in K.mapping]
    blocks = [(group, function(f)) for group, f in zip(K.mapping, factors, strict=True)]
    return assemble(setup("attention", "mse", "sum").params, blocks)


def check_closed_forms(A: Any, matrix: Tensor) -> None:
    """Compare what every structured operator has with the dense matrix."""
    torch.testing.assert_close(A.to_dense(), matrix)
    torch.testing.assert_close(A.trace(), matrix.trace())
    torch.testing.assert_close(A.diagonal(), matrix.diagonal())
    torch.testing.assert_close(A.frobenius_norm(), torch.linalg.matrix_norm(matrix))
    sign, logabsdet = torch.linalg.slogdet(matrix)
    torch.testing.assert_close(A.logdet(), logabsdet)
    torch.testing.assert_close(A.det(), sign * logabsdet.exp())
    torch.testing.assert_close(A.slogdet(), (sign, logabsdet))


# ---- closed forms --------------------------------------------------------------------------------
@JOINT
def test_closed_forms(joint: bool):
    K = full_rank(joint)
    matrix = K.to_dense()
    assert torch.linalg.matrix_rank(matrix) == len(matrix)
    check_closed_forms(K, matrix)
    check_closed_forms(3 * K, 3 * matrix)
    check_closed_forms(K / 2, matrix / 2)
    check_closed_forms(K.T, matrix)
    check_closed_forms(K + DAMPING * IdentityLinearOperator(K.in_shape, K.device, K.dtype),
                       matrix + DAMPING * torch.eye(len(matrix)).double())  # fmt: skip
    check_closed_forms(K.power(2), matrix @ matrix)
    check_closed_forms(K.sqrt() @ K.sqrt(), matrix)
    check_closed_forms(K.eigh(), matrix)
    check_closed_forms(K @ K, matrix @ matrix)
    torch.testing.assert_close(K.power(-0.5).to_dense() @ K.sqrt().to_dense(),
                               torch.eye(len(matrix)).double())  # fmt: skip
    values = torch.cat([block.eigenvalues for block in K.eigh()[1]])
    torch.testing.assert_close(values.sort().values, torch.linalg.eigvalsh(matrix))


@JOINT
def test_singular(joint: bool):
    K = singular(joint)
    matrix = K.to_dense()
    assert torch.linalg.matrix_rank(matrix) < len(matrix)
    torch.testing.assert_close(K.trace(), matrix.trace())
    torch.testing.assert_close(K.diagonal(), matrix.diagonal())
    torch.testing.assert_close(K.frobenius_norm(), torch.linalg.matrix_norm(matrix))
    assert K.det().abs() < 1e-12
    assert not K.logdet() > -100  # -inf, or NaN or tiny from rounding
    eye = torch.eye(len(matrix)).double()
    exact = K.inverse(damping=DAMPING, use_exact_damping=True)
    torch.testing.assert_close(exact.to_dense() @ (matrix + DAMPING * eye), eye)
    for strategy in ({}, {"use_heuristic_damping": True}, {"use_exact_damping": True}):
        assert K.inverse(damping=DAMPING, **strategy).to_dense().isfinite().all()


# ---- damping -------------------------------------------------------------------------------------
def _plain(factors: list[Tensor], damping: float = DAMPING) -> Tensor:
    inverses = [torch.linalg.inv(f + damping * torch.eye(len(f)).double()) for f in factors]
    return inverses[0] if len(inverses) == 1 else torch.kron(*inverses)


def _heuristic(factors: list[Tensor]) -> Tensor:
    eyes = [torch.eye(len(f)).double() for f in factors]
    if len(factors) == 1:
        return torch.linalg.inv(factors[0] + DAMPING * eyes[0])
    B, A = factors
    m_B, m_A = B.trace() / len(B), A.trace() / len(A)
    B = B + (DAMPING * m_B / m_A).sqrt() * eyes[0]
    A = A + (DAMPING * m_A / m_B).sqrt() * eyes[1]
    return torch.kron(torch.linalg.inv(B), torch.linalg.inv(A))


def _exact(factors: list[Tensor]) -> Tensor:
    whole = factors[0] if len(factors) == 1 else torch.kron(*factors)
    return torch.linalg.inv(whole + DAMPING * torch.eye(len(whole)).double())


STRATEGIES = {
    "none": ({}, lambda factors: _plain(factors, 0.0)),
    "plain": ({"damping": DAMPING}, _plain),
    "heuristic": ({"damping": DAMPING, "use_heuristic_damping": True}, _heuristic),
    "exact": ({"damping": DAMPING, "use_exact_damping": True}, _exact),
}


@JOINT
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inverse(strategy: str, joint: bool):
    K = full_rank(joint)
    arguments, function = STRATEGIES[strategy]
    inverse = K.inverse(**arguments)
    expected = from_blocks(K, function)
    check_closed_forms(inverse, expected)
    torch.testing.assert_close(inverse.inverse().to_dense(), torch.linalg.inv(expected))
    if strategy != "plain" or not joint:
        return
    # the strategies differ, and the minimum is honoured
    assert not torch.allclose(expected, from_blocks(K, _heuristic))
    assert not torch.allclose(expected, from_blocks(K, _exact))
    least = K.inverse(damping=1e-9, use_heuristic_damping=True, min_damping=DAMPING)
    torch.testing.assert_close(least.to_dense(), expected)


def test_inverse_of_both_strategies():
    with pytest.raises(ValueError, match="use_exact_damping"):
        full_rank(True).inverse(use_exact_damping=True, use_heuristic_damping=True)


@JOINT
def test_products_with_the_inverse_do_not_grow(joint: bool):
    K = full_rank(joint)
    product = K @ K.inverse() @ K
    assert len(product) == 3
    assert all(isinstance(b, KroneckerProductLinearOperator) for b in product[1])
    torch.testing.assert_close(product.to_dense(), K.to_dense())
    exact = K.inverse(damping=DAMPING, use_exact_damping=True)
    assert all(isinstance(block, EighDecomposedLinearOperator) for block in exact[1])


# ---- what KFAC is --------------------------------------------------------------------------------
@JOINT
def test_is_a_chain(joint: bool):
    K = full_rank(joint)
    P, B, PT = K
    assert K.SELF_ADJOINT
    assert (len(K), len(B)) == (3, len(K.mapping))
    assert type(K._operator).__name__ == "_ChainPyTorchLinearOperator"
    torch.testing.assert_close(P.to_dense() @ B.to_dense() @ PT.to_dense(), K.to_dense())
    torch.testing.assert_close(P.to_dense().T, PT.to_dense())
    for group, block in zip(K.mapping, B, strict=True):
        for name in group.values():
            assert K.block(name) is block
            assert [a is b for a, b in zip(K.factors(name), block, strict=True)]
    with pytest.raises(ValueError, match=r"no parameter 'nose'.*'out.weight'"):
        K.block("nose")
    assert "KFAC" in repr(K)


@JOINT
@pytest.mark.parametrize("make", [full_rank, singular])
def test_conforms(make: Callable[[bool], KFACLinearOperator], joint: bool):
    K = make(joint)
    check_operator(K, K.to_dense())


@JOINT
def test_formats(joint: bool):
    K, params = full_rank(joint), setup("attention", "mse", "sum").params
    matrix = K.to_dense()
    sizes = [p.numel() for p in params.values()]
    for columns in ((), (3,)):
        x = torch.rand(len(matrix), *columns).double()
        y = matrix @ x
        torch.testing.assert_close(K @ x, y)
        parts = [
            part.reshape(*p.shape, *columns)
            for part, p in zip(x.split(sizes), params.values(), strict=True)
        ]
        expected = [
            part.reshape(*p.shape, *columns)
            for part, p in zip(y.split(sizes), params.values(), strict=True)
        ]
        torch.testing.assert_close(K @ parts, expected)
        torch.testing.assert_close(K @ tuple(parts), tuple(expected))
        as_dict = K @ dict(zip(params, parts, strict=True))
        assert list(as_dict) == list(params)
        torch.testing.assert_close(list(as_dict.values()), expected)
        shuffled = dict(sorted(zip(params, parts, strict=True), reverse=True))
        torch.testing.assert_close(dict(K @ shuffled), as_dict)
        inverse = K.inverse(damping=DAMPING) @ dict(zip(params, parts, strict=True))
        assert list(inverse) == list(params)
        rows = torch.rand(*columns, len(matrix)).double()
        torch.testing.assert_close(rows @ K, rows @ matrix)


@JOINT
def test_order_of_parameters(joint: bool):
    """Another order of the parameters permutes rows and columns."""
    problem = setup("attention", "mse", "sum")
    names = ["out.bias", "qkv.weight", "out.weight"]
    assert sorted(names) == sorted(problem.params)
    other = replace(problem, params={name: problem.params[name] for name in names})
    K = KFACLinearOperator(
        **other.kwargs(), fisher_type="type-2", separate_weight_and_bias=not joint
    )
    numbers, start = {}, 0
    for name, p in problem.params.items():
        numbers[name] = torch.arange(start, start + p.numel())
        start += p.numel()
    order = torch.cat([numbers[name] for name in names])
    torch.testing.assert_close(K.to_dense(), full_rank(joint).to_dense()[order][:, order])


@JOINT
def test_copies_and_casts(joint: bool):
    K = full_rank(joint)
    before = K.to_dense()
    single = K.to(torch.float32)
    assert type(single) is KFACLinearOperator
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.to_dense(), before.float())
    assert single.summary() == K.summary()
    other = copy.deepcopy(K)
    assert type(other) is KFACLinearOperator
    other.factors("out.weight")[0].zero_()
    assert not torch.allclose(other.to_dense(), before)
    assert torch.equal(K.to_dense(), before)


def test_assigned_factors_count():
    """Nothing stale is kept when a factor or a block is replaced."""
    K = copy.deepcopy(full_rank(True))
    B, A = K.factors("out.weight")
    K.block("out.weight")[0] = 2 * B
    assert K.factors("out.bias")[0] is K.factors("out.weight")[0]
    torch.testing.assert_close(K.block("out.weight").to_dense(), torch.kron(2 * B, A))
    torch.testing.assert_close(K.trace(), K.to_dense().trace())


def test_half_precision():
    """Sums do not stagnate in bfloat16, and factors have the parameters' dtype."""
    whole = setup("inplace", "mse", "sum")
    rows = torch.cat([X for X, _ in whole.data]), torch.cat([y for _, y in whole.data])
    data = [(rows[0].to(torch.bfloat16), rows[1].to(torch.bfloat16))] * 300
    params = {name: p.to(torch.bfloat16) for name, p in whole.params.items()}
    arguments = {"fisher_type": "type-2", "check_deterministic": False}
    model = copy.deepcopy(whole.model).to(torch.bfloat16)
    many = KFACLinearOperator(model, whole.loss, params, data, **arguments)
    one = KFACLinearOperator(model, whole.loss, params, data[:1], **arguments)
    assert many.dtype == torch.bfloat16
    for name in params:
        factors = zip(many.factors(name), one.factors(name), (300, 1), strict=False)
        for actual, single, count in factors:
            torch.testing.assert_close(actual, count * single, rtol=0.02, atol=0)
