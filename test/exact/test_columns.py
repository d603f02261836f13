"""Several columns: how many at once, and gradients of products with respect to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_cases import (
    PROBLEMS,
    SIZES,
    Apply,
    C,
    Problem,
    assert_close,
    classes,
    cross_entropy,
    mlp,
    rand,
    vectors,
)
from exact_kinds import KINDS, build, dense
from torch import Tensor, nn

from curvlinops import JacobianLinearOperator, PerExampleGradientLinearOperator, record_gradients

each_kind = pytest.mark.parametrize("kind", KINDS)
each_mode = pytest.mark.parametrize("keep_graph", [False, True], ids=["plain", "kept"])


class NoVmap(torch.autograd.Function):
    """A cube without a rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Times.apply(3 * ctx.saved_tensors[0] ** 2, grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return Times.apply(3 * ctx.saved_tensors[0] ** 2, tangent)


class Times(torch.autograd.Function):
    """A product without a rule for vmap."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a * b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return grad * b, Times.apply(a, grad)

    @staticmethod
    def jvp(ctx: Any, da: Tensor, db: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        return da * b + a * db


def without_vmap(convolution: bool = False) -> Problem:
    """A network with such functions, whose reference has PyTorch's own."""
    head: nn.Module = nn.Linear(3, 4)
    if convolution:
        head = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Flatten())
    layers = {"head": head, "tail": nn.Linear(4, C)}
    model = Apply(lambda self, x: self.tail(NoVmap.apply(self.head(x))), **layers).double()
    other = Apply(lambda self, x: self.tail(self.head(x) ** 3), **layers)
    return Problem(
        model,
        cross_entropy,
        vectors(),
        predict=lambda p, X: torch.func.functional_call(other, p, (X,)),
    )


def convolutions() -> Problem:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, C)).double()
    return Problem(model, cross_entropy, [(rand(n, 2, 3), classes(n)) for n in SIZES])


MODELS = {
    "MLP": lambda: Problem(mlp(), cross_entropy, vectors()),
    "CNN": convolutions,
    "embedding": PROBLEMS["embedding"],  # without forward mode
    "sparse": PROBLEMS["sparse_embedding"],
    "no vmap": without_vmap,
    "no vmap CNN": lambda: without_vmap(convolution=True),
}


def reference(kind: str, problem: Problem) -> Tensor:
    """The dense matrix; for Monte-Carlo, from products with one column."""
    if kind != "MC":
        return dense(kind, problem)
    A = build(kind, problem)
    return torch.stack([A @ e for e in torch.eye(A.shape[1], dtype=A.dtype)], dim=1)


@each_kind
@each_mode
@pytest.mark.parametrize("name", MODELS)
def test_chunks_do_not_matter(kind: str, keep_graph: bool, name: str) -> None:
    """One at a time, two, all, more than there are, and as many as the operator chooses."""
    problem = MODELS[name]()
    expected = reference(kind, problem)
    V = rand(len(expected), 5)
    for chunk_size in (1, 2, 7, None):
        A = build(kind, problem, chunk_size=chunk_size, keep_graph=keep_graph)
        for X in (V, V[:, 0]):
            assert_close(A @ X, expected @ X)


@pytest.mark.parametrize("cls", [JacobianLinearOperator, PerExampleGradientLinearOperator])
@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_rows(cls: Any, name: str) -> None:
    problem = MODELS[name]()
    loss = () if cls is JacobianLinearOperator else (problem.loss("mean"),)

    def rows(theta: Tensor) -> Tensor:
        predictions = torch.cat(problem.predictions(theta))
        if cls is JacobianLinearOperator:
            return predictions.flatten()
        return problem.loss("none")(predictions, torch.cat([y for _, y in problem.data]))

    expected = torch.func.jacrev(rows)(problem.flat())
    for chunk_size in (1, 2, 7, None):
        A = cls(problem.model, *loss, problem.params, problem.data, chunk_size=chunk_size)
        for columns in ((), (1,), (5,)):
            V, U = rand(A.shape[1], *columns), rand(A.shape[0], *columns)
            assert_close((A @ V).reshape(-1, *columns), expected @ V)
            assert_close(A.T @ U, expected.T @ U)


@each_mode
@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
@pytest.mark.parametrize("name", ["MLP", "CNN"])
def test_at_most_so_many_at_once(
    kind: str, name: str, keep_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``chunk_size`` bounds them, and without it the memory that they would need."""
    problem = MODELS[name]()
    sizes: list[int] = []
    vmap = torch.vmap

    def watched(function: Any, in_dims: Any = 0, **options: Any) -> Any:
        def call(*args: Any) -> Any:
            leaf = torch.utils._pytree.tree_leaves(args)[0]
            sizes.append(leaf.shape[in_dims])
            return vmap(function, in_dims, **options)(*args)

        return call

    monkeypatch.setattr("curvlinops.linearization.vmap", watched)
    A = build(kind, problem, keep_graph=keep_graph)
    entries = max(A.risk.likely_traits.entries, sum(p.numel() for p in problem.params.values()))
    limits = {entries: 1, 2 * entries: 2, 7 * entries: 7, 9 * entries: 7}
    for number, limit in limits.items():
        of_devices = dict.fromkeys(("cpu", "other"), number)
        monkeypatch.setattr("curvlinops.linearization._ENTRIES", of_devices)
        sizes.clear()
        A @ rand(A.shape[1], 7)
        # the first column may be done before the others
        assert max(sizes, default=1) in (limit, min(limit, 6))
        A = build(kind, problem, keep_graph=keep_graph)
        sizes.clear()
        B = build(kind, problem, chunk_size=3, keep_graph=keep_graph)
        B @ rand(A.shape[1], 7)
        assert max(sizes) == 3


@pytest.mark.parametrize("cls", [*(cls for cls, _ in KINDS.values()), JacobianLinearOperator])
@pytest.mark.parametrize("chunk_size", [0, -2, 2.0, "2"])
def test_wrong_chunk_size(cls: Any, chunk_size: Any) -> None:
    """Refused before the model is evaluated."""
    calls: list[int] = []
    problem = Problem(
        Apply(lambda self, x: calls.append(1) or self.net(x), net=mlp()), cross_entropy, vectors()
    )
    loss = () if cls is JacobianLinearOperator else (problem.loss("mean"),)
    message = f"chunk_size must be an integer, at least 1, got {chunk_size!r}"
    with pytest.raises(ValueError, match=message):
        cls(problem.model, *loss, problem.params, problem.data, chunk_size=chunk_size)
    assert not calls


# ---- gradients with respect to the columns -------------------------------------------------------
@each_kind
@pytest.mark.parametrize("columns", [(), (3,)])
def test_sparse_gradients_are_not_differentiated(kind: str, columns: tuple[int, ...]) -> None:
    A = build(kind, MODELS["sparse"]())
    V = rand(A.shape[1], *columns).requires_grad_()
    with record_gradients(), pytest.raises(NotImplementedError, match="sparse=False"):
        A @ V
    assert (A @ V).shape == V.shape


@each_kind
@each_mode
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"sparse"}))
def test_gradients_of_products(kind: str, keep_graph: bool, name: str) -> None:
    """The gradient of ⟨W, A V⟩ with respect to V is A W, also after products without a graph."""
    problem = MODELS[name]()
    A, expected = build(kind, problem, keep_graph=keep_graph), dense(kind, problem)
    for columns in ((), (3,), (1,), ()):
        V, W = rand(A.shape[1], *columns).requires_grad_(), rand(A.shape[1], *columns)
        with record_gradients():
            result = A @ V
        assert_close(result.detach(), expected @ V.detach())
        (gradient,) = torch.autograd.grad((W * result).sum(), V)
        assert_close(gradient, expected @ W)
        assert not (A @ V).requires_grad


@pytest.mark.parametrize("columns", [(), (3,)])
@pytest.mark.parametrize("cls", [JacobianLinearOperator, PerExampleGradientLinearOperator])
def test_gradients_of_products_with_rows(cls: Any, columns: tuple[int, ...]) -> None:
    problem = MODELS["MLP"]()
    loss = () if cls is JacobianLinearOperator else (problem.loss("mean"),)
    A = cls(problem.model, *loss, problem.params, problem.data)
    V, U = rand(A.shape[1], *columns), rand(A.shape[0], *columns)
    for B, X, Y in ((A, V, U), (A.T, U, V)):
        expected = B.T @ Y
        X.requires_grad_()
        with record_gradients():
            result = B @ X
        (gradient,) = torch.autograd.grad((Y * result.reshape(Y.shape)).sum(), X)
        assert_close(gradient.reshape(expected.shape), expected)
        assert not (B @ X).requires_grad
        X.requires_grad_(False)


@each_kind
def test_parameters_get_no_gradients(kind: str) -> None:
    """The matrix is a constant for autograd: only the vector has a gradient."""
    problem = MODELS["MLP"]()
    A = build(kind, problem)
    v = rand(A.shape[1]).requires_grad_()
    with record_gradients():
        (A @ v).sum().backward()
    assert v.grad is not None
    assert all(p.grad is None for p in problem.params.values())
