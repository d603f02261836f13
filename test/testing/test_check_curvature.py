"""Tests of ``curvlinops.testing.check_curvature``: what is right passes, defects are named."""

from __future__ import annotations

import re
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlinops import (
    EFLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    PerExampleGradientLinearOperator,
)
from curvlinops._random import RandomSource
from curvlinops.computers.ggn_diagonal import GGNDiagonalComputer
from curvlinops.kept_graphs import KeptGraphs
from curvlinops.risk import EmpiricalRisk, Loss
from curvlinops.risk.cross_entropy import CrossEntropy
from curvlinops.risk.data import TermCounter
from curvlinops.risk.elementwise import MSE, BCEWithLogits
from curvlinops.risk.losses import LOSSES, GenericLoss
from curvlinops.testing import CurvatureReport, check_curvature
from curvlinops.testing._curvature_checks import Checker

F64 = torch.float64
WEIGHT = torch.tensor([0.3, 2.0, 1.2], dtype=F64)


# --------------------------------------------------------------------------------------------------
# Problems
# --------------------------------------------------------------------------------------------------
@dataclass
class Problem:
    """Arguments of the check; the loss is a function of the reduction."""

    model: Any
    loss: Callable[[str], Any]
    data: list[tuple[Any, Tensor]]
    params: dict[str, Tensor] | None = None
    batch_size_fn: Callable[[Any], int] | None = None

    def check(self, reduction: str = "mean", **options: Any) -> CurvatureReport:
        options = {"mc_samples": 64, "batch_size_fn": self.batch_size_fn, **options}
        params = self.params or dict(self.model.named_parameters())
        return check_curvature(self.model, self.loss(reduction), params, self.data, **options)


class Apply(nn.Module):
    """A function of modules and an input."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, X: Any) -> Tensor:
        return self.function(self, X)


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=F64) - 0.5


def unit(*shape: int) -> Tensor:
    return rand(*shape) + 0.5


def classes(*shape: int) -> Tensor:
    return torch.randint(3, shape)


def mlp(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, outputs)).double()


def vectors(targets: Callable[..., Tensor], *shape: int) -> list[tuple[Tensor, Tensor]]:
    return [(2 * rand(n, 2), targets(n, *shape)) for n in (3, 1)]


def cross_entropy(reduction: str) -> Any:
    return nn.CrossEntropyLoss(reduction=reduction)


def weighted(reduction: str) -> Any:
    return nn.CrossEntropyLoss(weight=WEIGHT, reduction=reduction)


def square(reduction: str) -> Any:
    return nn.MSELoss(reduction=reduction)


def binary(reduction: str) -> Any:
    return nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT.flip(0), reduction=reduction)


def mlp_square() -> Problem:
    return Problem(mlp(2), square, vectors(rand, 2))


def mlp_cross_entropy() -> Problem:
    return Problem(mlp(), weighted, vectors(classes))


def mlp_binary() -> Problem:
    return Problem(mlp(), binary, vectors(unit, 3))


def confident() -> Problem:
    """Probabilities that are not alike."""
    problem = mlp_cross_entropy()
    with torch.no_grad():
        problem.model[2].bias += torch.tensor([0.0, 2.0, -1.0])
    return problem


def one_batch() -> Problem:
    """Defects of batching show up only where the data are batched anew."""
    return Problem(mlp(), weighted, vectors(classes)[:1])


def cnn() -> Problem:
    """Pixels of probabilities; outputs [N, C, H, W]."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 2, 1)).double()
    data = [(rand(n, 1, 3, 2), rand(n, 2, 2, 1).softmax(1)) for n in (2, 1)]
    return Problem(model, partial(_smoothed, 0.1), data)


def _smoothed(epsilon: float, reduction: str) -> Any:
    return partial(F.cross_entropy, label_smoothing=epsilon, reduction=reduction)


def sequence() -> Problem:
    """An embedding with padding, sequences of two lengths, a batch that is ignored as a whole."""

    def apply(self: Any, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x))).transpose(1, 2)

    embedding = nn.Embedding(4, 2, padding_idx=1)
    model = Apply(apply, embedding=embedding, head=nn.Linear(2, 3)).double()
    data = [
        (torch.tensor([[0, 1, 3], [2, 2, 1]]), torch.tensor([[0, -7, 2], [1, 0, -7]])),
        (torch.tensor([[3, 0]]), torch.tensor([[-7, -7]])),
    ]
    loss = partial(nn.CrossEntropyLoss, weight=WEIGHT, ignore_index=-7, label_smoothing=0.2)
    return Problem(model, lambda r: loss(reduction=r), data)


def tied() -> Problem:
    """One weight in two layers, and a layer that is not asked for."""
    layers = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)}
    model = Apply(lambda self, x: self.b(torch.tanh(self.a(torch.sin(self.c(x))))), **layers)
    model.double()
    model.b.weight = model.a.weight
    params = {name: p for name, p in model.named_parameters() if name[0] != "c"}
    return Problem(model, cross_entropy, [(x, y % 2) for x, y in vectors(classes)], params)


def function_model() -> Problem:
    """A function, with a parameter that is a number and one that is not used; outputs [N]."""

    def predict(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return torch.tanh(X @ params["w"]) * params["s"].exp()

    params = {"w": rand(2), "s": rand(), "unused": rand(2)}
    return Problem(predict, lambda r: partial(F.mse_loss, reduction=r), vectors(rand), params)


def mapping() -> Problem:
    """Mappings with something that has no axis of examples."""
    model = Apply(lambda self, X: self.net(X["x"]) * X["scale"] + X["shift"], net=mlp(2))
    X = [
        {"x": rand(n, 2), "shift": rand(n, 2), "scale": torch.tensor(0.7, dtype=F64)}
        for n in (2, 1)
    ]
    data = [(UserDict(x), rand(len(x["x"]), 2)) for x in X]
    return Problem(model, square, data, batch_size_fn=lambda X: X["x"].shape[0])


def huber() -> Problem:
    """Known by its value only, and convex."""
    return Problem(mlp(2), lambda r: nn.HuberLoss(reduction=r, delta=0.3), vectors(rand, 2))


def cubic(f: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Not convex, and not in the table."""
    return getattr((f - y) ** 3, reduction)()


def own_loss() -> Problem:
    return Problem(mlp(2), lambda r: partial(cubic, reduction=r), vectors(rand, 2))


def poisson(f: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return getattr(f.exp() - y * f, reduction)()


class Poisson(Loss):
    """The entry of the loss above, as in the documentation of ``register_loss``."""

    def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return f.flatten(0, -2), y.flatten(0, -2)

    def term_values(self, F: Tensor, targets: Tensor) -> Tensor:
        return (F.exp() - targets * F).sum(-1)

    def normalizer(self, F: Tensor, targets: Tensor, n: int) -> int:
        return F.numel()

    def root_columns(self, F: Tensor, targets: Tensor, columns: Any = None) -> Tensor:
        root = torch.diag_embed((F / 2).exp()).movedim(-1, 0)
        return root if columns is None else root[columns]

    def sample(self, F: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        return torch.where(uniforms.transpose(0, 1) < 0.5, -1.0, 1.0).to(F) * (F / 2).exp()


def registered() -> Problem:
    problem = Problem(mlp(2), lambda r: partial(poisson, reduction=r), vectors(unit, 2))
    with torch.no_grad():
        problem.model[2].bias += 1
    return problem


@pytest.fixture(autouse=True)
def _poisson(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a loss while a test runs."""
    for known in list(LOSSES):
        monkeypatch.setitem(LOSSES, known, LOSSES[known])
    monkeypatch.setitem(LOSSES, poisson, Poisson)


ALL_BATCHINGS = {
    f"independent of batching: {text}" for text in ("each example a batch", "all data in one batch")
}
SHAPES = "batches have different shapes: [2, 3], [1, 2]"
VALUE_ONLY = {
    f"{name}: matrix": "the loss is not in the table (see register_loss)"
    for name in ("empirical Fisher", "loss term gradients", "GGN diagonal", "Monte-Carlo GGN")
}
SAMPLES = "Monte-Carlo GGN: matrix of the documented samples"
#: Problem -> what is skipped, and why.
PROBLEMS: dict[Callable[[], Problem], dict[str, str]] = {
    mlp_square: {},
    mlp_cross_entropy: {},
    mlp_binary: {},
    one_batch: {"independent of batching: all data in one batch": "there is only one batch"},
    cnn: {},
    sequence: {"independent of batching: all data in one batch": SHAPES},
    tied: {},
    function_model: {},
    mapping: {},
    huber: VALUE_ONLY,
    own_loss: {**VALUE_ONLY, "GGN: positive semi-definite": "the loss is not convex"},
    registered: {SAMPLES: "the samples of a registered loss are its own"},
}
FAST = (mlp_square, cnn, sequence, mapping, own_loss, registered)


# --------------------------------------------------------------------------------------------------
# What is right passes
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "build", [pytest.param(b, marks=[] if b in FAST else [pytest.mark.slow]) for b in PROBLEMS]
)
def test_library_conforms(build: Callable[[], Problem]) -> None:
    """Nothing is skipped but what must be, with the reason."""
    report = build().check()
    found = {p.name: p.skipped for p in report.skipped}
    assert set(found) == set(PROBLEMS[build])
    assert all(found[name].startswith(reason) for name, reason in PROBLEMS[build].items())
    assert all(p.error <= p.tolerance for p in report.checked)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("build", PROBLEMS)
def test_library_conforms_in_both_precisions(
    build: Callable[[], Problem], dtype: torch.dtype, reduction: str
) -> None:
    """Float32 is compared with less, and its classes are not compared sample by sample."""
    problem = build()
    cast = partial(_cast, dtype=dtype)
    problem.data = [(cast(X), cast(y)) for X, y in problem.data]
    if isinstance(problem.model, nn.Module):
        problem.model.to(dtype)
    else:
        problem.params = {name: cast(p) for name, p in problem.params.items()}
    loss = problem.loss
    problem.loss = lambda r: loss(r).to(dtype) if isinstance(loss(r), nn.Module) else loss(r)
    report = problem.check(reduction, mc_samples=512)
    skipped = {p.name for p in report.skipped}
    if dtype == torch.float32 and "Monte-Carlo GGN: matrix" not in skipped:
        assert SAMPLES in skipped
    assert {p.tolerance for p in report.checked} >= {1e-8 if dtype == F64 else 1e-3}


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, UserDict):
        return UserDict({key: value.to(dtype) for key, value in x.items()})
    return x.to(dtype) if x.is_floating_point() else x


@pytest.mark.slow
@pytest.mark.parametrize("build", [mlp_square, mlp_cross_entropy, mlp_binary, sequence])
def test_statistical_test_raises_no_false_alarm(build: Callable[[], Problem]) -> None:
    """One seed after the other; with predictions that are nearly certain, too."""
    problem = build()
    for seed in range(0, 48, 8):
        problem.check(seed=seed)
    with torch.no_grad():
        list(problem.model.parameters())[-1].copy_(
            torch.linspace(0, 12, list(problem.model.parameters())[-1].numel(), dtype=F64)
        )
    for seed in range(0, 48, 8):
        problem.check(seed=seed)


# --------------------------------------------------------------------------------------------------
# Planted defects
# --------------------------------------------------------------------------------------------------
Patch = pytest.MonkeyPatch
DEFECTS: list[Any] = []


def defect(
    name: str,
    build: Callable[[], Problem] = mlp_cross_entropy,
    slow: bool = False,
    **options: Any,
) -> Any:
    """Register a defect with the property that must be named."""

    def register(plant: Callable[[Patch], None]) -> Any:
        marks = [pytest.mark.slow] if slow else []
        values = plant, name, build, options
        DEFECTS.append(pytest.param(*values, id=plant.__name__, marks=marks))
        return plant

    return register


def wrap(patch: Patch, cls: type, method: str, change: Callable[..., Any]) -> None:
    """Replace a method by a function of the original one and its arguments."""
    original = getattr(cls, method)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(original, self, *args, **kwargs)

    patch.setattr(cls, method, changed)


def scaled(factor: float) -> Callable[..., Any]:
    """Multiply all tensors of a result."""
    return lambda original, *args: [factor * y for y in original(*args)]


@defect("Jacobian: matrix: relative error")
def jacobian_rows_of_a_batch_reversed(patch: Patch) -> None:
    def reverse(original: Any, self: Any, X: Any) -> Any:
        return [original(self, X)[0].flip(0)]

    wrap(patch, JacobianLinearOperator, "_matmat", reverse)


@defect("Jacobian: one vector: relative error")
def jacobian_of_single_vectors_scaled(patch: Patch) -> None:
    def scale(original: Any, self: Any, X: Any) -> Any:
        return [y * (1 if y.shape[-1] > 1 else 1 + 1e-6) for y in original(self, X)]

    wrap(patch, JacobianLinearOperator, "_matmat", scale)


@defect("transposed Jacobian: matrix: relative error")
def transposed_jacobian_of_other_rows(patch: Patch) -> None:
    def roll(original: Any, self: Any, X: Any) -> Any:
        return original(self, [X[0].roll(1, 0)])

    wrap(patch, JacobianLinearOperator, "_adjoint_matmat", roll)


@defect("GGN: matrix: relative error")
def no_scale(patch: Patch) -> None:
    def unscaled(original: Any, self: Any, fn: Any, desc: str = "", **options: Any) -> Any:
        return original(self, fn, desc, **{**options, "scaled": False})

    wrap(patch, EmpiricalRisk, "sum_over_data", unscaled)


@defect("GGN: matrix: relative error")
def scale_without_class_weights(patch: Patch) -> None:
    wrap(patch, CrossEntropy, "normalizer", lambda original, self, F, y, n: F.shape[0])


@defect("GGN: matrix: relative error", sequence)
def ignored_terms_count_in_the_scale(patch: Patch) -> None:
    def all_terms(original: Any, self: Any, F: Tensor, y: Tensor, n: int) -> Any:
        return original(self, F, torch.where(y < 0, 0, y), n)

    wrap(patch, CrossEntropy, "normalizer", all_terms)


@defect("GGN: matrix: relative error", huber)
def batches_count_alike(patch: Patch) -> None:
    wrap(patch, GenericLoss, "normalizer", lambda original, self, F, y, n: 1)
    wrap(patch, GenericLoss, "value", lambda original, self, F, y, n: self.loss_func(F, y))


@defect("GGN: matrix: relative error", mlp_binary)
def loss_hessian_without_options(patch: Patch) -> None:
    wrap(patch, BCEWithLogits, "weight", lambda original, *args: None)


@defect("GGN: positive semi-definite: the smallest eigenvalue is -")
def slightly_indefinite(patch: Patch) -> None:
    def shift(original: Any, self: Any, X: Any) -> Any:
        return [y - 1e-10 * x for x, y in zip(X, original(self, X), strict=True)]

    wrap(patch, GGNLinearOperator, "_matmat", shift)


@defect("Hessian: matrix: relative error")
def hessian_is_the_ggn(patch: Patch) -> None:
    def ggn(original: Any, self: Any, batch: Any, X: Any, counter: Any, recording: bool) -> Any:
        def middle(F: Tensor, f: Tensor) -> Any:
            return self._loss_hessian(F, self._loss.terms(f, batch.y)[1], batch.n)

        terms = partial(self._terms, batch)
        products, _, f = self._differentiator.gramian(terms, self._theta, X, middle, recording)
        return products, self._normalizer(batch, f)

    wrap(patch, HessianLinearOperator, "_multiply_batch", ggn)


@defect("Hessian: matrix: relative error", slow=True)
def hessian_with_the_diagonal_twice(patch: Patch) -> None:
    """As H + Hᵀ - diag(H) of a triangle is, if the last is forgotten."""

    def add(original: Any, self: Any, X: Any) -> Any:
        Y = original(self, X)
        eye = torch.eye(sum(x[..., 0].numel() for x in X), dtype=F64)
        parts = eye.split([x[..., 0].numel() for x in X])
        units = [p.reshape(*x.shape[:-1], -1) for p, x in zip(parts, X, strict=True)]
        columns = torch.cat([c.flatten(0, -2) for c in original(self, units)])
        diagonal = columns.diagonal().split([x[..., 0].numel() for x in X])
        triples = zip(X, Y, diagonal, strict=True)
        return [y + d.reshape(x.shape[:-1]).unsqueeze(-1) * x for x, y, d in triples]

    wrap(patch, HessianLinearOperator, "_matmat", add)


@defect("empirical Fisher: matrix: relative error")
def centred_fisher(patch: Patch) -> None:
    def centred(original: Any, self: Any, F: Tensor, targets: Any, V: Tensor) -> Tensor:
        g = self.grad(F, targets)
        g = g - g.mean(0)
        return g * (g * V).sum(-1, keepdim=True)

    wrap(patch, Loss, "grad_outer_vec", centred)


@defect("empirical Fisher: matrix: relative error", cnn)
def fisher_of_examples(patch: Patch) -> None:
    """The gradients of an example's terms are added up before they are squared."""

    def summed(original: Any, self: Any, F: Tensor, targets: Any, n: int, first: int) -> Any:
        g = self._loss.grad(F, targets).reshape(n, -1)
        return lambda V: (g * (g * V.reshape(n, -1)).sum(1, keepdim=True)).reshape(V.shape)

    wrap(patch, EFLinearOperator, "_term_curvature", summed)


@defect("empirical Fisher: refuses a loss that is not in the table: did not raise", huber)
def gradients_of_unknown_terms(patch: Patch) -> None:
    patch.setattr(EFLinearOperator, "_check_loss", lambda self, loss: None)


@defect("loss term gradients: matrix: relative error", slow=True)
def gradients_are_averaged(patch: Patch) -> None:
    wrap(patch, PerExampleGradientLinearOperator, "_matmat", scaled(0.25))


@defect("loss term gradients: their scaled sum is the gradient: relative error")
def wrong_scale_attribute(patch: Patch) -> None:
    scale = property(lambda self: 1 / self.shape[0])
    patch.setattr(PerExampleGradientLinearOperator, "scale", scale)


@defect("GGN diagonal: matrix: relative error")
def diagonal_of_the_last_batch_scale(patch: Patch) -> None:
    def rescale(original: Any, self: Any) -> Any:
        return {name: 2 * d for name, d in original(self).items()}

    wrap(patch, GGNDiagonalComputer, "compute", rescale)


@defect("Monte-Carlo GGN: a function of the seed: ")
def samples_are_drawn_anew(patch: Patch) -> None:
    generator = torch.Generator()

    def anew(original: Any, self: Any, purpose: str, first: int, num: int, draws: int) -> Any:
        return torch.rand(num, draws, generator=generator, dtype=F64)

    wrap(patch, RandomSource, "uniforms", anew)


@defect(SAMPLES + ": another seed: relative error")
def seed_is_ignored(patch: Patch) -> None:
    def ignore(original: Any, self: Any, *args: Any, seed: int = 0, **options: Any) -> None:
        original(self, *args, seed=0, **options)

    wrap(patch, GGNLinearOperator, "__init__", ignore)


@defect(SAMPLES + ": relative error")
def samples_without_root(patch: Patch) -> None:
    """Would-be gradients times k instead of its root."""

    def scale(original: Any, self: Any, F: Tensor, y: Any, u: Tensor, V: Tensor) -> Tensor:
        return self.weight(F, y).unsqueeze(-1) * original(self, F, y, u, V)

    wrap(patch, CrossEntropy, "sampled_hess_vec", scale)


@defect(SAMPLES + ": relative error", mlp_square)
def all_terms_share_a_sample(patch: Patch) -> None:
    def first(original: Any, self: Any, F: Tensor, y: Any, u: Tensor) -> Tensor:
        return original(self, F, y, u[:1].expand_as(u))

    wrap(patch, MSE, "sample", first)


@defect(SAMPLES + ": relative error")
def batches_share_samples(patch: Patch) -> None:
    wrap(patch, TermCounter, "advance", lambda original, self, num_terms: 0)


UNBIASED = r"Monte-Carlo GGN: unbiased: the mean of 512 samples deviates by"


def unbiased(patch: Patch, cls: type, change: Callable[..., Tensor]) -> None:
    """Change samples, and leave out the exact comparison with the documented ones."""
    patch.setattr(Checker, "_check_samples", lambda *args: None)
    wrap(patch, cls, "sample", change)
    patch.setattr(cls, "sampled_hess_vec", Loss.sampled_hess_vec)


@defect(UNBIASED, confident, mc_samples=512)
def uniform_classes(patch: Patch) -> None:
    """Classes are not drawn from the model's distribution; the second moment is another."""

    def uniform(original: Any, self: Any, F: Tensor, y: Any, u: Tensor) -> Tensor:
        return original(self, 0 * F, y, u)

    unbiased(patch, CrossEntropy, uniform)


@defect(UNBIASED, mlp_square, mc_samples=512, slow=True)
def unit_variance(patch: Patch) -> None:
    """As for the likelihood N(f, I)."""

    def smaller(original: Any, self: Any, F: Tensor, y: Any, u: Tensor) -> Tensor:
        return original(self, F, y, u) / 2**0.5

    unbiased(patch, MSE, smaller)


@defect(UNBIASED, mlp_square, mc_samples=512, slow=True)
def correlated_entries(patch: Patch) -> None:
    """The diagonal of the second moment is right, other entries are not."""

    def same(original: Any, self: Any, F: Tensor, y: Any, u: Tensor) -> Tensor:
        return original(self, F, y, u[..., :1].expand_as(u))

    unbiased(patch, MSE, same)


@defect(UNBIASED, mlp_binary, mc_samples=512, slow=True)
def root_of_options_forgotten(patch: Patch) -> None:
    def squared(original: Any, self: Any, F: Tensor, y: Any, u: Tensor) -> Tensor:
        return original(self, F, y, u) * self.weight(F, y).sqrt()

    unbiased(patch, BCEWithLogits, squared)


@defect(UNBIASED, registered, mc_samples=512, slow=True)
def registered_samples_too_large(patch: Patch) -> None:
    def larger(original: Any, self: Any, F: Tensor, y: Any, u: Tensor) -> Tensor:
        return original(self, F, y, u) * (F / 2).exp()

    wrap(patch, Poisson, "sample", larger)


@defect("Monte-Carlo GGN diagonal: that of the Monte-Carlo GGN: relative error")
def diagonal_has_other_samples(patch: Patch) -> None:
    def other(original: Any, self: Any, *args: Any, seed: int, **options: Any) -> None:
        original(self, *args, seed=seed + 1, **options)

    wrap(patch, GGNDiagonalComputer, "__init__", other)


@defect("GGN: keep_graph=True: (after a change of the parameters|raised RuntimeError: one of)")
def stale_graphs(patch: Patch) -> None:
    """PyTorch itself complains if a stale graph needs parameters that were changed in place."""

    def start(original: Any, self: Any, dependencies: Any) -> None:
        self._index = 0

    wrap(patch, KeptGraphs, "start", start)


@defect("GGN: keep_graph=True: second product: relative error")
def kept_graphs_of_other_batches(patch: Patch) -> None:
    def find(original: Any, self: Any, element: Any, first_term: int) -> Any:
        graph = original(self, element, first_term)
        return graph and self._entries[0].graph

    wrap(patch, KeptGraphs, "find", find)


@defect("GGN: independent of batching: each example a batch: relative error", one_batch)
def mean_of_means(patch: Patch) -> None:
    """Each batch is divided by its own number, which is right for one batch."""

    def mean(original: Any, self: Any, fn: Any, *args: Any, **options: Any) -> Any:
        def average(batch: Any) -> Any:
            summands, normalizer = fn(batch)
            return [s / normalizer for s in summands], 1.0

        return original(self, average, *args, **options)

    wrap(patch, EmpiricalRisk, "sum_over_data", mean)


@defect("Monte-Carlo GGN: independent of batching: each example a batch", one_batch, slow=True)
def samples_start_anew_in_each_batch(patch: Patch) -> None:
    wrap(patch, TermCounter, "advance", lambda original, self, num_terms: 0)


TRACES = "parameters, module and random generators: changed: "


def leaves(patch: Patch, act: Callable[[nn.Module], Any]) -> None:
    """Do something to the module in each product."""

    def multiply(original: Any, self: Any, X: Any) -> Any:
        act(self.risk.model)
        return original(self, X)

    wrap(patch, HessianLinearOperator, "_matmat", multiply)


@defect(TRACES + "torch's global random generator")
def generator_is_advanced(patch: Patch) -> None:
    leaves(patch, lambda model: torch.rand(1))


@defect(TRACES + "the hooks of module '0'", slow=True)
def hooks_stay_behind(patch: Patch) -> None:
    leaves(patch, lambda model: model[0].register_forward_hook(lambda *args: None))


@defect(TRACES + "the training flag of module '1'", slow=True)
def module_is_switched(patch: Patch) -> None:
    leaves(patch, lambda model: model[1].eval())


@defect(TRACES + r"the gradient of params\['2.bias'\]", slow=True)
def gradients_stay_behind(patch: Patch) -> None:
    def accumulate(model: nn.Module) -> None:
        model[2].bias.grad = torch.zeros_like(model[2].bias)

    leaves(patch, accumulate)


@pytest.mark.parametrize(("plant", "name", "build", "options"), DEFECTS)
def test_finds_defect(
    plant: Callable[[Patch], None],
    name: str,
    build: Callable[[], Problem],
    options: dict[str, Any],
    monkeypatch: Patch,
) -> None:
    """The first property that fails is named."""
    problem = build()
    plant(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        problem.check(**options)
    assert re.match(name, str(caught.value)), caught.value


# --------------------------------------------------------------------------------------------------
# The function itself
# --------------------------------------------------------------------------------------------------
def test_message_says_how_much(monkeypatch: Patch) -> None:
    """The error names the property, the error and the tolerance."""
    jacobian_rows_of_a_batch_reversed(monkeypatch)
    message = r"Jacobian: matrix: relative error \d\.\d+e[+-]\d+ exceeds the tolerance 1.000e-08"
    with pytest.raises(AssertionError, match=f"^{message}$"):
        mlp_square().check()


def test_tolerance(monkeypatch: Patch) -> None:
    """The relative tolerance can be chosen; a NaN is in no tolerance."""
    wrap(monkeypatch, GGNLinearOperator, "_matmat", scaled(1 + 1e-6))
    with pytest.raises(AssertionError, match=r"GGN: matrix: relative error 1\.000e-06 exceeds"):
        huber().check()
    huber().check(rtol=1e-5)
    wrap(monkeypatch, GGNLinearOperator, "_matmat", scaled(float("nan")))
    with pytest.raises(AssertionError, match="GGN: matrix: relative error nan exceeds"):
        huber().check(rtol=1e9)


def test_report() -> None:
    """A readable table, with a line for each property."""
    report = own_loss().check()
    assert len(report.properties) == len(report.checked) + len(report.skipped)
    lines = str(report).splitlines()
    assert lines[0].split() == ["property", "error", "tolerance"]
    assert len(lines) == 1 + len(report.properties)
    for line, p in zip(lines[1:], report.properties, strict=True):
        assert line.startswith(p.name)
        assert line.endswith(f"skipped: {p.skipped}" if p.skipped else f"{p.tolerance:.1e}")


def test_too_many_parameters() -> None:
    """The message says what to do."""
    problem = mlp_square()
    with pytest.raises(ValueError, match=r"12 numbers, more than max_params=11") as caught:
        problem.check(max_params=11)
    assert "pass a subset of params" in str(caught.value)
    assert "params={'0.bias': params['0.bias']}" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mc_samples": 63}, ValueError, "mc_samples must be at least 64"),
        ({"params": []}, TypeError, "params must be a dict"),
        ({"data": []}, ValueError, "data is empty"),
        ({"data": iter([])}, ValueError, "can be iterated only once"),
        ({"loss_func": None}, ValueError, "is not a loss function"),
        ({"loss_func": nn.MSELoss(reduction="none")}, ValueError, "reduction 'none'"),
    ],
)
def test_bad_input(options: dict[str, Any], error: Any, message: str) -> None:
    """Errors of the operators come as they are, not as failed properties."""
    problem = mlp_square()
    arguments = {
        "model_func": problem.model,
        "loss_func": nn.MSELoss(),
        "params": dict(problem.model.named_parameters()),
        "data": problem.data,
        **options,
    }
    with pytest.raises(error, match=message):
        check_curvature(**arguments)


def test_loss_that_is_not_finite() -> None:
    """If all terms are ignored, PyTorch's mean is NaN."""
    problem = sequence()
    problem.data = problem.data[1:]
    with pytest.raises(ValueError, match="not finite"):
        problem.check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_certain_predictions(dtype: torch.dtype) -> None:
    """All seeds draw the same class, and numbers cancel: no false alarm."""
    problem = Problem(nn.Linear(2, 3).to(dtype), cross_entropy, vectors(classes))
    problem.data = [(X.to(dtype), y) for X, y in problem.data]
    with torch.no_grad():
        problem.model.weight.mul_(300)
    problem.check()


def test_random_model_is_refused() -> None:
    """Nothing is true of a model that gives other predictions each time."""
    problem = mlp_square()
    problem.model = nn.Sequential(problem.model, nn.Dropout(0.5))
    with pytest.raises(RuntimeError, match="Dropout"):
        problem.check()


def coupled() -> Problem:
    """Predictions depend on the other examples in the batch."""
    model = Apply(lambda self, x: self.net(x - x.mean(0)), net=mlp(2))
    return Problem(model, lambda r: nn.HuberLoss(reduction=r), vectors(rand, 2))


def several_predictions() -> Problem:
    """The mean counts batches by examples, which have different numbers of predictions."""
    model = Apply(lambda self, X: self.net(X["x"])[X["mask"]], net=mlp(2))
    masks = torch.tensor([[True, True], [False, True]]), torch.tensor([[True, True]])
    data = [({"x": rand(*m.shape, 2), "mask": m}, rand(3 - i, 2)) for i, m in enumerate(masks)]
    return Problem(
        model,
        lambda r: nn.HuberLoss(reduction=r),
        data,
        batch_size_fn=lambda X: X["x"].shape[0],
    )


def padded() -> Problem:
    """``batch_size_fn`` does not count along the first axis."""
    data = [(rand(2 * n, 2), rand(2 * n, 2)) for n in (3, 1)]
    loss = partial(nn.HuberLoss, delta=0.3)
    return Problem(mlp(2), lambda r: loss(reduction=r), data, batch_size_fn=lambda X: len(X) // 2)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (coupled, "the model's predictions depend on the batches"),
        (several_predictions, r"the targets of a batch of 2 are [3, 2]"),
        (padded, r"the inputs of a batch of 3 are [6, 2]"),
    ],
)
def test_says_why_data_are_not_batched_anew(build: Callable[[], Problem], reason: str) -> None:
    """Data that cannot be batched otherwise are no failure."""
    skipped = {p.name: p.skipped for p in build().check().skipped}
    assert {name: skipped[name] for name in ALL_BATCHINGS} == dict.fromkeys(ALL_BATCHINGS, reason)


def test_loss_that_depends_on_batches() -> None:
    """A mean of its own making cannot be independent of the batches."""

    def largest(f: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return (f - y).square().sum(-1).max()

    problem = Problem(mlp(2), lambda r: largest, vectors(rand, 2))
    skipped = {p.name: p.skipped for p in problem.check().skipped}
    assert {skipped[name] for name in ALL_BATCHINGS} == {"the loss depends on the batches"}


def test_second_derivatives_that_are_missing() -> None:
    """What PyTorch cannot differentiate twice has no Hessian to compare with."""
    net = nn.Sequential(nn.EmbeddingBag(4, 2), nn.Linear(2, 2)).double()
    data = [(torch.tensor([[0, 2], [3, 1]]), rand(2, 2))]
    problem = Problem(net, lambda r: nn.HuberLoss(reduction=r), data)
    report = problem.check()
    skipped = {p.name: p.skipped for p in report.skipped}
    assert "differentiate twice" in skipped["Hessian: matrix"]
    assert "GGN: matrix" in skipped or "GGN: matrix" in {p.name for p in report.checked}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_leaves_no_traces(context: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is printed or changed, also where gradients are not recorded."""
    problem = huber()
    before, version = torch.get_rng_state(), problem.model[0].weight._version
    with context():
        problem.check()
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in problem.model.parameters())
    assert problem.model[0].weight._version == version
    assert capsys.readouterr() == ("", "")


def test_seed() -> None:
    """The same seed gives the same report, another one another."""
    problem = huber()
    first, again, other = problem.check(), problem.check(), problem.check(seed=1)
    assert first == again != other
