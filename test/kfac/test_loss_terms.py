"""What counts as a loss term: KFAC, EKFAC, KFOC, GGN and gradient agree where some are ignored.

Ignored terms add nothing to curvature and gradient factors, and "mean" divides by the weights of
those of all data that are not ignored. Their positions still count in input factors.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from block_checks import (
    assert_close,
    check_ekfac,
    check_kfac,
    first_name,
    given_samples,
    kept_apart,
)
from kfac_cases import ClassesSecond, Lambda
from kfac_reference import Setup
from layer_reference import (
    exact_block,
    layer_examples,
    layer_groups,
    layer_places,
    nearest_kronecker,
    reference_blocks,
    scale,
)
from torch import Tensor, nn
from torch.nn import functional as F

from curvlinops import (
    EFLinearOperator,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops.risk import EmpiricalRisk

CLASSES, TOKENS, WIDTH, SKIP = 3, 5, 3, -100
WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
#: Examples have 2, 1, 0, 3 and 1 terms that are not ignored; one batch has none.
TARGETS = ([[0, SKIP, 2], [SKIP, 1, SKIP]], [[SKIP, SKIP, SKIP]], [[1, 2, 0], [2, SKIP, SKIP]])
LOSSES: dict[str, dict[str, Any]] = {
    "ignore": {},
    "weight": {"weight": WEIGHT},
    "smooth": {"label_smoothing": 0.3},
    "all": {"weight": WEIGHT, "label_smoothing": 0.3},
    "a class": {"weight": WEIGHT, "label_smoothing": 0.3, "ignore_index": 2},
    "sum": {"weight": WEIGHT, "label_smoothing": 0.3, "reduction": "sum"},
}
each_loss = pytest.mark.parametrize("loss", LOSSES)
each_approx = pytest.mark.parametrize("approx", ["expand", "reduce"])
OPERATORS = (
    (KFACLinearOperator, {"loss_terms": "exact"}),
    (EKFACLinearOperator, {"loss_terms": "exact"}),
    (KFOCLinearOperator, {}),
    (GGNLinearOperator, {}),
    (GGNDiagonalLinearOperator, {}),
)


def loss_of(name: str) -> nn.Module:
    return nn.CrossEntropyLoss(**LOSSES[name])


def attention(m: Any, tokens: Tensor) -> Tensor:
    h = m.norm(m.table(tokens))
    return m.head(torch.softmax(h @ h.mT, dim=-1) @ torch.tanh(m.inner(h)))


def sequences(name: str) -> Setup:
    """A model of sequences whose positions mix, with a loss."""
    torch.manual_seed(2)
    layers = {"table": nn.Embedding(TOKENS, WIDTH), "norm": nn.LayerNorm(WIDTH)}
    linears = {"inner": nn.Linear(WIDTH, 2), "head": nn.Linear(2, CLASSES)}
    model = ClassesSecond(Lambda(attention, **layers, **linears)).double()
    for p in model.parameters():
        nn.init.normal_(p)
    data = [(torch.randint(TOKENS, (len(y), len(y[0]))), torch.tensor(y)) for y in TARGETS]
    if name == "a class":  # what is ignored is a class like others
        data = [(X, y.masked_fill(y == SKIP, 2)) for X, y in data]
    return Setup(model, loss_of(name), dict(model.named_parameters()), data)


def rebatched(problem: Setup, size: int) -> Setup:
    """Return the same data in other batches."""
    X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    data = list(zip(X.split(size), y.split(size), strict=True))
    return Setup(problem.model, problem.loss, problem.params, data)


def whole(problem: Setup, fisher_type: str) -> Tensor:
    """Return the dense exact matrix of all parameters, from the reference's derivatives."""
    result = torch.zeros(())
    for example in layer_examples(problem):
        terms = zip(example.param_jacobian, example.hessians, example.gradients, strict=True)
        for J, H, g in terms:
            result = result + J.T @ (H if fisher_type == "type-2" else torch.outer(g, g)) @ J
    return scale(problem) * result


# ---- against the reference -----------------------------------------------------------------------
@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
@each_approx
@each_loss
def test_kfac_and_ekfac(loss: str, approx: str, fisher_type: str) -> None:
    problem, vectors, kind = sequences(loss), None, fisher_type
    options: dict[str, Any] = {"fisher_type": fisher_type, "kfac_approx": approx}
    if fisher_type == "mc":
        options |= {"mc_samples": 2, "seed": 7}
        kind, vectors = "given", given_samples(problem, 2, 7)
        for example, own in zip(layer_examples(problem), vectors, strict=True):
            ignored = example.targets == problem.loss.ignore_index
            assert all(not v[ignored].any() and v[~ignored].any(1).all() for v in own)
        vectors = kept_apart(vectors)
    options |= {"loss_terms": "exact", "separate_weight_and_bias": False}
    K = KFACLinearOperator(**problem.kwargs(), **options)
    check_kfac(K, problem, True, kind, approx, vectors)
    E = EKFACLinearOperator(**problem.kwargs(), **options)
    check_ekfac(E, problem, True, kind, approx, vectors)


@each_loss
def test_ignored_positions_are_inputs(loss: str) -> None:
    """Input factors do not depend on targets; gradient factors do."""
    problem = sequences(loss)
    full = Setup(problem.model, problem.loss, problem.params, problem.data)
    full.data = [(X, torch.zeros_like(y)) for X, y in problem.data]
    some, all_ = (KFACLinearOperator(**p.kwargs(), fisher_type="type-2") for p in (problem, full))
    tokens = torch.cat([X.flatten() for X, _ in problem.data])
    counts = torch.bincount(tokens, minlength=TOKENS).double() / len(tokens)
    assert_close(some.factors("model.table.weight")[1].diagonal(), counts)
    for name in ("model.inner.weight", "model.head.weight"):
        (B, A), (other, same) = (K.factors(name) for K in (some, all_))
        assert torch.equal(A, same)
        assert (B - other).norm() > 1e-2 * B.norm()


@each_loss
def test_kfoc(loss: str) -> None:
    """The Kronecker product nearest to each exact block."""
    problem = sequences(loss)
    K = KFOCLinearOperator(**problem.kwargs(), fisher_type="type-2")
    for block in reference_blocks(problem, False, "type-2", "expand"):
        exact = exact_block(problem, block.group, "type-2")
        ((B, A),) = block.parts
        if A is not None:
            exact = torch.kron(*nearest_kronecker(exact, len(B), len(A)))
        actual = K.block(first_name(block)).to_dense()
        assert (actual - exact).norm() <= 1e-7 * exact.norm()


@each_loss
def test_matrices_and_gradient(loss: str) -> None:
    """GGN, its diagonal, empirical Fisher and gradient; the gradient is PyTorch's for all data."""
    problem = sequences(loss)
    G = GGNLinearOperator(**problem.kwargs())
    assert_close(G.to_dense(), whole(problem, "type-2"))
    D = GGNDiagonalLinearOperator(**problem.kwargs())
    assert_close(D.diagonal(), whole(problem, "type-2").diagonal())
    assert_close(EFLinearOperator(**problem.kwargs()).to_dense(), whole(problem, "empirical"))
    X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    value = problem.loss(problem.model(X), y)
    expected = torch.autograd.grad(value, list(problem.params.values()))
    computed, gradient = EmpiricalRisk(**problem.kwargs()).loss_and_gradient()
    torch.testing.assert_close(computed, value.detach())
    for a, b in zip(gradient, expected, strict=True):
        assert_close(a, b)
    sums = [
        torch.einsum("rcd,rc->d", e.param_jacobian, e.gradients) for e in layer_examples(problem)
    ]
    assert_close(scale(problem) * sum(sums), torch.cat([g.flatten() for g in expected]))


# ---- operators among each other ------------------------------------------------------------------
@pytest.mark.parametrize("joint", [False, True])
@each_loss
def test_traces(loss: str, joint: bool) -> None:
    """EKFAC with exact loss terms has the trace of each block of the GGN."""
    problem = sequences(loss)
    options = {"fisher_type": "type-2", "separate_weight_and_bias": not joint}
    E = EKFACLinearOperator(**problem.kwargs(), **options, loss_terms="exact")
    diagonal = GGNLinearOperator(**problem.kwargs()).to_dense().diagonal()
    for group in layer_groups(problem, joint):
        trace = diagonal[layer_places(problem, group)].sum()
        assert_close(E.block(next(iter(group.values()))).trace(), trace)


def rows(loss: str, X: Tensor) -> Setup:
    """A linear model of 6 examples with one loss term each."""
    y = torch.tensor([0, SKIP, 2, SKIP, 1, 2])
    y = y.masked_fill(y == SKIP, 2) if loss == "a class" else y
    model = nn.Linear(2, CLASSES).double()
    data = [(X[:1], y[:1]), (X[1:2], y[1:2]), (X[2:], y[2:])]
    return Setup(model, loss_of(loss), dict(model.named_parameters()), data)


@each_loss
def test_linear_model(loss: str) -> None:
    """KFAC is the GGN: of the bias, and of all parameters if inputs are equal."""
    problem = rows(loss, torch.randn(6, 2).double())
    K = KFACLinearOperator(**problem.kwargs(), fisher_type="type-2")
    G = GGNLinearOperator(**problem.kwargs()).to_dense()
    assert_close(K.block("bias").to_dense(), G[-CLASSES:, -CLASSES:])
    problem = rows(loss, torch.randn(1, 2).double().expand(6, 2))
    G = GGNLinearOperator(**problem.kwargs()).to_dense()
    for cls in (KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator):
        for approx in ("expand", "reduce"):
            options = {"kfac_approx": approx, "separate_weight_and_bias": False}
            K = cls(**problem.kwargs(), **options, fisher_type="type-2")
            assert (K.to_dense() - G).norm() <= 1e-7 * G.norm()


@each_loss
def test_without_ignored_examples(loss: str) -> None:
    """Only input factors see them; they are means over all."""
    problem = rows(loss, torch.randn(6, 2).double())
    kept = copy.copy(problem)
    X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    counted = y != problem.loss.ignore_index
    kept.data = [(X[counted], y[counted])]
    kept.__dict__.pop("layer_examples", None)
    for cls in (KFOCLinearOperator, GGNLinearOperator, GGNDiagonalLinearOperator):
        some, all_ = (cls(**p.kwargs(), **_type2(cls)).to_dense() for p in (kept, problem))
        assert (some - all_).norm() <= 1e-7 * all_.norm()
    for fisher_type in ("type-2", "empirical"):
        some, all_ = (
            KFACLinearOperator(**p.kwargs(), fisher_type=fisher_type) for p in (kept, problem)
        )
        assert_close(all_.factors("weight")[0], some.factors("weight")[0])
        assert_close(all_.factors("weight")[1], X.T @ X / 6)
        assert_close(some.factors("weight")[1], X[counted].T @ X[counted] / counted.sum())


def _type2(cls: Any) -> dict[str, str]:
    """Return the options for the exact matrix."""
    return {"fisher_type": "type-2"} if issubclass(cls, KFACLinearOperator) else {}


@pytest.mark.parametrize("samples", [False, True], ids=["exact", "samples"])
@pytest.mark.parametrize("loss", ["all", "a class", "sum"])
def test_batching_does_not_matter(loss: str, samples: bool) -> None:
    """Also if a batch has ignored terms only."""
    problem = sequences(loss)
    for cls, options in OPERATORS:
        if samples:
            sampled = {"fisher_type": "mc"} if issubclass(cls, KFACLinearOperator) else {}
            chosen = {**sampled, "mc_samples": 2}
        else:
            chosen = {**options, **_type2(cls)}
        expected = cls(**problem.kwargs(), **chosen).to_dense()
        assert expected.trace() > 0
        for size in (1, 5):
            actual = cls(**rebatched(problem, size).kwargs(), **chosen).to_dense()
            assert (actual - expected).norm() <= 1e-7 * expected.norm()


def test_all_ignored_mean_is_that_of_the_loss() -> None:
    """PyTorch's mean of nothing is not a number; a sum is 0."""
    model = nn.Linear(2, CLASSES).double()
    data = [(torch.rand(2, 2).double(), torch.tensor([SKIP, SKIP]))]
    params = dict(model.named_parameters())
    assert F.cross_entropy(model(data[0][0]), data[0][1]).isnan()
    K = KFACLinearOperator(
        model, nn.CrossEntropyLoss(reduction="sum"), params, data, fisher_type="type-2"
    )
    assert not K.to_dense().any()
