"""Errors of the operators of a model: matrices that are exact, and their derivatives."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from abstract_methods import add_abstract
from error_cases import Cases
from torch import Tensor, nn

from curvlinops import (
    GGNDiagonalLinearOperator,
    HessianLinearOperator,
    TransposedJacobianLinearOperator,
    record_gradients,
)
from curvlinops.computers.flat_function import flat_function
from curvlinops.contractions import _Form
from curvlinops.curvature import RiskLinearOperator
from curvlinops.gramian import GramianLinearOperator
from curvlinops.linearization import _UnsupportedError
from curvlinops.rows import RowsLinearOperator

cases = Cases()

X, Y = torch.rand(4, 3), torch.rand(4, 2)
MSE = nn.MSELoss()


def build(cls: Any, model: nn.Module, loss: nn.Module = MSE, x: Tensor = X, **options: Any) -> Any:
    """Build an operator of a model."""
    return cls(model, loss, dict(model.named_parameters()), [(x, Y)], **options)


add_abstract(cases, RiskLinearOperator, "_multiply_batch", "_keep_batch")
add_abstract(cases, GramianLinearOperator, "_term_curvature")
add_abstract(cases, RowsLinearOperator, "_known_rows", "_rows_of")
add_abstract(cases, _Form, "contract", "spread", "sum")
cases(
    NotImplementedError,
    "<8×8 operator Hessian> cannot be moved",
    "build it anew",
    lambda: build(HessianLinearOperator, nn.Linear(3, 2)).to(torch.float64),
)
cases(
    NotImplementedError,
    "HuberLoss has no closed form",
    "register_loss",
    lambda: build(GGNDiagonalLinearOperator, nn.Linear(3, 2), nn.HuberLoss()),
)
cases(
    RuntimeError,
    "'weight' has non-finite values",
    "Check the data",
    lambda: build(
        GGNDiagonalLinearOperator, nn.Linear(3, 2), x=X * torch.nan, check_deterministic=False
    ),
)


class Repeated(nn.Linear):
    """A model with a number of predictions that can change."""

    times = 2

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).repeat(self.times, 1)


def other_rows(times: int) -> None:
    """Multiply by a Jacobian whose model has another number of predictions than before."""
    model = Repeated(3, 2)
    J = TransposedJacobianLinearOperator(model, dict(model.named_parameters()), [(X, Y)])
    v = torch.ones(J.shape[1])
    model.times = times
    J @ v


cases(ValueError, "number of rows has changed", "Build the operator anew", lambda: other_rows(3))
cases(ValueError, "number of rows has changed", "Build the operator anew", lambda: other_rows(1))


# ---- derivatives ---------------------------------------------------------------------------------
class Once(torch.autograd.Function):
    """A function with first derivatives only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class UsesOnce(nn.Linear):
    """A layer followed by this function."""

    def forward(self, input: Tensor) -> Tensor:
        return Once.apply(super().forward(input))


class Forces(nn.LayerNorm):
    """The derivative of an energy that is computed with layer normalisation."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.func.grad(lambda x: super(Forces, self).forward(x).pow(3).sum())(input)


class Bag(nn.EmbeddingBag):
    """A bag of the signs of the input."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward((input > 0.5).long())


def multiply(cls: Any, model: nn.Module, **options: Any) -> None:
    """Multiply by an operator of a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nothing is kept
        A = build(cls, model, **options)
        A @ torch.ones(A.shape[1])


cases(
    _UnsupportedError,
    "The model uses Once",
    "without the decorator",
    lambda: multiply(HessianLinearOperator, UsesOnce(3, 2)),
)
cases(
    _UnsupportedError,
    "The model differentiates layer_norm",
    "Write it of simpler operations",
    lambda: multiply(HessianLinearOperator, nn.Sequential(nn.Linear(3, 2), Forces(2))),
)
cases(
    _UnsupportedError,
    "operations that PyTorch cannot differentiate",
    r"Replace nn\.EmbeddingBag by nn\.Embedding",
    lambda: multiply(HessianLinearOperator, nn.Sequential(Bag(2, 2), nn.Tanh())),
)


@cases(
    NotImplementedError, "through sparse gradients", r"use nn\.Embedding\(\.\.\., sparse=False\)"
)
def sparse() -> None:
    with record_gradients():
        multiply(
            HessianLinearOperator, nn.Embedding(2, 2, sparse=True), x=torch.tensor([0, 1, 0, 1])
        )


# ---- functions that are traced -------------------------------------------------------------------
cases(
    NotImplementedError,
    "x holds objects that cannot be traced",
    "use tensors only",
    lambda: flat_function(lambda x: x, ["x"], [object()]),
)
cases(
    NotImplementedError,
    "depend on the entries of tensors",
    "Use an operator",
    lambda: flat_function(lambda x: x[x > 0.5], ["x"], [X]),
)
cases(
    ValueError,
    r"but has \[2\]",
    r"x must have the structure, shapes, .* made for, \[4, 3\]",
    lambda: flat_function(lambda x: 2 * x, ["x"], [X])(torch.ones(2)),
)
