"""Tests of the loss terms' gradients and the empirical Fisher, against PyTorch's own loss terms."""

from __future__ import annotations

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
    sequences,
    vectors,
)
from scipy.sparse.linalg import lsmr
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import (
    EFLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    PerExampleGradientLinearOperator,
    cg,
    record_gradients,
)
from curvlinops.risk import loss_entry
from curvlinops.testing import check_operator

NO_LOOK = {"check_deterministic": False, "num_data": sum(SIZES)}


def rows(problem: Problem, reduction: str = "mean", **options: Any) -> Any:
    return problem.operator(PerExampleGradientLinearOperator, reduction, **options)


# ---- gradients of the loss terms -----------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, NO_LOOK], ids=["check", "no check"])
@pytest.mark.parametrize("name", CLOSED_FORM)
def test_rows_equal_autodiff(name: str, options: dict[str, Any]) -> None:
    problem = PROBLEMS[name]()
    dense = problem.gradients()
    # rows are not averaged; each is the first product of an operator that has not seen the model
    A = rows(problem, **options)
    assert_close(A @ (v := rand(dense.shape[1])), dense @ v)
    assert A.out_shape == [(len(dense),)]
    assert_matrix(rows(problem, "sum", **options), dense)
    AT = rows(problem, **options).T
    assert AT.in_shape == [(len(dense),)]
    assert_matrix(AT, dense.T)
    assert_close((u := rand(len(dense))) @ A, dense.T @ u)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CLOSED_FORM)
def test_rows_add_up(name: str, reduction: str) -> None:
    problem = PROBLEMS[name]()
    A = rows(problem, reduction)
    c = problem.scale(reduction).item()
    assert isinstance(A.scale, float)
    assert A.scale == pytest.approx(c, rel=1e-14)
    # to the loss's gradient
    gradient = A.scale * A.T @ torch.ones(A.shape[0], dtype=torch.float64)

    def objective(theta: Tensor) -> Tensor:
        return problem.objective(problem.predictions(theta), reduction)

    assert_close(gradient, grad(objective)(problem.flat()))
    _, gradients = A.risk.loss_and_gradient()
    assert_close(gradient, torch.cat([g.to_dense().flatten() for g in gradients]))
    # and, squared, to the empirical Fisher
    assert_matrix(A.scale * A.T @ A, problem.ef(reduction))


def test_is_an_operator() -> None:
    problem = PROBLEMS["sequence_cross_entropy"]()
    problem.data = problem.data[:1]
    A, dense = rows(problem), problem.gradients()
    check_operator(A.T, dense.T)
    assert not A.T.SELF_ADJOINT
    assert A.T.T is A
    assert A.T.risk is A.risk
    assert repr(A) == "<6×31 operator PerExampleGradient>"
    assert repr(A.T) == "<31×6 operator PerExampleGradient.T>"
    for operator in (A, A.T):
        with pytest.raises(NotImplementedError, match=r"cannot be moved.*build it anew"):
            operator.to(torch.float32)
    x = lsmr(A.to_scipy(), torch.ones(6).double().numpy(), atol=1e-14, btol=1e-14)[0]
    expected = torch.linalg.pinv(dense, rtol=1e-10) @ torch.ones(6).double()
    assert_close(torch.from_numpy(x), expected, 1e-8)


@pytest.mark.parametrize("name", ["CE all options", "sequence_mse", "cnn"])
def test_chunks(name: str) -> None:
    problem = PROBLEMS[name]()
    dense = problem.gradients()
    for chunk_size in (1, 2, 3, 100):
        A = rows(problem, chunk_size=chunk_size)
        assert_matrix(A, dense)
        assert_matrix(A.T, dense.T)
    assert (A @ rand(A.shape[1], 0)).shape == (A.shape[0], 0)
    assert (A.T @ rand(A.shape[0], 0)).shape == (A.shape[1], 0)
    with pytest.raises(ValueError, match="chunk_size must be an integer, at least 1, got -1"):
        rows(problem, chunk_size=-1)


def test_terms_of_an_example_are_consecutive() -> None:
    # predictions [N, C, S] of examples of 2, 5 and 3 tokens: one row per token
    problem = PROBLEMS["sequence_cross_entropy"]()
    dense, loss = rows(problem).to_dense(), problem.loss("sum")
    row = 0
    for X, y in problem.data:
        for x, targets in zip(X, y, strict=True):
            one = rows(Problem(problem.model, problem.loss, [(x[None], targets[None])]))
            R = len(targets)
            assert one.shape[0] == R
            assert_close(dense[row : row + R], one.to_dense(), scale=1.0)
            for s in range(R):

                def term(theta: Tensor, x: Tensor = x, s: int = s, y: Tensor = targets) -> Tensor:
                    params = problem.named(theta)
                    f = torch.func.functional_call(problem.model, params, (x[None],))
                    return loss(f[..., s], y[s : s + 1])

                assert_close(dense[row + s], grad(term)(problem.flat()), scale=1.0)
                # ignored tokens have rows of zeros
                assert bool(dense[row + s].any()) == (targets[s].item() != -7)
            row += R
    assert row == len(dense)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batching_does_not_matter(reduction: str) -> None:
    problem = PROBLEMS["CE all options"]()
    X, y = (torch.cat(tensors) for tensors in zip(*problem.data, strict=True))
    dense, c = problem.gradients(), problem.scale(reduction).item()
    for data in (
        [(X, y)],
        [[x, t] for x, t in zip(X.split(1), y.split(1), strict=True)],
        DataLoader(TensorDataset(X, y), batch_size=3),
    ):
        for options in ({}, NO_LOOK):
            A = rows(problem, reduction, data=data, **options)
            assert A.scale == pytest.approx(c, rel=1e-14)
            assert_matrix(A, dense)
            assert_matrix(A.T, dense.T)
            assert_matrix(
                problem.operator(EFLinearOperator, reduction, data=data, **options),
                problem.ef(reduction),
            )


def test_order_of_the_data() -> None:
    problem = PROBLEMS["CE weight"]()
    dataset = TensorDataset(*(torch.cat(part) for part in zip(*problem.data, strict=True)))
    data = DataLoader(dataset, batch_size=3, shuffle=True)
    with pytest.raises(RuntimeError, match=r"order of the data differs.*shuffle=False"):
        rows(problem, data=data)
    # the sum over the terms does not depend on it
    assert_matrix(problem.operator(EFLinearOperator, data=data), problem.ef())


def test_passes_and_model_calls(capsys: pytest.CaptureFixture[str]) -> None:
    cost = Costs(sequences(lambda *s: rand(*s, 3), classes), capsys)
    cost.model.function = lambda self, x: self.net(x).transpose(1, 2)
    problem = Problem(cost.model, cross_entropy, cost.data)  # type: ignore[arg-type]
    M, D, batches = 3 * 2 + 1 * 5 + 4 * 3, 31, [3, 1, 4]
    product, adjoint = "PerExampleGradient product", "PerExampleGradient.T product"

    A = rows(problem, progressbar=True)
    assert cost() == (2, 2 * batches, ["Determinism check (1/2)", "Determinism check (2/2)"])
    assert (A.shape, A.T.shape) == ((M, D), (D, M))
    assert cost() == (0, [], [])
    for columns in ((), (2,)):
        A @ rand(D, *columns)
        assert cost() == (1, batches, [product])
        A.T @ rand(M, *columns)
        assert cost() == (1, batches, [adjoint])
    assert A.scale == A.scale == pytest.approx(1 / M)
    assert cost() == (1, batches, ["Counting rows"])

    A = rows(problem, progressbar=True, **NO_LOOK)
    assert cost() == (0, [], [])
    A @ rand(D)
    assert cost() == (1, batches, [product])
    assert A.shape == (M, D)
    assert cost() == (0, [], [])

    A = rows(problem, progressbar=True, **NO_LOOK)
    assert A.scale == pytest.approx(1 / M)
    assert A.T.shape == (D, M)
    assert cost() == (1, batches, ["Counting rows"])


def test_products_can_be_differentiated() -> None:
    problem = PROBLEMS["CE weight"]()
    A, dense = rows(problem), problem.gradients()
    E, ef = problem.operator(EFLinearOperator), problem.ef()
    for operator, matrix in ((A, dense), (A.T, dense.T), (E, ef)):
        for columns in ((), (2,)):
            x = rand(operator.shape[1], *columns).requires_grad_()
            with record_gradients():
                y = operator @ x
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
            assert_close(gradient, 2 * matrix.T @ matrix @ x.detach())
            assert not (operator @ x).requires_grad


@pytest.mark.parametrize("cls", [PerExampleGradientLinearOperator, EFLinearOperator])
@pytest.mark.parametrize("name", sorted(GENERIC))
def test_generic_losses_are_refused(name: str, cls: Any) -> None:
    problem = PROBLEMS[name]()
    calls: list[Any] = []
    if isinstance(problem.model, nn.Module):
        problem.model.register_forward_hook(lambda *_: calls.append(1))
    loss = re.escape(loss_entry(problem.loss("mean"))[0].name)
    message = rf"^{loss} has no closed-form gradients of single loss terms.*register_loss"
    for options in ({}, NO_LOOK):
        with pytest.raises(NotImplementedError, match=message):
            problem.operator(cls, **options)
    assert not calls


# ---- influence functions -----------------------------------------------------------------------
def test_influence_of_training_examples() -> None:
    # ridge regression: the minimiser of Σ w_m (x_mᵀθ - y_m)² + λ|θ|² is known for any weights w
    X, y, damping = rand(8, 3), rand(8, 1), 0.3
    x_test, y_test = rand(1, 3), rand(1, 1)

    def minimiser(w: Tensor) -> Tensor:
        eye = torch.eye(3, dtype=torch.float64)
        return torch.linalg.solve(X.T @ (w[:, None] * X) + damping * eye, X.T @ (w[:, None] * y))

    def loss_test(w: Tensor) -> Tensor:
        return functional.mse_loss(x_test @ minimiser(w), y_test, reduction="sum")

    w = torch.ones(8, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    params = {"weight": minimiser(w).T}
    data = list(zip(X.split(SIZES), y.split(SIZES), strict=True))  # type: ignore[no-untyped-call]
    train = Problem(model, mse, data, params)
    test = Problem(model, mse, [(x_test, y_test)], params)

    A = rows(train)
    H = train.operator(HessianLinearOperator, "sum")
    identity = IdentityLinearOperator(H.in_shape, H.device, H.dtype)
    g_test = rows(test).T @ torch.ones(1, dtype=torch.float64)
    v, _ = cg(H + 2 * damping * identity, -g_test, tolerance=1e-14)
    influence = A @ v
    assert_close(influence, grad(loss_test)(w), 1e-11)
    # leaving an example out: the weight 0 instead of 1, to first order
    for m in range(8):
        t = 1e-4
        change = loss_test(w - t * torch.eye(8, dtype=torch.float64)[m]) - loss_test(w)
        assert change.item() == pytest.approx(-t * influence[m].item(), rel=1e-2, abs=1e-9)


# ---- the empirical Fisher ----------------------------------------------------------------------
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CLOSED_FORM)
def test_ef_equals_autodiff(name: str, reduction: str) -> None:
    problem = PROBLEMS[name]()
    dense = problem.ef(reduction)
    assert_matrix(problem.operator(EFLinearOperator, reduction), dense)
    E = problem.operator(EFLinearOperator, reduction, **NO_LOOK)
    assert_close(E @ (v := rand(len(dense))), dense @ v)


@pytest.mark.parametrize("name", ["sequence_mse", "CE all options"])
def test_ef_is_positive_semi_definite_and_no_fisher(name: str) -> None:
    problem = PROBLEMS[name]()
    for chunk_size in (None, 1, 2):
        E = problem.operator(EFLinearOperator, chunk_size=chunk_size).to_dense()
        assert_close(E, problem.ef())
    assert torch.linalg.eigvalsh(E).min() > -1e-14 * E.norm()
    assert torch.linalg.matrix_rank(E) <= len(problem.gradients())
    assert (E - problem.operator(GGNLinearOperator).to_dense()).norm() > 0.1 * E.norm()


def test_ef_counts_terms_and_not_examples() -> None:
    problem = PROBLEMS["sequence_mse"]()
    problem.data = problem.data[1:2]  # one example of five positions
    A = problem.gradients()
    E = problem.operator(EFLinearOperator, "sum").to_dense()
    whole = A.sum(0)
    assert A.shape[0] == 5
    assert_close(E, A.T @ A)
    assert (E - torch.outer(whole, whole)).norm() > 0.1 * E.norm()
    flat = [(X.flatten(0, 1), y.flatten(0, 1)) for X, y in problem.data]
    assert_matrix(problem.operator(EFLinearOperator, "sum", data=flat), E)


@pytest.mark.parametrize("name", ["mlp_mse", "sequence_cross_entropy", "BCE options"])
def test_ef_with_a_kept_graph(name: str) -> None:
    problem = PROBLEMS[name]()
    E = problem.operator(EFLinearOperator, keep_graph=True)
    for _ in range(2):
        assert_matrix(E, problem.ef())
        assert_close(E @ (v := rand(E.shape[1])), problem.ef() @ v)


def test_ignored_data() -> None:
    # nothing counts: the mean over nothing is NaN, as in PyTorch, but the rows are zero
    model = Apply(lambda self, x: self.net(x), net=mlp())
    problem = Problem(
        model,
        lambda r: nn.CrossEntropyLoss(reduction=r, ignore_index=-7),
        [(rand(1, 3), ignoring(1))],
    )
    A = rows(problem)
    assert not A.to_dense().any()
    assert A.shape == (1, 31)
    E = problem.operator(EFLinearOperator, "sum")
    assert not E.to_dense().any()
    assert (problem.operator(EFLinearOperator) @ rand(31)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    problem = Problem(mlp(), cross_entropy, vectors())
    problem.to(dtype)
    A = rows(problem)
    v, u = rand(31).to(dtype), rand(8).to(dtype)
    assert A.dtype == A.T.dtype == (A @ v).dtype == (A.T @ u).dtype == dtype
    assert A.scale == 0.125
    actual = (A @ v).double(), (A.T @ u).double()
    problem.to(torch.float64)
    dense, eps = problem.gradients(), torch.finfo(dtype).eps
    assert_close(actual[0], dense @ v.double(), 2 * eps, (dense.norm() * v.norm()).item())
    assert_close(actual[1], dense.T @ u.double(), 2 * eps, (dense.norm() * u.norm()).item())


def test_sums_of_many_batches_in_half_precision() -> None:
    # in bfloat16, 256 + 1 = 256
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(model.weight, 2.0)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    A = rows(Problem(model, mse, [(one, one)] * 400), check_deterministic=False)
    assert (A.T @ torch.ones(400, dtype=torch.bfloat16)).item() == 800
    assert A.scale == 1 / 400
