"""The diagonal blocks of parameters without factors, and what they must not do to the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvlinops import (
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    KFACAccumulator,
    KFACLinearOperator,
)

each_backend = pytest.mark.parametrize("backend", ["hooks", "make_fx"])
OPTIONS = {"fisher_type": "type-2", "check_deterministic": False, "unsupported": "diagonal"}


class Scaled(nn.Module):
    """A parameter that multiplies activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) * self.scale)


class Generated(nn.Module):
    """A layer whose input is the same for all examples makes a factor of their predictions.

    Args:
        otherwise: Whether its parameters are used in another way, too.
    """

    def __init__(self, otherwise: bool) -> None:
        super().__init__()
        self.net, self.maker, self.otherwise = nn.Linear(3, 2), nn.Linear(2, 4), otherwise

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x) * self.maker(torch.ones(1, 2, dtype=x.dtype)).sum()
        return y * (self.maker.weight.sum() + self.maker.bias.sum()) if self.otherwise else y


def data() -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(n, 3).double(), torch.arange(n) % 2) for n in (5, 2)]


def block(K: Any, params: dict[str, Tensor], name: str) -> Tensor:
    """Return the rows and columns of a parameter."""
    (index,) = (i for i, key in enumerate(params) if key == name)
    start = sum(p.numel() for p in list(params.values())[:index])
    part = slice(start, start + params[name].numel())
    return K.to_dense()[part, part]


@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator, KFACAccumulator])
@pytest.mark.parametrize("backend", ["hooks", "make_fx", "function"])
def test_values_of_all_parameters_are_those_given(operator: Any, backend: str):
    """They may differ from the module's. Catches: others that are the module's own."""
    torch.manual_seed(0)
    model = Scaled().double()
    params = {k: p.detach() + torch.rand_like(p) for k, p in model.named_parameters()}
    loss, batches = nn.CrossEntropyLoss(), data()
    function: Any = model
    if backend == "function":
        backend, function = "make_fx", lambda params, X: functional_call(model, params, (X,))
    options = {**OPTIONS, "backend": backend}
    if operator is KFACAccumulator:
        del options["check_deterministic"]
        accumulator = operator(function, loss, params, **options)
        for X, y in batches:
            accumulator.update(X, y)
        K = accumulator.to_operator()
    else:
        K = operator(function, loss, params, batches, **options)
    D = GGNDiagonalLinearOperator(model, loss, params, batches)
    (expected,) = (d for d, name in zip(D.tensors(), params, strict=True) if name == "scale")
    torch.testing.assert_close(block(K, params, "scale"), expected.diag())
    own = GGNDiagonalLinearOperator(model, loss, dict(model.named_parameters()), batches)
    assert not torch.allclose(own.diagonal(), D.diagonal(), rtol=1e-2)


@each_backend
@pytest.mark.parametrize("operator", [KFACLinearOperator, EKFACLinearOperator])
@pytest.mark.parametrize("otherwise", [False, True])
def test_refused_layers_leave_the_others_alone(otherwise: bool, operator: Any, backend: str):
    """Catches: an output that was made one for each example, as if that were possible.

    Also if the layer's parameters are known not to have factors before this is tried.
    """
    torch.manual_seed(0)
    model = Generated(otherwise).double()
    params, loss, batches = dict(model.named_parameters()), nn.CrossEntropyLoss(), data()
    options = {**OPTIONS, "backend": backend}
    K = operator(model, loss, params, batches, **options)
    net = {name: p for name, p in params.items() if name.startswith("net")}
    expected = operator(model, loss, net, batches, **options)
    for name in net:
        torch.testing.assert_close(block(K, params, name), block(expected, net, name))
    D = GGNDiagonalLinearOperator(model, loss, params, batches)
    for name, d in zip(params, D.tensors(), strict=True):
        if name not in net:
            torch.testing.assert_close(block(K, params, name), d.flatten().diag())
