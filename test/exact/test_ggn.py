"""Tests of the generalized Gauss-Newton matrix against dense autodiff, and where it is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_cases import (
    LOSSES,
    PROBLEMS,
    Apply,
    C,
    Problem,
    assert_close,
    assert_matrix,
    classes,
    cross_entropy,
    mse,
    rand,
    vectors,
)
from torch import Tensor, nn

from curvlinops import GGNLinearOperator, HessianLinearOperator


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_autodiff(name: str, reduction: str) -> None:
    problem = PROBLEMS[name]()
    assert_matrix(problem.operator(GGNLinearOperator, reduction), problem.ggn(reduction))


@pytest.mark.parametrize("loss", [mse, cross_entropy])
def test_equals_the_hessian_where_the_model_is_linear(loss: Any) -> None:
    layers = [nn.Linear(3, 4), nn.LeakyReLU(0.3), nn.Linear(4, 4), nn.LeakyReLU(0.3)]
    model = nn.Sequential(*layers, nn.Linear(4, C)).double()
    data = vectors(rand, C) if loss is mse else vectors(classes)

    def products(names: str) -> list[Tensor]:
        params = {n: p for n, p in model.named_parameters() if n[0] in names}
        problem = Problem(model, loss, data, params=params)
        V = rand(len(problem.flat()), 3)
        return [problem.operator(c) @ V for c in (GGNLinearOperator, HessianLinearOperator)]

    # piecewise linear in each layer, but not in all of them together
    for layer in "024":
        GV, HV = products(layer)
        assert GV.norm() > 1e-3
        assert_close(GV, HV)
    GV, HV = products("024")
    assert (GV - HV).norm() > 0.01 * GV.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_positive_semi_definite_for_convex_losses(name: str) -> None:
    G = PROBLEMS[name]().operator(GGNLinearOperator).to_dense()
    assert_close(G, G.T)
    eigenvalues = torch.linalg.eigvalsh(G)
    threshold = 1e-14 * eigenvalues.abs().max()
    # the third power of a residual curves downwards where the residual is negative
    assert bool((eigenvalues < -threshold).any()) == (name == "own function")


class Square(torch.autograd.Function):
    """A function with derivatives in reverse mode only."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def test_functions_without_forward_mode() -> None:
    calls = []

    def count(self: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        return self.tail(Square.apply(self.head(x)))

    model = Apply(count, head=nn.Linear(3, 4), tail=nn.Linear(4, C)).double()
    problem = Problem(model, cross_entropy, vectors())
    G = problem.operator(GGNLinearOperator)
    assert_matrix(G, problem.ggn())
    calls.clear()
    assert_matrix(G, G.to_dense())  # it does not try again
    assert calls == [3, 1, 4] * 2


def test_lstm_in_single_precision() -> None:
    # the library that computes it on the CPU has no forward mode
    model = nn.Sequential(
        Apply(lambda self, x: self.lstm(x.unsqueeze(1))[0][:, 0], lstm=nn.LSTM(3, 2)),
        nn.Linear(2, C),
    )
    data = [(X.float(), y) for X, y in vectors()]
    G = Problem(model, cross_entropy, data).operator(GGNLinearOperator).to_dense()
    data = [(X.double(), y) for X, y in data]
    assert_close(G, Problem(model.double(), cross_entropy, data).ggn(), 1e-6)
