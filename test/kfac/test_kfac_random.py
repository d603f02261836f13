"""KFAC's random numbers: Monte-Carlo samples and the signs of loss terms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kfac_cases import Lambda, setup
from kfac_reference import Setup, block_diagonal, dense, reference_factors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import KFACLinearOperator
from curvlinops._random import RandomSource
from curvlinops.risk import losses

LOSS_CLASSES = {"mse": losses.MSE, "ce": losses.CrossEntropy, "bce": losses.BCEWithLogits}


def kfac(problem: Setup, fisher_type: str = "mc", **kwargs: Any) -> KFACLinearOperator:
    arguments = {"separate_weight_and_bias": False, **kwargs}
    return KFACLinearOperator(**problem.kwargs(), fisher_type=fisher_type, **arguments)


def rebatched(problem: Setup, sizes: tuple[int, ...]) -> Setup:
    """Return the same data in other batches; all batches have the same positions."""
    X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    return replace(problem, data=list(zip(X.split(sizes), y.split(sizes), strict=True)))


def tiny_attention(loss: nn.Module, *targets: Tensor) -> Setup:
    """Examples of two positions that mix, and two loss terms of two entries."""
    model = Lambda(
        lambda m, x: m.b(torch.softmax(x @ x.mT, -1) @ torch.tanh(m.a(x))).mT,
        a=nn.Linear(3, 2),
        b=nn.Linear(2, 2),
    ).double()
    data = [(torch.rand(len(y), 2, 3).double(), y) for y in targets]
    return Setup(model, loss, dict(model.named_parameters()), data)


def linear(loss: nn.Module, *targets: Tensor) -> Setup:
    """A deep linear network."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    data = [(torch.rand(len(y), 3).double(), y) for y in targets]
    return Setup(model, loss, dict(model.named_parameters()), data)


# ---- convergence ---------------------------------------------------------------------------------
def converges(problem: Setup, limit: Tensor, approx: str) -> bool:
    """Check that 16 times the samples have a quarter of the error, within 5 standard errors.

    Independent, unbiased samples have a mean squared error of 1 / samples; a bias, which does not
    shrink, shows.
    """
    seeds = 12
    squared: dict[int, Tensor] = {}
    for samples in (8, 128):
        errors = [
            kfac(problem, mc_samples=samples, seed=seed, kfac_approx=approx).to_dense() - limit
            for seed in range(seeds)
        ]
        squared[samples] = torch.stack([error.square().sum() for error in errors])
    few, many = squared[8] / 16, squared[128]
    standard_error = ((few.var() + many.var()) / seeds).sqrt()
    return bool((few.mean() - many.mean()).abs() <= 5 * standard_error)


WEIGHT = torch.tensor([0.5, 2.0], dtype=torch.float64)
PROBLEMS: dict[str, Callable[[], Setup]] = {
    "mse": lambda: linear(nn.MSELoss(), *torch.rand(4, 2).double().split([1, 3])),
    "ce": lambda: tiny_attention(
        nn.CrossEntropyLoss(WEIGHT, ignore_index=5), torch.tensor([[0, 1], [5, 1]])
    ),
    "bce": lambda: linear(nn.BCEWithLogitsLoss(pos_weight=WEIGHT), torch.rand(4, 2).double()),
}


@pytest.mark.parametrize(
    ("name", "approx"), [("mse", "expand"), ("ce", "expand"), ("ce", "reduce"), ("bce", "expand")]
)
def test_converges(name: str, approx: str, monkeypatch: pytest.MonkeyPatch):
    problem = PROBLEMS[name]()
    limit = kfac(problem, "type-2", loss_terms="exact", kfac_approx=approx).to_dense()
    if name == "mse":
        torch.testing.assert_close(limit, block_diagonal(problem, dense(problem), True))
    assert converges(problem, limit, approx)
    right = LOSS_CLASSES[name].sample
    # a wrong scale must not pass
    monkeypatch.setattr(LOSS_CLASSES[name], "sample", lambda *args: 1.15 * right(*args))
    assert not converges(problem, limit, approx)


# ---- reproducibility -----------------------------------------------------------------------------
RANDOM = [
    ("mc", "attention"),
    ("mc", "inplace"),
    ("type-2", "attention"),
    ("empirical", "attention"),
]


@pytest.mark.parametrize("loss", ["mse", "ce", "bce"])
@pytest.mark.parametrize(("fisher_type", "case"), RANDOM)
def test_seeds(fisher_type: str, case: str, loss: str):
    problem = setup(case, loss)
    samples = {"mc_samples": 3} if fisher_type == "mc" else {}
    before = torch.get_rng_state()
    first = kfac(problem, fisher_type, seed=5, **samples).to_dense()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(kfac(problem, fisher_type, seed=5, **samples).to_dense(), first)
    other = kfac(problem, fisher_type, seed=6, **samples).to_dense()
    assert (other - first).abs().max() > 1e-3 * first.abs().max()


@pytest.mark.parametrize("loss", ["mse", "ce", "bce"])
@pytest.mark.parametrize(("fisher_type", "case"), RANDOM)
def test_numbers_belong_to_loss_terms(fisher_type: str, case: str, loss: str):
    """The same samples and signs for all batch sizes, both reductions, and all dtypes."""
    problem = setup(case, loss)
    samples = {"mc_samples": 3} if fisher_type == "mc" else {}
    expected = kfac(problem, fisher_type, **samples).to_dense()
    for sizes in [(5,), (1, 3, 1), (1,) * 5]:
        other = kfac(rebatched(problem, sizes), fisher_type, **samples)
        torch.testing.assert_close(other.to_dense(), expected)
    total = kfac(setup(case, loss, "sum"), fisher_type, **samples)
    torch.testing.assert_close(problem.scale() * total.to_dense(), expected)
    try:
        single = Setup(
            problem.model.float(),
            problem.loss,
            {name: p.float() for name, p in problem.params.items()},
            [(X.float(), y.float() if y.is_floating_point() else y) for X, y in problem.data],
        )
        dense32 = kfac(single, fisher_type, **samples).to_dense()
    finally:
        problem.model.double()
    torch.testing.assert_close(dense32.double(), expected, rtol=1e-3, atol=1e-5)


def test_samples_of_a_shuffled_order():
    """The samples belong to places in the data, not to data."""
    problem = setup("inplace", "ce")
    X, y = rebatched(problem, (5,)).data[0]
    turned = replace(problem, data=[(X.flip(0), y.flip(0))])
    assert not torch.allclose(kfac(turned).to_dense(), kfac(problem).to_dense())
    torch.testing.assert_close(
        kfac(turned, "type-2").to_dense(), kfac(problem, "type-2").to_dense()
    )


def test_shuffled_data():
    """Accepted by the check; the order does not matter without random numbers."""
    problem = setup("inplace", "ce")
    X, y = rebatched(problem, (5,)).data[0]
    loader = DataLoader(TensorDataset(X.repeat(4, 1), y.repeat(4)), batch_size=3, shuffle=True)
    shuffled = replace(problem, data=loader).kwargs(check_deterministic=True)
    arguments = {**shuffled, "separate_weight_and_bias": False}
    K = KFACLinearOperator(**arguments, fisher_type="type-2")
    torch.testing.assert_close(K.to_dense(), kfac(problem, "type-2").to_dense())
    assert KFACLinearOperator(**arguments, fisher_type="mc").trace() > 0


# ---- signs ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_signs_are_unbiased(fisher_type: str, approx: str, monkeypatch: pytest.MonkeyPatch):
    """Each (loss term, column) has its own sign. The mean over all patterns of signs is exact."""
    problem = tiny_attention(nn.MSELoss(), torch.rand(1, 2, 2).double())
    num_vectors = 2 if fisher_type == "type-2" else 1
    group = {"W": "a.weight", "b": "a.bias"}
    exact, _ = reference_factors(problem, group, fisher_type, approx)
    if fisher_type == "type-2":
        columns = 2**0.5 * torch.eye(2).double().unsqueeze(1).expand(2, 2, 2)  # [V, R, C]
    else:
        columns = problem.examples[0].gradients.unsqueeze(0)
    factors = []
    for pattern in itertools.product([-1.0, 1.0], repeat=2 * num_vectors):

        def signs(
            self: RandomSource, purpose: str, first: int, m: int, draws: int, p: Any = pattern
        ) -> Tensor:
            assert (purpose, first, m, draws) == ("signs", 0, 2, num_vectors)
            return torch.tensor(p, dtype=torch.float64).reshape(m, draws)

        monkeypatch.setattr(RandomSource, "signs", signs)
        B, _ = kfac(problem, fisher_type, kfac_approx=approx).factors("a.weight")
        factors.append(B)
        assert (B - exact).norm() > 1e-3 * exact.norm()
        vectors = torch.tensor(pattern).reshape(2, num_vectors).T.unsqueeze(-1) * columns
        expected, _ = reference_factors(problem, group, "given", approx, [list(vectors)])
        torch.testing.assert_close(B, expected)
    torch.testing.assert_close(sum(factors) / len(factors), exact)


def test_signs_of_a_batch(monkeypatch: pytest.MonkeyPatch):
    """Every batch asks for the signs of its own terms."""
    asked = []
    right = RandomSource.signs

    def signs(self: RandomSource, purpose: str, first: int, m: int, draws: int) -> Tensor:
        asked.append((first, m, draws))
        return right(self, purpose, first, m, draws)

    monkeypatch.setattr(RandomSource, "signs", signs)
    kfac(setup("attention-lengths", "ce"), "type-2")
    # batches of 2, 1 and 2 sequences of 2, 1 and 2 positions; those with R = 1 draw none
    assert asked == [(0, 4, 2), (5, 4, 2)]


def test_no_signs_where_none_are_needed(monkeypatch: pytest.MonkeyPatch):
    def signs(*_: Any) -> Tensor:
        raise AssertionError("no signs are needed")

    monkeypatch.setattr(RandomSource, "signs", signs)
    for fisher_type in ("type-2", "empirical", "mc", "forward-only"):
        kfac(setup("mlp", "ce"), fisher_type)
        if fisher_type in ("mc", "forward-only"):
            kfac(setup("attention", "ce"), fisher_type)
        kfac(setup("attention", "ce"), fisher_type, loss_terms="exact")


def test_only_samples_are_drawn(monkeypatch: pytest.MonkeyPatch):
    """Each batch draws its own terms' uniforms; nothing is drawn without Monte-Carlo."""
    asked = []
    right = RandomSource.uniforms

    def uniforms(self: RandomSource, purpose: str, first: int, m: int, draws: int) -> Tensor:
        asked.append((purpose, first, m, draws))
        return right(self, purpose, first, m, draws)

    monkeypatch.setattr(RandomSource, "uniforms", uniforms)
    kfac(setup("attention-lengths", "mse"), "mc", mc_samples=2)
    assert asked == [("samples", 0, 4, 6), ("samples", 4, 1, 6), ("samples", 5, 4, 6)]
    asked.clear()
    for fisher_type in ("type-2", "empirical", "forward-only"):
        kfac(setup("mlp", "ce"), fisher_type)
    assert not asked
