"""Tests of the diagonal of the generalized Gauss-Newton matrix, exact and Monte-Carlo."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_cases import (
    PROBLEMS,
    WEIGHT,
    Apply,
    C,
    Problem,
    assert_close,
    classes,
    cross_entropy,
    ignoring,
    mlp,
    mse,
    rand,
    sequences,
    unit,
    vectors,
)
from torch import Tensor, nn
from torch.func import jacrev
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import (
    CurvatureLinearOperator,
    DiagonalLinearOperator,
    GGNDiagonalLinearOperator,
    IdentityLinearOperator,
)
from curvlinops._random import RandomSource
from curvlinops.computers import diagonal_vectors
from curvlinops.computers.diagonal_by_layers import LayersDiagonal
from curvlinops.computers.ggn_diagonal import GGNDiagonalComputer
from curvlinops.computers.per_example import DependentError, check_same
from curvlinops.risk import loss_entry
from curvlinops.risk.losses import LOSSES, CrossEntropy
from curvlinops.testing import check_operator

GENERIC = {"sequence_huber", "CE subclass", "L1", "Huber", "Poisson function", "own function"}
ALONE, TOGETHER = "one after the other", "only each loss term in its whole batch"
#: Problems that cannot be vectorised, and what the warning says.
SLOW = {"sparse_embedding": ALONE, "user_dict": TOGETHER}


@pytest.fixture
def by_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gradients of single examples be computed for parameters of supported layers, too."""
    monkeypatch.setattr(LayersDiagonal, "squares", lambda *_: None)


@pytest.fixture(params=["by layers", "by examples"])
def either_way(request: pytest.FixtureRequest) -> bool:
    """Run a test in both ways; return whether it is that of layers."""
    if request.param == "by examples":
        request.getfixturevalue("by_examples")
    return request.param == "by layers"


def build(problem: Problem, reduction: str = "mean", **options: Any) -> Any:
    """Build the operator."""
    return problem.operator(GGNDiagonalLinearOperator, reduction, **options)


def diagonal(problem: Problem, reduction: str = "mean", **options: Any) -> Tensor:
    return build(problem, reduction, **options).diagonal()


def slow_diagonal(problem: Problem, says: str, reduction: str = "mean", **options: Any) -> Tensor:
    """Return the diagonal; there must be one warning."""
    with pytest.warns(UserWarning, match=f"{says}.*its values are right. The reason: ") as record:
        result = diagonal(problem, reduction, **options)
    assert len(record) == 1
    return result


# ---- the exact diagonal ------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(PROBLEMS.keys() - GENERIC))
def test_equals_autodiff(name: str, either_way: bool) -> None:
    problem, reduction = PROBLEMS[name](), "sum" if either_way else "mean"
    if name in SLOW and not either_way:
        actual = slow_diagonal(problem, SLOW[name], reduction)
    else:
        actual = diagonal(problem, reduction)
    assert_close(actual, problem.ggn(reduction).diagonal(), 1e-13)


@pytest.mark.parametrize("name", sorted(GENERIC))
def test_generic_losses_are_refused(name: str) -> None:
    problem = PROBLEMS[name]()
    with pytest.raises(NotImplementedError, match=r"has no closed form .*register_loss") as error:
        build(problem)
    assert str(error.value).startswith(loss_entry(problem.loss("mean"))[0].name)


@pytest.mark.usefixtures("either_way")
def test_terms_count_on_their_own() -> None:
    # squares of sums over the terms of an example would be something else
    problem = PROBLEMS["sequence_mse"]()
    X, _ = problem.data[1]
    J = jacrev(lambda theta: problem.predictions(theta)[1].sum((0, 1)))(problem.flat())
    summed = 2 * J.square().sum(0)
    actual = diagonal(problem, "sum", data=problem.data[1:2])
    assert X.shape[:2] == (1, 5)
    assert (actual - summed).norm() > 0.1 * actual.norm()


@pytest.mark.parametrize("name", ["cnn", "pixels", "sequence_cross_entropy", "tied_embedding"])
@pytest.mark.usefixtures("either_way")
def test_batching_and_chunks_do_not_matter(name: str) -> None:
    problem = PROBLEMS[name]()
    problem.data = problem.data[2:] if "e" in name else problem.data  # of one length
    (X, y) = (torch.cat(tensors) for tensors in zip(*problem.data, strict=True))
    expected = problem.ggn().diagonal()
    for sizes in ([len(X)], [1] * len(X), [1, len(X) - 1]):
        data = list(zip(X.split(sizes), y.split(sizes), strict=True))
        for chunk_size in (None, 1, 2, 3, 7, 100):
            assert_close(diagonal(problem, data=data, chunk_size=chunk_size), expected, 1e-13)
    loader = DataLoader(TensorDataset(X, y), batch_size=3, shuffle=True)
    assert_close(diagonal(problem, data=loader), expected, 1e-13)


@pytest.mark.usefixtures("either_way")
def test_padding_is_constant() -> None:
    D = build(PROBLEMS["embedding"]())
    assert not D.tensors()[0][1].any()
    assert D.tensors()[0][0].any()


def test_shapes_names_and_dtype() -> None:
    problem = PROBLEMS["function_model"]()
    computer = problem.operator(GGNDiagonalComputer)
    entries = computer.compute()
    assert list(entries) == ["B", "scale", "A"]
    assert [t.shape for t in entries.values()] == problem.shapes
    for again in (computer.compute().values(), build(problem).tensors()):
        assert all(torch.equal(a, b) for a, b in zip(again, entries.values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp_mse", "cnn", "batch_norm", "CE all options"])
@pytest.mark.usefixtures("either_way")
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]()
    expected = problem.ggn().diagonal()
    problem.model.to(dtype)
    problem.params = dict(problem.model.named_parameters())
    problem.data = [
        (X.to(dtype), y.to(dtype) if y.is_floating_point() else y) for X, y in problem.data
    ]
    for options in ({}, {"chunk_size": 1}):
        D = build(problem, **options)
        assert D.dtype is dtype
        assert_close(D.diagonal(), expected, 1e-5 if dtype is torch.float32 else 0.05)


@pytest.mark.usefixtures("either_way")
def test_half_precision_adds_up_in_single_precision() -> None:
    # equal squares: a sum in bfloat16 would stop at 256 of them
    model = nn.Linear(1, 1, bias=False).bfloat16()
    X = torch.ones(300, 1, dtype=torch.bfloat16)
    for batch_size, chunk_size in ((300, 1), (1, None), (300, None)):
        data = list(zip(X.split(batch_size), X.split(batch_size), strict=True))
        D = GGNDiagonalLinearOperator(
            model,
            nn.MSELoss(reduction="sum"),
            dict(model.named_parameters()),
            data,
            check_deterministic=False,
            chunk_size=chunk_size,
        )
        assert abs(D.diagonal().item() / 600 - 1) < 0.01


@pytest.mark.usefixtures("either_way")
def test_squares_do_not_overflow_in_half_precision() -> None:
    net = nn.Linear(1, 1, bias=False).half()
    X = torch.zeros(600, 1).half()
    X[7] = 300  # its square is too large
    actual = diagonal(Problem(net, mse, [(X, X)]))
    assert abs(actual.item() - 2 * 300**2 / 600) < 1


# ---- Monte-Carlo -------------------------------------------------------------------------------
def monte_carlo(problem: Problem, S: int, seed: int = 2147483647) -> Tensor:
    """The diagonal from the documented samples, "sum": one gradient for each term and sample."""
    source, first = RandomSource(seed), 0
    loss, _ = loss_entry(problem.loss("sum"))
    theta, total = problem.flat(), torch.zeros(len(problem.flat()), dtype=torch.float64)
    for (_, y), f, i in zip(problem.data, problem.predictions(theta), range(99), strict=False):
        F, targets = loss.terms(f, y)
        m, classes = F.shape
        draws = loss.draws(classes)
        uniforms = source.uniforms("samples", first, m, S * draws).reshape(m, S, draws)
        g = loss.sample(F, targets, uniforms)  # [S, m, C]

        def terms(theta: Tensor, y: Tensor = y, i: int = i) -> Tensor:
            return loss.terms(problem.predictions(theta)[i], y)[0]

        J = jacrev(terms)(theta)  # [m, C, D]
        total += torch.einsum("smc,mcd->smd", g, J).square().sum((0, 1)) / S
        first += m
    return total


@pytest.mark.parametrize(
    "name", ["mlp_mse", "one_dimensional_output", "sequence_cross_entropy", "mapping", "tied"]
)
@pytest.mark.usefixtures("either_way")
def test_monte_carlo_is_that_of_the_documented_samples(name: str) -> None:
    problem = PROBLEMS[name]()
    normalizer = diagonal(problem, "sum").sum() / diagonal(problem).sum()
    for S in (1, 3):
        expected = monte_carlo(problem, S)
        assert_close(diagonal(problem, "sum", mc_samples=S), expected, 1e-13)
        assert_close(diagonal(problem, "mean", mc_samples=S), expected / normalizer, 1e-13)
        other = diagonal(problem, "sum", mc_samples=S, seed=5)
        assert_close(other, monte_carlo(problem, S, seed=5), 1e-13)
        assert (other - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.usefixtures("by_examples")  # which is faster for many samples of a small model
@pytest.mark.parametrize("name", ["mlp_mse", "CE all options", "BCE options"])
def test_monte_carlo_converges(name: str) -> None:
    problem = PROBLEMS[name]()
    exact = diagonal(problem)
    errors = [
        (diagonal(problem, mc_samples=S, seed=1) - exact).norm().item() for S in (64, 16 * 64)
    ]
    # the error shrinks by a factor of 4
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.15 * exact.norm()


@pytest.mark.usefixtures("either_way")
def test_monte_carlo_does_not_depend_on_batches_and_chunks() -> None:
    problem = PROBLEMS["pixels"]()
    X, y = (torch.cat(tensors) for tensors in zip(*problem.data, strict=True))
    expected = diagonal(problem, mc_samples=3)
    for sizes in ([8], [1] * 8, [2, 5, 1]):
        data = list(zip(X.split(sizes), y.split(sizes), strict=True))
        for chunk_size in (None, 1, 4, 40):
            actual = diagonal(problem, data=data, mc_samples=3, chunk_size=chunk_size)
            assert_close(actual, expected, 1e-13)


def test_monte_carlo_needs_a_fixed_order() -> None:
    problem = PROBLEMS["mlp_mse"]()
    X, y = (torch.cat(tensors) for tensors in zip(*problem.data, strict=True))
    loader = DataLoader(TensorDataset(X, y), batch_size=4, shuffle=True)
    build(problem, data=loader)
    with pytest.raises(RuntimeError, match="needs a fixed order"):
        build(problem, data=loader, mc_samples=1)


# ---- models that cannot be vectorised ----------------------------------------------------------
class OldFunction(torch.autograd.Function):
    """A function that torch.func refuses, with a backward pass that cannot be vectorised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 2 * x * torch.from_numpy(grad.numpy()) if grad.isfinite().all() else grad


def steep(self: Any, x: Tensor) -> Tensor:
    """Data-dependent control flow."""
    return self.net(x) if x[0, 0] > 0 else 2 * self.net(x)


def one_dead_branch(self: Any, x: Tensor) -> Tensor:
    """A parameter that only some examples use."""
    return self.net(x) + (self.extra(x) if len(x) > 1 or x.sum() > 0 else 0 * x)


def centred(self: Any, x: Tensor) -> Tensor:
    return self.net(x - x.mean(0))


def gated(self: Any, x: Tensor) -> Tensor:
    """Examples depend on each other in the derivative with respect to the gate alone."""
    h = self.net(x)
    return h + self.gate.weight[0, 0] * h.mean(0)


def sorted_examples(self: Any, x: Tensor) -> Tensor:
    return self.net(x).flip(0)


def standardized(self: Any, x: Tensor) -> Tensor:
    """NaN for a single example."""
    return self.net(x / x.std(0))


def picky(self: Any, x: Tensor) -> Tensor:
    if len(x) < 2:
        raise ValueError("I need two examples")
    return self.net(x)


def model(function: Callable[..., Tensor], **modules: nn.Module) -> nn.Module:
    return Apply(function, net=mlp(), **modules).double()


def pairs(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(rand(n, 3), classes(n)) for n in (2, 4, 3)[:count]]


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 4])
@pytest.mark.usefixtures("by_examples")
def test_old_custom_functions(chunk_size: int | None) -> None:
    slow = model(lambda self, x: OldFunction.apply(self.net(x)))
    problem = Problem(slow, cross_entropy, pairs())
    expected = Problem(
        slow,
        cross_entropy,
        problem.data,
        predict=lambda p, X: torch.func.functional_call(
            slow.net, {name[4:]: t for name, t in p.items()}, (X,)
        ).square(),
    ).ggn()
    if chunk_size in (1, 3):  # not enough for the two columns of two examples
        actual = diagonal(problem, chunk_size=chunk_size)
    else:
        actual = slow_diagonal(problem, ALONE, chunk_size=chunk_size)
    assert_close(actual, expected.diagonal(), 1e-13)


@pytest.mark.usefixtures("by_examples")
def test_control_flow() -> None:
    problem = Problem(model(steep), cross_entropy, [(X[:1], y[:1]) for X, y in pairs()])
    expected = problem.ggn().diagonal()
    data = [tuple(torch.cat(tensors) for tensors in zip(*problem.data, strict=True))]
    # the batch's first example decides for all: then it is the batch that counts
    merged = Problem(problem.model, cross_entropy, data)
    X = data[0][0]
    assert X[:, 0].sign().unique().numel() == 2
    actual = slow_diagonal(merged, TOGETHER)
    assert_close(actual, merged.ggn().diagonal(), 1e-13)
    assert (actual - expected).norm() > 0.01 * expected.norm()
    # but with one sign, the examples are independent
    data = [(X.abs(), data[0][1])]
    same = Problem(problem.model, cross_entropy, data)
    assert_close(slow_diagonal(same, ALONE), same.ggn().diagonal(), 1e-13)


@pytest.mark.parametrize("mc_samples", [0, 2])
@pytest.mark.parametrize("function", [centred, gated, sorted_examples, standardized, picky])
@pytest.mark.usefixtures("by_examples")
def test_dependent_examples(function: Callable[..., Tensor], mc_samples: int) -> None:
    net = model(function, gate=nn.Linear(1, 1, bias=False))
    nn.init.zeros_(net.gate.weight)
    problem = Problem(net, cross_entropy, pairs())
    expected = monte_carlo(problem, 2) / 9 if mc_samples else problem.ggn().diagonal()
    for chunk_size in (None, 1, 4):
        actual = slow_diagonal(problem, TOGETHER, mc_samples=mc_samples, chunk_size=chunk_size)
        assert_close(actual, expected, 1e-13)


@pytest.mark.parametrize("size", [1.0, 1e-6])
@pytest.mark.usefixtures("either_way")
def test_dependence_in_the_derivative_alone(size: float) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.net(x)
        return h + size * self.gate.weight[0, 0] * h.mean(0)

    net = model(forward, gate=nn.Linear(1, 1, bias=False))
    nn.init.zeros_(net.gate.weight)
    problem = Problem(net, cross_entropy, pairs())
    with pytest.warns(UserWarning, match=r"gradient for 'gate.weight' of an example depends on"):
        actual = build(problem)
    expected = problem.named(problem.ggn().diagonal())["gate.weight"]
    entry = actual @ {name: torch.ones_like(p) for name, p in problem.params.items()}
    assert_close(entry["gate.weight"], expected, 1e-13)


@pytest.mark.usefixtures("either_way")
def test_rounding_errors_are_no_dependence() -> None:
    # the prediction does not depend on the shift: its gradient is nothing but rounding errors
    net = model(
        lambda self, x: (self.net(x) + self.shift.weight[0, 0].exp()).softmax(-1),
        shift=nn.Linear(1, 1, bias=False),
    )
    problem = Problem(net, mse, vectors(rand, C))
    assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)


@pytest.mark.usefixtures("by_examples")
def test_tolerance_is_that_of_the_coarsest_numbers() -> None:
    # as if rounded to bfloat16 in another way if there is one example
    def forward(self: Any, x: Tensor) -> Tensor:
        error = 1e-3 if len(x) == 1 else 0.0
        return (1 + error) * self.net(x) + 0 * x.bfloat16().sum(-1, keepdim=True).double()

    problem = Problem(model(forward), cross_entropy, pairs())
    assert_close(diagonal(problem), problem.ggn().diagonal(), 0.01)
    problem.model.function = lambda self, x: (1 + 1e-3 * (len(x) == 1)) * self.net(x)
    assert_close(slow_diagonal(problem, TOGETHER), problem.ggn().diagonal(), 1e-13)


@pytest.mark.usefixtures("by_examples")
def test_parameters_that_some_examples_do_not_use() -> None:
    problem = Problem(
        model(lambda self, x: self.net(x) + self.extra(x) * (x > 0), extra=nn.Linear(3, 3)),
        cross_entropy,
        pairs(),
    )
    assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)
    # in a graph of its own, an example has no gradient at all there
    single = Problem(model(one_dead_branch, extra=nn.Linear(3, 3)), cross_entropy, pairs())
    single.data = [(X.abs(), y) for X, y in single.data]
    assert_close(slow_diagonal(single, ALONE), single.ggn().diagonal(), 1e-13)
    constant = Problem(
        single.model,
        cross_entropy,
        [(-X[:1].abs(), y[:1]) for X, y in single.data],
        params={"extra.weight": single.model.extra.weight},
    )
    assert not diagonal(constant).any()


@pytest.mark.usefixtures("by_examples")
def test_one_warning_for_all_batches() -> None:
    data = [(rand(n, s, 3), classes(n, s)) for n, s in ((2, 3), (3, 2), (2, 3), (4, 1))]
    net = Apply(lambda self, x: self.net(x - x.mean(0)).transpose(1, 2), net=mlp())
    problem = Problem(net, cross_entropy, data, classes=1)
    assert_close(slow_diagonal(problem, TOGETHER), problem.ggn().diagonal(), 1e-13)


@pytest.mark.usefixtures("by_examples")
def test_each_structure_is_verified_once() -> None:
    calls: list[int] = []

    def count(self: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        return self.net(x)

    problem = Problem(model(count), cross_entropy, [*pairs(2), *pairs(2), (rand(4, 3), classes(4))])
    problem.operator(GGNDiagonalComputer, check_deterministic=False).compute()
    # predict, verify (batch, vectorised), differentiate; then predict, differentiate
    assert calls == [2, 2, 1, 1, 4, 4, 1, 1, 2, 1, 4, 1, 4, 1]
    calls.clear()
    problem.data = [(rand(1, 3), classes(1))]  # is its own batch
    problem.operator(GGNDiagonalComputer, check_deterministic=False).compute()
    assert calls == [1, 1]


@pytest.mark.usefixtures("by_examples")
def test_batches_that_turn_out_to_be_dependent() -> None:
    # the shapes are the same, but only the second batch mixes its examples
    def mixing(self: Any, x: Tensor) -> Tensor:
        return self.net(x + (x[:, :1] > 2) * x.mean(0))

    X, y = rand(4, 3), classes(4)
    problem = Problem(model(mixing), cross_entropy, [(X, y), (X + 3, y), (X, y)])
    with pytest.warns(UserWarning, match=r"reason: the prediction of an example depends on the"):
        actual = diagonal(problem)
    assert_close(actual, problem.ggn().diagonal(), 1e-13)


@pytest.mark.usefixtures("by_examples")
def test_terms_that_are_not_those_of_examples() -> None:
    # two examples make one loss term
    data = [(rand(n, 3), classes(n // 2)) for n in (2, 4)]
    net = Apply(lambda self, x: self.net(x).reshape(-1, 2, 3).sum(1), net=mlp())
    problem = Problem(net, cross_entropy, data)
    assert_close(slow_diagonal(problem, TOGETHER), problem.ggn().diagonal(), 1e-13)


def scaled(f: Tensor) -> Tensor:
    return 2 * f


def odd_ones_flipped(f: Tensor) -> Tensor:
    odd = (torch.arange(len(f)) % 2).bool().unsqueeze(-1)
    return torch.where(odd, f.flip(-1), f)


def examples_swapped(f: Tensor) -> Tensor:
    return f.flip(0)


def bent(f: Tensor) -> Tensor:
    """The identity, for integers."""
    return f + 0.1 * (torch.pi * f).sin().square()


@pytest.mark.parametrize("rearrange", [scaled, odd_ones_flipped, examples_swapped, bent])
@pytest.mark.usefixtures("by_examples")
def test_losses_that_do_more_than_flatten(
    monkeypatch: pytest.MonkeyPatch, rearrange: Callable[[Tensor], Tensor]
) -> None:
    class OwnLoss(nn.CrossEntropyLoss):
        def forward(self, f: Tensor, y: Tensor) -> Tensor:
            return super().forward(rearrange(f), y)

    class OwnEntry(CrossEntropy):
        def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return super().terms(rearrange(f), y)

    monkeypatch.setitem(LOSSES, OwnLoss, OwnEntry)
    net, data = model(lambda self, x: self.net(x)), [(rand(4, 3), classes(4))]
    with pytest.warns(UserWarning, match="the loss terms are not those of single examples"):
        actual = diagonal(Problem(net, lambda r: OwnLoss(reduction=r), data))
    # the same as part of the model
    net.function = lambda self, x: rearrange(self.net(x))
    assert_close(actual, Problem(net, cross_entropy, data).ggn().diagonal(), 1e-13)


def test_comparisons_do_not_overflow() -> None:
    a = torch.tensor([60_000.0, 60_000.0]).half()
    check_same("prediction", a, a, 1e-3)
    with pytest.raises(DependentError, match="the prediction of an example depends on the others"):
        check_same("prediction", a / 2, a, 1e-3)


@pytest.mark.usefixtures("by_examples")
def test_each_way_is_verified() -> None:
    calls: list[int] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 6:
            raise RuntimeError("two\nlines.")
        return self.net(x)

    problem = Problem(model(forward), cross_entropy, [*pairs(1), *pairs(1)])
    with pytest.warns(UserWarning, match=r"The reason: RuntimeError: two lines\.$"):
        actual = diagonal(problem, check_deterministic=False)
    # the second batch's vectorised evaluation fails: verify and differentiate one by one
    assert calls == [2, 2, 1, 1, 2, 1, 2, 1, 1, 1, 1]
    assert_close(actual, problem.ggn().diagonal(), 1e-13)


@pytest.mark.usefixtures("by_examples")
def test_random_models_are_one_function_per_batch() -> None:
    problem = Problem(
        model(lambda self, x: self.net(x) * (1 + 4 * torch.randint(2, ()))), cross_entropy, pairs(1)
    )

    def expected(factor: int) -> Tensor:
        net = model(lambda self, x: factor * self.net(x))
        net.load_state_dict(problem.model.state_dict())
        return Problem(net, cross_entropy, problem.data).ggn().diagonal()

    found = set()
    for seed in range(8):
        torch.manual_seed(seed)
        actual = slow_diagonal(problem, TOGETHER, check_deterministic=False)
        errors = [(actual - expected(factor)).norm().item() for factor in (1, 5)]
        assert min(errors) < 1e-12
        found.add(min(errors) == errors[0])
    assert found == {True, False}


def test_functions_without_batching_rule_do_not_warn() -> None:
    # PyTorch vectorises the LSTM of single precision by a loop, and says so
    net = nn.Sequential(Apply(lambda self, x: self.lstm(x)[0][:, -1], lstm=nn.LSTM(3, 2)))
    net[0].lstm.batch_first = True
    data = [(rand(n, 4, 3).float(), rand(n, 2).float()) for n in (2, 3)]
    actual = diagonal(Problem(net, mse, data))
    data = [(X.double(), y.double()) for X, y in data]
    assert_close(actual, Problem(net.double(), mse, data).ggn().diagonal(), 1e-5)


@pytest.mark.usefixtures("either_way")
def test_inputs_in_nested_mappings() -> None:
    def forward(self: Any, X: Any) -> Tensor:
        a, (b, shift), extra = X["a"], X["b"], X.pop("extra")
        return self.net(a + b) + shift + extra["c"] * extra["factor"]

    data = []
    for n in (2, 5):
        extra = {"c": rand(n, 1), "factor": 3.0}
        X = {"a": rand(n, 3), "b": (rand(n, 3), rand(1, 1, 3)[0]), "extra": extra}
        data.append((X, classes(n)))
    problem = Problem(model(forward), cross_entropy, data, batch_size_fn=lambda X: len(X["a"]))
    problem.predict = lambda p, X: torch.func.functional_call(problem.model, p, (dict(X),))
    assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)
    assert set(data[0][0]) == {"a", "b", "extra"}


# ---- memory --------------------------------------------------------------------------------------
class Largest(TorchDispatchMode):
    """Remembers the largest tensor that was made, also below vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("mc_samples", [0, 1])
@pytest.mark.usefixtures("by_examples")
def test_memory_does_not_grow(
    monkeypatch: pytest.MonkeyPatch, dependent: bool, mc_samples: int
) -> None:
    def largest(n: int, outputs: int, **options: Any) -> int:
        net = nn.Linear(40, outputs)
        model = Apply(lambda self, x: self.net(x - x.mean(0) * dependent), net=net)
        problem = Problem(model, cross_entropy, [(torch.rand(n, 40), classes(n))])
        options |= {"check_deterministic": False, "num_data": n, "mc_samples": mc_samples}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Largest() as mode:
                build(problem, **options)
        return mode.numel

    # all gradients would have n * outputs * (40 * outputs) entries
    assert largest(4, 20, chunk_size=2) == 2 * 40 * 20
    assert largest(8, 20, chunk_size=2) <= max(2 * 40 * 20, 8 * 20 * 20)  # the loss vectors
    assert largest(8, 40, chunk_size=2) <= 8 * 40 * 40
    # by default it is the number of entries that counts
    monkeypatch.setattr(diagonal_vectors, "_ENTRIES_CPU", 5000)
    for n, outputs in ((20, 10), (60, 10), (20, 20)):
        assert 1000 < largest(n, outputs) <= 5000


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.usefixtures("by_examples")
def test_memory_of_large_activations(monkeypatch: pytest.MonkeyPatch, dependent: bool) -> None:
    # few parameters, but each gradient comes with tensors of 1000 entries for each example
    monkeypatch.setattr(diagonal_vectors, "_ENTRIES_CPU", 40_000)
    calls = []

    def forward(self: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        h = (x * self.a.weight).tanh().mean(1, keepdim=True)
        return self.b(h + h.mean() * dependent)

    net = Apply(forward, a=nn.Linear(1, 1, bias=False), b=nn.Linear(1, 10))
    problem = Problem(net, cross_entropy, [(torch.rand(16, 1000), classes(16))])
    with Largest() as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(problem, check_deterministic=False, num_data=16)
    assert mode.numel <= 40_000  # instead of 16 * 10 * 1000
    if not dependent:
        assert len(calls) == 2 + 4 + 4  # four examples with ten columns each at once


# ---- the operator --------------------------------------------------------------------------------
def test_is_an_operator() -> None:
    problem = PROBLEMS["function_model"]()
    D = build(problem)
    check_operator(D, problem.ggn().diagonal().diag())
    assert isinstance(D, DiagonalLinearOperator)
    assert isinstance(D, CurvatureLinearOperator)
    assert D.SELF_ADJOINT
    assert D.T is D.H is D
    assert repr(D) == "<21×21 operator GGNDiagonal>"


def test_algebra_keeps_names() -> None:
    problem = PROBLEMS["function_model"]()
    D = build(problem)
    x = {name: rand(*p.shape) for name, p in problem.params.items()}
    d = dict(zip(x, D.tensors(), strict=True))
    plain = DiagonalLinearOperator([torch.ones_like(t) for t in D.tensors()])
    eye = IdentityLinearOperator(D.in_shape, D.device, D.dtype)
    for operator, factor in (
        (D, lambda t: t),
        (D + D, lambda t: 2 * t),
        (plain + 3 * D, lambda t: 1 + 3 * t),
        (D - plain, lambda t: t - 1),
        (D @ D / 2, lambda t: t**2 / 2),
        (plain @ D, lambda t: t),
        (plain / (D + plain), lambda t: 1 / (1 + t)),
        (D.inverse(damping=0.1), lambda t: 1 / (t + 0.1)),
        (D + 0.5 * eye, lambda t: t + 0.5),
        (D.sqrt().T, lambda t: t.sqrt()),
        (D**2, lambda t: t**2),
        (D.to(torch.float64), lambda t: t),
        (copy.deepcopy(D), lambda t: t),
    ):
        assert isinstance(operator, DiagonalLinearOperator)
        result = operator @ x
        assert list(result) == ["B", "scale", "A"]
        for name in x:
            assert_close(result[name], factor(d[name]) * x[name])


def test_loads_in_a_fresh_process(tmp_path: Path) -> None:
    problem = PROBLEMS["mlp_mse"]()
    D = build(problem)
    torch.save({"D": D, "inverse": (2 * D).inverse(0.5)}, tmp_path / "file.pt")
    torch.save(D.diagonal(), tmp_path / "diagonal.pt")
    code = """
import sys, torch
import curvlinops
loaded = torch.load(sys.argv[1] + "/file.pt", weights_only=True)
d = torch.load(sys.argv[1] + "/diagonal.pt", weights_only=True)
D, inverse = loaded["D"], loaded["inverse"]
assert type(D) is curvlinops.GGNDiagonalLinearOperator, D
assert type(inverse) is curvlinops.DiagonalLinearOperator, inverse
assert torch.equal(D.diagonal(), d)
assert torch.allclose(inverse.diagonal(), 1 / (2 * d + 0.5))
names = ["0.weight", "0.bias", "2.weight", "2.bias"]
x = {name: torch.ones(shape, dtype=d.dtype) for name, shape in zip(names, D.in_shape)}
for A in (D, inverse, D.inverse(1.0), D.to(torch.float64)):
    assert list(A @ x) == names
print(repr(D), type(D.to(torch.float32)).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "<26×26 operator GGNDiagonal> GGNDiagonalLinearOperator"


def test_is_independent_of_model_and_data() -> None:
    problem = PROBLEMS["mlp_mse"]()
    D = build(problem)
    before = D.diagonal()
    file = io.BytesIO()
    torch.save(D, file)
    assert file.getbuffer().nbytes < 5000
    with torch.no_grad():
        for p in problem.model.parameters():
            p.zero_()
    assert torch.equal(D.diagonal(), before)


@pytest.mark.usefixtures("either_way")
def test_verification_in_half_precision() -> None:
    # a sum over 800 examples in bfloat16 would look like a difference
    net = nn.Linear(2, C).bfloat16()
    X = torch.rand(800, 2).bfloat16() + 10
    problem = Problem(net, cross_entropy, [(X, classes(800))])
    actual = diagonal(problem)
    problem.model.double()
    problem.params = dict(net.named_parameters())
    problem.data = [(X.double(), y) for X, y in problem.data]
    assert_close(actual, problem.ggn().diagonal(), 0.02)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["mlp_mse", "sparse_embedding", "one_dimensional_output"])
def test_without_gradients(name: str, context: Any, either_way: bool) -> None:
    problem, slow = PROBLEMS[name](), name in SLOW and not either_way
    with context():
        problem.data = [(X.clone(), y.clone()) for X, y in problem.data]
        problem.params = {name: p.clone() for name, p in problem.params.items()}
        D = slow_diagonal(problem, ALONE) if slow else build(problem).diagonal()
        entries = DiagonalLinearOperator([D]) if slow else build(problem)
    assert_close(D, problem.ggn().diagonal())
    if not slow:
        assert not any(t.is_inference() or t.requires_grad for t in entries.tensors())


@pytest.mark.usefixtures("either_way")
def test_half_precision_in_inference_mode() -> None:
    net = nn.Linear(2, C).bfloat16()
    with torch.inference_mode():
        D = build(Problem(net, cross_entropy, [(torch.rand(3, 2).bfloat16(), classes(3))]))
    assert not any(t.is_inference() for t in D.tensors())


def state(model: nn.Module) -> Any:
    """What an operator must leave alone."""
    layers = [
        (m.training, list(m._parameters), list(m._buffers), list(m._forward_hooks), list(vars(m)))
        for m in model.modules()
    ]
    tensors = [*model.parameters(), *model.buffers()]
    values = [(id(t), t._version, t.tolist(), t.requires_grad, t.grad) for t in tensors]
    return layers, values, torch.get_rng_state().tolist()


@pytest.mark.parametrize("function", [lambda self, x: self.net(x), centred, steep])
@pytest.mark.parametrize("fails_at", [None, 1, 3, 4, 6])
@pytest.mark.usefixtures("either_way")
def test_model_is_left_as_found(function: Callable[..., Tensor], fails_at: int | None) -> None:
    calls = []

    def forward(self: Any, x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        torch.rand(1) if len(calls) == 1 else None
        return function(self, self.norm(x))

    net = model(forward, norm=nn.BatchNorm1d(3)).train()
    net.net[0].bias.requires_grad_(False)
    problem = Problem(net, cross_entropy, [(rand(3, 3), classes(3))])
    before = state(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            build(problem, check_deterministic=False)
            assert fails_at is None or len(calls) < fails_at
        except KeyboardInterrupt:
            assert fails_at is not None
    assert state(net) == before


@pytest.mark.usefixtures("by_examples")
def test_batch_norm_in_training_mode() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, C)).double().train()
    problem = Problem(net, cross_entropy, pairs())
    problem.predict = lambda p, X: torch.func.functional_call(copy.deepcopy(net), p, (X,))
    actual = slow_diagonal(problem, TOGETHER, check_deterministic=False)
    assert_close(actual, problem.ggn().diagonal(), 1e-13)


def test_progress_bar_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    problem = PROBLEMS["mlp_mse"]()

    class Data(list[Any]):
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            Data.passes += 1
            return super().__iter__()

    build(problem, data=Data(problem.data), check_deterministic=False, num_data=8)
    assert Data.passes == 1
    assert capsys.readouterr() == ("", "")
    build(problem, progressbar=True)
    assert "GGN diagonal: 100%" in capsys.readouterr().err


# ---- bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mc_samples": -1}, "mc_samples must be an integer, at least 0, got -1."),
        ({"mc_samples": 1.5}, "mc_samples must be an integer, at least 0, got 1.5."),
        ({"mc_samples": None}, "mc_samples must be an integer, at least 0, got None."),
        ({"chunk_size": 0}, "chunk_size must be an integer, at least 1, got 0."),
        ({"chunk_size": "2"}, "chunk_size must be an integer, at least 1, got '2'."),
        ({"mc_samples": 1, "seed": -1}, "seed must be between"),
        ({"num_data": 3}, "had 8 examples, but num_data is 3"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(PROBLEMS["mlp_mse"](), **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.usefixtures("either_way")
def test_values_that_are_not_finite(value: float, n: int) -> None:
    net = mlp()
    with torch.no_grad():
        net[2].weight[0, 0] = value
    problem = Problem(net, cross_entropy, [(rand(n, 3), classes(n))])
    message = r"The GGN diagonal of '0.weight' has non-finite values. Check the data, the param"
    with pytest.raises(RuntimeError, match=message):
        build(problem, check_deterministic=False)


@pytest.mark.usefixtures("either_way")
def test_overflow_names_the_parameter() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.fill_(1e25)
        net[0].bias.zero_()
        net[1].weight.fill_(1e-20)
    problem = Problem(net, mse, [(torch.ones(3, 1), torch.zeros(3, 1))])
    with pytest.raises(RuntimeError, match=r"diagonal of '1.weight' has non-finite"):
        build(problem)


def test_forbidden_embedding() -> None:
    def predict(params: Any, X: Tensor) -> Tensor:
        return nn.functional.embedding(X, params["W"], max_norm=1.0)

    problem = Problem(predict, mse, [(torch.tensor([0, 1]), rand(2, 2))], params={"W": rand(3, 2)})
    with pytest.raises(NotImplementedError, match="max_norm"):
        build(problem, check_deterministic=False)


@pytest.mark.usefixtures("either_way")
def test_a_bce_of_many_options() -> None:
    # options broadcast over the examples of a batch
    data = [(rand(2, 4, 3), unit(2, 4, C)), (rand(2, 4, 3), unit(2, 4, C))]
    weight = rand(2, 1, 1) + 1
    problem = Problem(
        mlp(),
        lambda r: nn.BCEWithLogitsLoss(reduction=r, weight=weight, pos_weight=WEIGHT),
        data,
        classes=None,
    )
    assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)


@pytest.mark.usefixtures("either_way")
def test_ignored_batches() -> None:
    problem = Problem(
        Apply(lambda self, x: self.net(x).transpose(1, 2), net=mlp()),
        lambda r: nn.CrossEntropyLoss(reduction=r, ignore_index=-7, weight=WEIGHT),
        sequences(lambda *s: rand(*s, 3), ignoring),
        classes=1,
    )
    assert_close(diagonal(problem), problem.ggn().diagonal(), 1e-13)
    assert_close(diagonal(problem, "sum", mc_samples=2), monte_carlo(problem, 2), 1e-13)


@pytest.mark.usefixtures("either_way")
def test_vectors_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(mlp(7), mse, vectors(rand, 7))
    expected, sampled = problem.ggn().diagonal(), monte_carlo(problem, 5)
    for entries in (1, 60, 150):
        monkeypatch.setattr(diagonal_vectors, "_ENTRIES_CPU", entries)
        assert_close(diagonal(problem), expected, 1e-13)
        assert_close(diagonal(problem, "sum", mc_samples=5), sampled, 1e-13)
