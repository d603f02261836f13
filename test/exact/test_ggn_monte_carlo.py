"""Tests of the Monte-Carlo Gauss-Newton matrix: its samples are documented, few, and the same."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from exact_cases import (
    CLOSED_FORM,
    GENERIC,
    PROBLEMS,
    SIZES,
    Apply,
    C,
    Costs,
    Problem,
    assert_close,
    assert_matrix,
    classes,
    cross_entropy,
    ignoring,
    mlp,
    mse,
    rand,
    unit,
    vectors,
)
from torch import Tensor, nn
from torch.func import jacrev
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import (
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    KFACLinearOperator,
    record_gradients,
)
from curvlinops._random import RandomSource
from curvlinops.risk import loss_entry
from curvlinops.testing import check_operator

SEED = 2147483647
NO_LOOK = {"check_deterministic": False, "num_data": sum(SIZES)}


def build(problem: Problem, reduction: str = "mean", **options: Any) -> GGNLinearOperator:
    return problem.operator(GGNLinearOperator, reduction, **{"mc_samples": 2, **options})


def reference(problem: Problem, S: int, reduction: str = "mean", seed: int = SEED) -> Tensor:
    """The matrix from the documented samples, drawn for all loss terms of the data at once."""
    theta = problem.flat()
    loss, _ = loss_entry(problem.loss(reduction))
    ys = [y for _, y in problem.data]

    def predict(theta: Tensor) -> Tensor:
        pairs = zip(problem.predictions(theta), ys, strict=True)
        return torch.cat([loss.terms(f, y)[0] for f, y in pairs])

    F, targets = loss.terms(problem._together(problem.predictions(theta)), problem._together(ys))
    m, C = F.shape
    draws = loss.draws(C)
    uniforms = RandomSource(seed).uniforms("samples", 0, m, S * draws).reshape(m, S, draws)
    g = loss.sample(F, targets, uniforms)  # [S, m, C]
    gradients = torch.einsum("smc,mcd->smd", g, jacrev(predict)(theta)).flatten(0, 1)
    return problem.scale(reduction) / S * gradients.T @ gradients


# ---- the samples -------------------------------------------------------------------------------
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CLOSED_FORM)
def test_is_that_of_the_documented_samples(name: str, reduction: str) -> None:
    problem = PROBLEMS[name]()
    for S in (1, 3):
        dense = reference(problem, S, reduction)
        G = build(problem, reduction, mc_samples=S, **NO_LOOK)
        v = rand(len(dense))
        assert_close(G @ v, dense @ v)  # one column takes another way than several
        assert_matrix(build(problem, reduction, mc_samples=S), dense)


@pytest.mark.parametrize("name", ["CE weight", "BCE options", "mlp_mse", "sequence_mse"])
def test_seeds(name: str) -> None:
    problem = PROBLEMS[name]()
    default = build(problem)
    dense = default.to_dense()
    for G in (default, build(problem), build(problem, seed=SEED), copy.deepcopy(default)):
        for _ in range(2):
            assert torch.equal(G.to_dense(), dense)  # also after other products
            torch.rand(3)
    for seed in (0, 1, 2**64 - 1):
        other = build(problem, seed=seed).to_dense()
        assert (other - dense).norm() > 0.05 * dense.norm()
        assert_close(other, reference(problem, 2, seed=seed))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["CE all options", "BCE options", "mlp_mse"])
def test_batching_and_chunks_do_not_matter(name: str, reduction: str) -> None:
    problem = PROBLEMS[name]()
    X, y = (torch.cat(tensors) for tensors in zip(*problem.data, strict=True))
    dense = reference(problem, 2, reduction)
    for data in (
        [(X, y)],
        [[x, t] for x, t in zip(X.split(1), y.split(1), strict=True)],
        DataLoader(TensorDataset(X, y), batch_size=3),
    ):
        assert_matrix(build(problem, reduction, data=data, **NO_LOOK), dense)
    for chunk_size in (1, 2, 100):
        assert_matrix(build(problem, reduction, chunk_size=chunk_size), dense)


@pytest.mark.parametrize("name", ["CE weight", "BCE options", "mlp_mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_do_not_depend_on_the_precision(name: str, dtype: torch.dtype) -> None:
    # with other samples, the matrix would be another one
    problem = PROBLEMS[name]()
    problem.to(dtype)
    G = build(copy.deepcopy(problem), mc_samples=1)
    assert (G @ rand(G.shape[1]).to(dtype)).dtype == dtype
    problem.to(torch.float64)
    assert_matrix(G, reference(problem, 1), torch.finfo(dtype).eps)


def test_outputs_of_other_shapes_have_the_same_samples() -> None:
    # predictions [N, S, C] and [N S, C] of the same terms
    problem = PROBLEMS["sequence_mse"]()
    G = build(problem, mc_samples=3).to_dense()
    flat = [(X.flatten(0, 1), y.flatten(0, 1)) for X, y in problem.data]
    assert_matrix(build(problem, mc_samples=3, data=flat), G)


# ---- what kind of matrix -----------------------------------------------------------------------
def test_is_an_operator() -> None:
    problem = PROBLEMS["function_model"]()
    problem.data = problem.data[:1]
    check_operator(build(problem), reference(problem, 2))


@pytest.mark.parametrize("name", ["CE weight", "CE probabilities", "BCE options", "mlp_mse"])
def test_rank_and_definiteness(name: str) -> None:
    problem = PROBLEMS[name]()
    for S in (1, 2):
        G = build(problem, mc_samples=S).to_dense()
        assert_close(G, G.T)
        eigenvalues = torch.linalg.eigvalsh(G)
        assert eigenvalues.min() > -1e-14 * eigenvalues.max()
        rank = int((eigenvalues > 1e-12 * eigenvalues.max()).sum())
        assert S * 4 < rank <= S * sum(SIZES)  # no sample is used twice


def test_ignored_terms_add_nothing() -> None:
    def problem(y: Tensor) -> Problem:
        return Problem(model, lambda r: nn.CrossEntropyLoss(reduction=r, ignore_index=-7), [(X, y)])

    model, X, y = mlp(), rand(8, 3), ignoring(8)
    G = build(problem(y), "sum").to_dense()
    kept = build(problem(torch.where(y == -7, 0, y)), "sum").to_dense()
    assert (kept - G).norm() > 0.1 * G.norm()
    X[y == -7] = rand(3, 3) * 10
    assert_close(build(problem(y), "sum").to_dense(), G)  # but they keep their samples


# ---- the Monte-Carlo error -----------------------------------------------------------------------
LINEAR = {
    "cross-entropy": (cross_entropy, lambda *s: classes(s[0])),
    "binary cross-entropy": (lambda r: nn.BCEWithLogitsLoss(reduction=r), unit),
    "square": (mse, rand),
}


@pytest.mark.parametrize("loss", LINEAR)
def test_error_falls_with_the_root_of_the_number_of_samples(loss: str) -> None:
    # each example has its own parameters, of equal values: 4000 independent, equal experiments
    N, f = 4000, 3 * rand(C)
    function, targets = LINEAR[loss]
    params = {"logits": f.repeat(N, 1)}
    y = targets(N, C)
    indices = torch.arange(N).split((1500, 1, 2499))  # type: ignore[no-untyped-call]
    data = [(i, y[i]) for i in indices]
    problem = Problem(lambda p, i: p["logits"][i], function, data, params)
    F = f.clone().requires_grad_()
    exact = torch.autograd.functional.hessian(lambda F: function("sum")(F[None], y[:1]), F)
    eye = torch.eye(C, dtype=torch.float64)

    def errors(S: int, seed: int) -> Tensor:
        """Return the errors of all blocks, ``[N, C, C]``."""
        options = {"check_deterministic": False, "num_data": N}
        G = build(problem, "sum", mc_samples=S, seed=seed, **options)
        (blocks,) = G @ [eye.expand(N, C, C)]
        return blocks - exact

    few, many = errors(4, seed=0), errors(64, seed=1)
    squares = [e.square().sum((1, 2)) for e in (few, many)]
    means = [s.mean().item() for s in squares]
    standard_errors = [s.std().item() / N**0.5 for s in squares]
    # 16 times the samples: a quarter of the error, a sixteenth of its square
    tolerance = 5 * (standard_errors[0] ** 2 / 16**2 + standard_errors[1] ** 2) ** 0.5
    assert abs(means[0] / 16 - means[1]) <= tolerance
    assert tolerance < 0.25 * means[1]  # it says something
    # and there is no bias
    for e in (few, many):
        assert bool((e.mean(0).abs() <= 5 * e.std(0) / N**0.5 + 1e-14).all())


# ---- shared samples ------------------------------------------------------------------------------
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LINEAR)
def test_kfac_has_the_same_samples(loss: str, reduction: str) -> None:
    # one datum in a linear layer: the Kronecker product is the matrix
    function, targets = LINEAR[loss]
    model = nn.Linear(4, C, bias=False).double()
    problem = Problem(model, function, [(rand(1, 4), targets(1, C))])
    for options in ({"mc_samples": 1}, {"mc_samples": 3, "seed": 5}):
        K = problem.operator(KFACLinearOperator, reduction, fisher_type="mc", **options)
        assert_close(build(problem, reduction, **options).to_dense(), K.to_dense())
    other = build(problem, reduction, mc_samples=3).to_dense()
    assert (other - K.to_dense()).norm() > 1e-3 * other.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["mlp_mse", "sequence_cross_entropy", "BCE options", "mapping"])
def test_ggn_diagonal_has_the_same_samples(name: str, reduction: str) -> None:
    problem = PROBLEMS[name]()
    for options in ({"mc_samples": 1}, {"mc_samples": 3, "seed": 5}):
        diagonal = problem.operator(GGNDiagonalLinearOperator, reduction, **options).diagonal()
        assert_close(build(problem, reduction, **options).to_dense().diagonal(), diagonal)


# ---- products ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["mlp_mse", "cnn", "CE all options", "BCE options", "sequence_mse", "tied_embedding"]
)
def test_kept_graphs(name: str) -> None:
    problem = PROBLEMS[name]()
    dense = reference(problem, 2)
    G = build(problem, keep_graph=True)
    for _ in range(2):
        assert_matrix(G, dense)
        assert_close(G @ (v := rand(len(dense))), dense @ v)
    # the samples of other predictions, in graphs that are made anew
    with torch.no_grad():
        list(problem.params.values())[-1].add_(1.5)
    assert_matrix(G, reference(problem, 2))


def test_kept_graphs_have_the_samples_of_their_place() -> None:
    # of a batch that comes later than at first, behind others
    problem = PROBLEMS["CE weight"]()
    G = build(problem, keep_graph=True)
    assert_matrix(G, reference(problem, 2))
    problem.data.reverse()
    assert_matrix(G, reference(problem, 2))
    one, two = problem.data[0]
    problem.data[0] = (one[:2], two[:2])
    problem.data.append((one[2:], two[2:]))
    assert_matrix(G, reference(problem, 2))


def test_passes_and_model_calls(capsys: pytest.CaptureFixture[str]) -> None:
    cost = Costs(vectors(), capsys)
    problem = Problem(cost.model, cross_entropy, cost.data)  # type: ignore[arg-type]
    batches = [3, 1, 4]
    build(problem)
    assert cost() == (2, 2 * batches, [])
    G = build(problem, progressbar=True, **NO_LOOK)
    assert cost() == (0, [], [])
    for columns in ((), (2,)):
        G @ rand(31, *columns)
        assert cost() == (1, batches, ["GGN product"])
    G = build(problem, keep_graph=True, **NO_LOOK)
    for calls in (batches, []):
        G @ rand(31)
        assert cost() == (1, calls, [])


def test_leaves_the_generators_alone() -> None:
    problem = PROBLEMS["CE weight"]()
    before = torch.get_rng_state()
    expected = build(problem) @ torch.ones(31, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(build(problem) @ torch.ones(31, dtype=torch.float64), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_products_can_be_differentiated() -> None:
    problem = PROBLEMS["CE weight"]()
    G, dense = build(problem), reference(problem, 2)
    for columns in ((), (2,)):
        x = rand(31, *columns).requires_grad_()
        with record_gradients():
            y = G @ x
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert_close(gradient, 2 * dense @ dense @ x.detach())


# ---- what is refused ---------------------------------------------------------------------------
def test_shuffled_data() -> None:
    problem = PROBLEMS["CE weight"]()
    dataset = TensorDataset(*(torch.cat(part) for part in zip(*problem.data, strict=True)))
    data = DataLoader(dataset, batch_size=3, shuffle=True)
    message = r"The order of the data differs.*needs a fixed order\. Use shuffle=False"
    with pytest.raises(RuntimeError, match=message):
        build(problem, data=data)
    assert_matrix(build(problem, mc_samples=0, data=data), problem.ggn())
    build(problem, data=data, check_deterministic=False)


@pytest.mark.parametrize("name", sorted(GENERIC))
def test_generic_losses_are_refused(name: str) -> None:
    problem = PROBLEMS[name]()
    calls: list[int] = []
    model = problem.model
    problem.model = Apply(lambda self, x: calls.append(1) or self.net(x), net=model)
    problem.params = {f"net.{n}": p for n, p in problem.params.items()}
    loss = re.escape(loss_entry(problem.loss("mean"))[0].name)
    message = rf"^{loss} has no closed-form Monte-Carlo samples.*register_loss"
    for options in ({}, NO_LOOK):
        with pytest.raises(NotImplementedError, match=message):
            build(problem, **options)
    assert not calls
    build(problem, mc_samples=0)


@pytest.mark.parametrize("value", [-1, 1.0, "2", None])
def test_bad_numbers_of_samples(value: Any) -> None:
    message = f"mc_samples must be an integer, at least 0, got {value!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        build(PROBLEMS["mlp_mse"](), mc_samples=value)


@pytest.mark.parametrize("value", [-1, 2**64, 1.0])
def test_bad_seeds(value: Any) -> None:
    with pytest.raises(ValueError, match=f"seed must be .*got {re.escape(repr(value))}"):
        build(PROBLEMS["mlp_mse"](), seed=value)
