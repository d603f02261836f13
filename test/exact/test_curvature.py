"""Tests of what the operators of an empirical risk have in common."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from exact_cases import (
    ALL,
    JACOBIANS,
    OPERATORS,
    PROBLEMS,
    Apply,
    Costs,
    LargestProduct,
    Passes,
    Problem,
    assert_close,
    assert_matrix,
    cross_entropy,
    for_each,
    mse,
    rand,
    vectors,
)
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import (
    CurvatureLinearOperator,
    EFLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    SubmatrixLinearOperator,
)
from curvlinops.risk.elementwise import MSE
from curvlinops.risk.loss import LOSSES
from curvlinops.testing import check_operator

each_operator = for_each(OPERATORS)


# ---- formats and algebra ---------------------------------------------------------------------
@for_each(ALL)
def test_is_an_operator(cls: Any) -> None:
    problem = PROBLEMS["function_model"]()
    problem.data = problem.data[:1]
    check_operator(problem.operator(cls), problem.dense(cls))
    assert issubclass(cls, CurvatureLinearOperator)
    assert (cls in OPERATORS) == cls.SELF_ADJOINT


@each_operator
def test_formats(cls: Any) -> None:
    problem = PROBLEMS["function_model"]()
    A, dense = problem.operator(cls), problem.dense(cls)
    assert A.shape == dense.shape
    assert A.in_shape == A.out_shape == problem.shapes
    names, shapes = list(problem.params), problem.shapes
    x, X = rand(len(dense)), rand(len(dense), 3)

    def split(flat: Tensor, *columns: int) -> list[Tensor]:
        sizes = [shape.numel() for shape in shapes]
        return [p.reshape(s + columns) for p, s in zip(flat.split(sizes), shapes, strict=True)]

    for result, expected in (
        (A @ x, dense @ x),
        (x @ A, dense @ x),
        (A @ X, dense @ X),
        (X.T @ A, X.T @ dense),
    ):
        assert_close(result, expected)
    for columns, given in (((), x), ((3,), X)):
        tensors, expected = split(given, *columns), split(dense @ given, *columns)
        as_dict = dict(zip(names, tensors, strict=True))
        for container in (tensors, tuple(tensors), as_dict, dict(reversed(as_dict.items()))):
            result = A @ container
            assert type(result) is type(container)
            if isinstance(result, dict):
                assert list(result) == names  # in the order of params, whatever that of x
                result = list(result.values())
            for a, b in zip(result, expected, strict=True):
                assert_close(a, b)
    leading = [t.movedim(-1, 0) for t in split(X, 3)]
    for a, b in zip(leading @ A, split(dense @ X, 3), strict=True):
        assert_close(a, b.movedim(-1, 0))
    assert (A @ X[:, :0]).shape == (len(x), 0)
    assert [t.shape for t in A @ split(X[:, :0], 0)] == [(*shape, 0) for shape in shapes]


@each_operator
def test_algebra(cls: Any) -> None:
    problem = PROBLEMS["mlp_mse"]()
    A, dense = problem.operator(cls), problem.dense(cls)
    eye = torch.eye(len(dense), dtype=torch.float64)
    identity = IdentityLinearOperator(A.in_shape, A.device, A.dtype)
    assert_matrix(A + 0.3 * identity, dense + 0.3 * eye)
    rows, columns = [5, 0, 17], [2, -1, 5, 0]
    assert_matrix(SubmatrixLinearOperator(A, rows, columns), dense[rows][:, columns])
    assert_matrix(SubmatrixLinearOperator(A, rows, columns).T, dense[rows][:, columns].T)
    x = dict(zip(problem.params, (rand(*s) for s in problem.shapes), strict=True))
    flat = torch.cat([t.flatten() for t in x.values()])
    result = (2 * A + A).T @ (A - identity) @ x
    assert list(result) == list(problem.params)
    expected = 3 * dense @ (dense - eye) @ flat
    assert_close(torch.cat([t.flatten() for t in result.values()]), expected)
    largest = eigsh(A.to_scipy(), k=2, which="LA", return_eigenvectors=False)
    assert_close(torch.from_numpy(largest).sort()[0], torch.linalg.eigvalsh(dense)[-2:], 1e-10)
    assert "0.3" in repr(A + 0.3 * identity)


@for_each(ALL)
def test_deepcopy_is_independent(cls: Any) -> None:
    problem = PROBLEMS["subset"]()
    A = problem.operator(cls)
    copied, before = copy.deepcopy(A), problem.dense(cls)
    with torch.no_grad():
        for p in problem.model.parameters():
            p.mul_(2)
        for X, _ in problem.data:
            X.mul_(-3)
    assert_matrix(copied, before)
    assert_matrix(A, problem.dense(cls))  # and the operator follows the user's tensors


@each_operator
def test_padding_is_constant(cls: Any) -> None:
    A = PROBLEMS["embedding"]().operator(cls)
    V = [rand(*shape, 2) for shape in A.in_shape]
    assert not (A @ V)[0][1].any()
    V[0][0] = V[0][2:] = 0
    assert not any(t.any() for t in A @ [V[0], *map(torch.zeros_like, V[1:])])


# ---- precision ---------------------------------------------------------------------------------
@for_each(ALL, "mlp_mse", "cnn", "batch_norm", "Poisson function")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(cls: Any, name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]()
    problem.to(dtype)
    A = copy.deepcopy(problem).operator(cls)
    assert A.dtype == dtype
    assert (A @ rand(A.shape[1]).to(dtype)).dtype == dtype
    problem.to(torch.float64)
    # the same rounded numbers; the bound is relative to the norms of the matrix and the vectors
    assert_matrix(A, problem.dense(cls), torch.finfo(dtype).eps)


@each_operator
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sums_of_many_batches_in_half_precision(cls: Any, reduction: str) -> None:
    # in bfloat16, 256 + 1 = 256
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(model.weight, 2.0)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    A = Problem(model, mse, [(one, one)] * 400).operator(cls, reduction, check_deterministic=False)
    term = 4.0 if cls is EFLinearOperator else 2.0
    assert (A @ one[0]).item() == {"mean": term, "sum": 400 * term}[reduction]


# ---- data ------------------------------------------------------------------------------------
@for_each(OPERATORS, "CE all options", "Huber")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batching_does_not_matter(cls: Any, name: str, reduction: str) -> None:
    problem = PROBLEMS[name]()
    dense = problem.dense(cls, reduction)
    X, y = (torch.cat(tensors) for tensors in zip(*problem.data, strict=True))
    dataset = TensorDataset(X, y)
    for data in (
        [(X, y)],
        [[x, t] for x, t in zip(X.split(1), y.split(1), strict=True)],
        DataLoader(dataset, batch_size=3),
        DataLoader(dataset, batch_size=5, shuffle=True),
    ):
        for options in ({}, {"check_deterministic": False, "num_data": len(X)}):
            assert_matrix(problem.operator(cls, reduction, data=data, **options), dense)


@each_operator
@pytest.mark.parametrize(
    ("options", "bars", "evaluated"),
    [
        ({}, ["Determinism check (1/2)", "Determinism check (2/2)"], 2),
        ({"num_data": 8}, ["Determinism check (1/2)", "Determinism check (2/2)"], 2),
        ({"check_deterministic": False}, ["Counting data"], 0),
        ({"check_deterministic": False, "num_data": 8}, [], 0),
    ],
)
def test_passes_and_model_calls(
    cls: Any,
    options: dict[str, Any],
    bars: list[str],
    evaluated: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cost = Costs(vectors(), capsys)
    problem = Problem(cost.model, cross_entropy, cost.data)  # type: ignore[arg-type]
    A = problem.operator(cls, progressbar=True, **options)
    batches = [3, 1, 4]
    assert cost() == (len(bars), batches * evaluated, bars)

    product = [f"{cls.__name__.removesuffix('LinearOperator')} product"]
    for columns in ((), (2,), (), (5,)):  # the first one does not cost more
        A @ rand(A.shape[1], *columns)
        assert cost() == (1, batches, product)
    A @ rand(A.shape[1], 0)
    assert cost() == (0, [], [])
    for columns in ((), (2,)):
        problem.operator(cls, **options) @ rand(A.shape[1], *columns)
        assert cost() == (len(bars) + 1, batches * (evaluated + 1), [])
    kept = problem.operator(cls, keep_graph=True, **options)
    for calls in (batches, []):
        cost()
        kept @ rand(A.shape[1])
        assert cost() == (1, calls, [])


@for_each(ALL)
def test_chunk_size_bounds_what_is_multiplied_at_once(cls: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 30), nn.Tanh(), nn.Linear(30, 1)).double()
    problem = Problem(model, mse, [(rand(3, 2), rand(3, 1)), (rand(1, 2), rand(1, 1))])
    dense = problem.dense(cls)
    V = rand(dense.shape[1], 40)
    entries = {}
    for chunk_size in (None, 1, 10, 39):
        A = problem.operator(cls, chunk_size=chunk_size)
        with LargestProduct() as largest:
            AV = A @ V
        assert_close(AV, dense @ V)
        entries[chunk_size] = largest.entries
    # the largest in between is [K, 3, 30] or [K, 30, 2]; with some ways, the first is on its own
    assert entries[1] <= 2 * 3 * 30
    assert 10 * 30 <= entries[10] <= 10 * 3 * 30
    assert entries[10] < entries[39] <= entries[None]
    assert entries[39] <= 39 * 3 * 30


# ---- the caller's surroundings -------------------------------------------------------------------
@for_each(ALL, "CE all options", "tied_embedding", "batch_norm", "Huber")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(cls: Any, name: str, mode: Callable[[], Any]) -> None:
    A = PROBLEMS[name]().operator(cls)
    v = rand(A.shape[1])
    expected = A @ v
    with mode():
        assert_close(A @ v, expected)
        assert_close(A @ v.clone(), expected)
        torch.manual_seed(0)  # as at the start of the test
        problem = PROBLEMS[name]()  # model, data and options come into being here
        inside = problem.operator(cls)
        assert_close(inside @ v.clone(), expected)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert_close(inside @ v, expected)


@each_operator
def test_records_no_graph(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    A = PROBLEMS["mlp_mse"]().operator(cls)
    predictions, loss = [], A.risk.loss
    normalizer = loss.normalizer
    monkeypatch.setattr(
        loss, "normalizer", lambda F, y, n: predictions.append(F) or normalizer(F, y, n)
    )
    result = A @ rand(A.shape[1]).requires_grad_()
    assert not result.requires_grad
    assert result.grad_fn is None
    # nor a second one besides torch.func's, which would double the memory
    assert len(predictions) == 3
    assert not any(F.requires_grad for F in predictions)


class Fuse:
    """Raises an error at one of the next calls, if it is lit."""

    def __init__(self) -> None:
        self.calls_left = -1
        self.error: type[BaseException] = RuntimeError

    def burn(self, result: Any = None) -> Any:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise self.error("The fuse has blown.")
        return result


class Counter(nn.Module):
    """Changes a buffer at each call, in place and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.last + 1
        return x


def _state(model: nn.Module) -> Any:
    """Everything about a module, and the global states, as plain values."""
    modules = {
        name: (
            m.training,
            sorted(vars(m)),
            {key: list(value) for key, value in vars(m).items() if "hooks" in key},
        )
        for name, m in model.named_modules()
    }
    tensors = {
        name: (id(t), t._version, t.tolist(), t.requires_grad, id(t.grad), t.is_leaf)
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    gradients = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    generators = (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1:3],
        random.getstate(),
    )
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return modules, tensors, gradients, str(generators), modes


@pytest.mark.parametrize(
    ("cls", "place"),
    [
        (cls, place)
        for cls in ALL
        for place in ("nowhere", "model", "loss", "data")
        if place != "loss" or cls not in JACOBIANS
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_leaves_everything_as_found(
    cls: Any, training: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuses = {name: Fuse() for name in ("nowhere", "model", "loss", "data")}
    layers = [
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        Counter(),
        nn.Dropout(0.5),
        Apply(lambda self, x: fuses["model"].burn(x)),
        nn.Linear(4, 2),
    ]
    model = nn.Sequential(*layers).double().train(training)
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones_like(model[5].bias)
    model[1].register_forward_hook(lambda module, args, output: 2 * output)

    def loss(f: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return fuses["loss"].burn(nn.functional.mse_loss(f, y, reduction=reduction))

    class Entry(MSE):
        def terms(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return fuses["loss"].burn(super().terms(f, y))

    if cls not in (HessianLinearOperator, GGNLinearOperator):  # they need a closed form
        monkeypatch.setitem(LOSSES, loss, Entry)

    class Data(Passes):
        def __iter__(self) -> Iterator[Any]:
            np.random.rand(), random.random(), torch.rand(1)
            return map(fuses["data"].burn, super().__iter__())

    data = Data([(rand(n, 3), rand(n, 2)) for n in (3, 2, 4)])
    params = {name: p for name, p in model.named_parameters() if name != "0.bias"}
    problem = Problem(model, lambda reduction: loss, data, params)  # type: ignore[arg-type]

    def build() -> Any:
        return problem.operator(cls, check_deterministic=not training)

    A = build()
    v = rand(A.shape[1])
    before = _state(model)
    build()
    assert _state(model) == before
    expected = A @ v
    assert _state(model) == before
    for error in (RuntimeError, KeyboardInterrupt):
        for action in (build, lambda: A @ v):
            fuse = fuses[place]
            # in a batch that is not the first, after the model was inspected
            fuse.calls_left, fuse.error = 3, error
            raises = pytest.raises(error, match="fuse") if place != "nowhere" else nullcontext()
            if action is build and training and place in ("model", "loss"):
                raises = nullcontext()  # only counts data
            with raises:
                action()
            fuse.calls_left = -1
            assert _state(model) == before
    if not training:
        assert_close(A @ v, expected)
        assert torch.rand(1, requires_grad=True).exp().requires_grad
