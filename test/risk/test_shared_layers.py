"""Models that have the same layer in several places are evaluated rightly, and left as they are.

``torch.func.functional_call`` leaves plain tensors behind in place of their parameters.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvlinops import (
    EFLinearOperator,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    KFACAccumulator,
    KFACLinearOperator,
    KFOCLinearOperator,
)
from curvlinops.risk.model import FunctionalModel, at_places, places_of
from curvlinops.testing import check_curvature


class Shared(nn.Module):
    """A linear layer and a normalisation that are there twice, and another with a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        first, norm, tied = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        tied.weight = first.weight
        norm.running_mean.normal_()
        self.layers = nn.ModuleList([first, norm, first, norm])
        self.again, self.tied, self.last = norm, tied, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(torch.tanh(self.tied(self.again(x))))


def model() -> Shared:
    torch.manual_seed(0)
    return Shared().double().eval()


def plain(buffers: dict[str, Tensor]) -> Any:
    """Return the model as a function of its parameters."""

    def function(p: dict[str, Tensor], x: Tensor) -> Tensor:
        def norm(x: Tensor) -> Tensor:
            mean, var = buffers["layers.1.running_mean"], buffers["layers.1.running_var"]
            return F.batch_norm(x, mean, var, p["layers.1.weight"], p["layers.1.bias"])

        for _ in range(2):
            x = torch.tanh(F.linear(x, p["layers.0.weight"], p["layers.0.bias"]))
            x = torch.tanh(norm(x))
        x = torch.tanh(F.linear(norm(x), p["layers.0.weight"], p["tied.bias"]))
        return F.linear(x, p["last.weight"], p["last.bias"])

    return function


X, Y = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)


def everything(net: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, under all names."""
    parameters = dict(net.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(net.named_buffers(remove_duplicate=False))}


def assert_untouched(net: nn.Module, before: dict[str, Tensor]) -> None:
    after = everything(net)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert sum(isinstance(p, nn.Parameter) for p in after.values()) == 14


@pytest.mark.parametrize(
    "operator", [GGNLinearOperator, HessianLinearOperator, EFLinearOperator, JacobianLinearOperator]
)
def test_exact_matrices(operator: Any):
    net = model()
    before, params = everything(net), dict(net.named_parameters())
    buffers = dict(net.named_buffers())
    data = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    loss = () if operator is JacobianLinearOperator else (nn.MSELoss(),)
    found = operator(net, *loss, params, data).to_dense()
    assert_untouched(net, before)
    torch.testing.assert_close(found, operator(plain(buffers), *loss, params, data).to_dense())


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator, KFOCLinearOperator])
def test_kronecker_factors(operator: Any, backend: str):
    net = model()
    before, params = everything(net), dict(net.named_parameters())
    options = {"fisher_type": "type-2", "separate_weight_and_bias": True}
    found = operator(net, nn.MSELoss(), params, [(X, Y)], backend=backend, **options)
    assert_untouched(net, before)
    function = plain(dict(net.named_buffers()))
    expected = operator(function, nn.MSELoss(), params, [(X, Y)], backend="make_fx", **options)
    torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-5, atol=1e-8)


def test_other_uses():
    """The diagonal, an accumulator, the conformance kit."""
    net = model()
    before, params = everything(net), dict(net.named_parameters())
    GGNDiagonalLinearOperator(net, nn.MSELoss(), params, [(X, Y)])
    accumulator = KFACAccumulator(net, nn.MSELoss(), params, fisher_type="type-2")
    accumulator.update(X, Y)
    check_curvature(net, nn.MSELoss(), params, [(X, Y)])
    assert_untouched(net, before)


def test_compiled_products():
    """Which are traced, with the places that were found before."""
    net = model()
    before, params = everything(net), dict(net.named_parameters())
    G = GGNLinearOperator(net, nn.MSELoss(), params, [(X, Y)])
    v = torch.rand(G.shape[1], dtype=torch.float64)
    expected = G @ v
    torch.compiler.reset()
    compiled = torch.compile(G.__matmul__, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(v), expected)
    assert_untouched(net, before)


def test_weights_that_are_tied_later():
    """Values for one of them are those of both."""
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).double()
    functional = FunctionalModel(net, {"0.weight": net[0].weight})
    net[1].weight = net[0].weight
    W = torch.rand(3, 3, dtype=torch.float64)
    torch.testing.assert_close(functional.predict({"0.weight": W}, X), X @ W.T @ W.T)


def test_places():
    net = model()
    places = places_of(net)
    assert places.keys() == everything(net).keys()
    weights = [name for name in places if name.endswith("0.weight")]
    assert weights == ["layers.0.weight"]
    assert places["layers.2.weight"] == places["tied.weight"] == ["layers.0.weight", "tied.weight"]
    assert places["again.running_mean"] == ["layers.1.running_mean"]
    found = at_places({"layers.2.weight": X, "no such name": Y}, places)
    assert list(found) == ["layers.0.weight", "tied.weight"]
