"""KFAC's factors against a slow reference, for all that changes them."""

from __future__ import annotations

import pytest
import torch
from kfac_cases import BY_NAME, CASES, LOSSES, setup
from kfac_reference import Setup, assemble, groups, reference_factors
from torch import Tensor

from curvlinops import KFACLinearOperator
from curvlinops._random import RandomSource
from curvlinops.computers.kfac_hooks import HooksKFACComputer
from curvlinops.risk import loss_entry

# PyTorch's own remark about an even kernel with padding "same"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

DETERMINISTIC = ("type-2", "empirical", "forward-only")


def assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = max(expected.abs().max().item(), 1e-12)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12 * scale)


def check(
    K: KFACLinearOperator,
    problem: Setup,
    joint: bool,
    fisher_type: str,
    approx: str,
    **given: object,
) -> None:
    """Compare groups, each group's factors, and the whole matrix with the reference."""
    expected = groups(problem, joint)
    assert [dict(sorted(group.items())) for group in K.mapping] == expected
    blocks = []
    for group in expected:
        B, A = reference_factors(problem, group, fisher_type, approx, **given)
        blocks.append((group, B if A is None else torch.kron(B, A)))
        factors = K.factors(next(iter(group.values())))
        assert len(factors) == 1 + (A is not None)
        for actual, reference in zip(factors, (B, A), strict=False):
            assert_close(actual, reference)
    assert_close(K.to_dense(), assemble(problem.params, blocks))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("loss", ["mse", "ce-all"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_architectures(case, loss: str, approx: str):
    problem = setup(case.name, loss)
    for fisher_type in DETERMINISTIC if loss == "mse" else DETERMINISTIC[:2]:
        for joint in case.joint:
            K = KFACLinearOperator(
                **problem.kwargs(),
                fisher_type=fisher_type,
                kfac_approx=approx,
                separate_weight_and_bias=not joint,
                loss_terms="exact",
            )
            check(K, problem, joint, fisher_type, approx)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", ["inplace", "attention-lengths", "pixels"])
def test_losses(case: str, loss: str, reduction: str):
    problem = setup(case, loss, reduction)
    approx = "expand" if reduction == "mean" else "reduce"
    for fisher_type in ("type-2", "empirical"):
        K = KFACLinearOperator(
            **problem.kwargs(), fisher_type=fisher_type, kfac_approx=approx, loss_terms="exact"
        )
        check(K, problem, False, fisher_type, approx)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["mse", "ce", "ce-all", "bce-weight"])
@pytest.mark.parametrize("case", ["inplace", "attention-lengths", "flattened-input"])
def test_given_samples(case: str, loss: str, reduction: str, approx: str):
    """Monte-Carlo: the samples of the loss terms, in the order of the data, back-propagated."""
    problem = setup(case, loss, reduction)
    num_samples, seed = 3, 11
    entry, _ = loss_entry(problem.loss)
    F = torch.cat([example.F for example in problem.examples])
    targets = torch.cat([example.targets for example in problem.examples])
    F, targets = entry.terms(F, targets)
    draws = entry.draws(F.shape[1])
    uniforms = RandomSource(seed).uniforms("samples", 0, len(F), num_samples * draws)
    samples = entry.sample(F, targets, uniforms.reshape(len(F), num_samples, draws))
    sizes = [len(example.F) for example in problem.examples]
    vectors = [list(s / num_samples**0.5) for s in samples.split(sizes, dim=1)]
    K = KFACLinearOperator(
        **problem.kwargs(),
        fisher_type="mc",
        mc_samples=num_samples,
        seed=seed,
        kfac_approx=approx,
        separate_weight_and_bias=False,
    )
    check(K, problem, True, "given", approx, vectors=vectors)


@pytest.mark.parametrize("joint", [False, True])
def test_computer(joint: bool):
    """The public computer returns what the operator is made of."""
    problem = setup("tied-one", "ce")
    options = {"fisher_type": "mc", "mc_samples": 2, "separate_weight_and_bias": not joint}
    inputs, gradients, mapping = HooksKFACComputer(**problem.kwargs(), **options).compute()
    K = KFACLinearOperator(**problem.kwargs(), **options)
    assert [dict(sorted(group.items())) for group in mapping] == groups(problem, joint)
    keys = [tuple(group.values()) for group in mapping]
    assert list(gradients) == keys
    assert list(inputs) == [key for key, group in zip(keys, mapping, strict=True) if "W" in group]
    for key in keys:
        factors = [gradients[key], *([inputs[key]] if key in inputs else [])]
        for actual, expected in zip(factors, K.factors(key[0]), strict=True):
            assert torch.equal(actual, expected)


def test_inference_tensors():
    """Parameters and data that were made in inference mode."""
    problem = setup("residual", "ce")
    with torch.inference_mode():
        params = {name: p.clone() for name, p in problem.params.items()}
        data = [(X.clone(), y.clone()) for X, y in problem.data]
        arguments = problem.kwargs(params=params, data=data)
        inside = KFACLinearOperator(**arguments, fisher_type="type-2")
    for K in (inside, KFACLinearOperator(**arguments, fisher_type="type-2")):
        check(K, problem, False, "type-2", "expand")


@pytest.mark.parametrize("case", [case for case in BY_NAME if not BY_NAME[case].mixing])
def test_signs_cancel_where_positions_do_not_mix(case: str):
    problem = setup(case, "ce")
    for fisher_type in ("type-2", "empirical"):
        K = KFACLinearOperator(**problem.kwargs(), fisher_type=fisher_type)
        check(K, problem, False, fisher_type, "expand")
