"""Models that differentiate in their forward pass: Hessians need third derivatives of functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvlinops import GGNLinearOperator, HessianLinearOperator


class Forces(nn.Module):
    """The derivatives of an energy ``[n]`` with respect to inputs ``[n, 3]``."""

    def __init__(self, norm: nn.Module, transform: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), norm, nn.Linear(4, 1)
        self.transform = transform

    def energy(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x).unsqueeze(-1)).squeeze(-1))).sum()

    def forward(self, x: Tensor) -> Tensor:
        if self.transform:
            return torch.func.grad(self.energy)(x)
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(self.energy(x), x, create_graph=True)[0]


NORMS: dict[str, Any] = {
    "layer norm": lambda: nn.LayerNorm([4, 1]),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "instance norm": lambda: nn.GroupNorm(1, 4),
    "rms norm": lambda: nn.RMSNorm([4, 1]),
}
each_way = pytest.mark.parametrize("transform", [False, True])


def problem(norm: nn.Module, transform: bool) -> Any:
    torch.manual_seed(0)
    model = Forces(norm, transform).double()
    data = [(torch.rand(n, 3).double(), torch.rand(n, 3).double()) for n in (4, 3)]
    return model, nn.MSELoss(reduction="sum"), dict(model.named_parameters()), data


def differences(model: nn.Module, loss: Any, params: dict[str, Tensor], data: Any) -> Tensor:
    """Return the Hessian by differences of gradients."""
    sizes = [p.numel() for p in params.values()]
    at = torch.cat([p.detach().flatten() for p in params.values()])

    def gradient(values: Tensor) -> Tensor:
        parts = zip(params.items(), values.split(sizes), strict=True)
        point = {k: v.view_as(p).clone().requires_grad_() for (k, p), v in parts}
        total = sum(loss(functional_call(model, point, (X,)), y) for X, y in data)
        leaves = list(point.values())
        found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    step = 1e-5 * torch.eye(len(at), dtype=at.dtype)
    return torch.stack([(gradient(at + e) - gradient(at - e)) / 2e-5 for e in step], dim=1)


@each_way
@pytest.mark.parametrize("name", ["batch norm", "instance norm", "rms norm"])
def test_right_derivatives(name: str, transform: bool):
    """Batch normalisation in evaluation mode, and two that PyTorch differentiates in steps."""
    arguments = problem(NORMS[name]().eval(), transform)
    H = HessianLinearOperator(*arguments)
    torch.testing.assert_close(H.to_dense(), differences(*arguments), rtol=1e-5, atol=1e-6)


@each_way
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.filterwarnings("ignore:keep_graph=True has no effect:UserWarning")
def test_layer_norm_is_refused(keep_graph: bool, check: bool, transform: bool):
    """Catches: a matrix that is not even symmetric, without an error."""
    arguments = problem(NORMS["layer norm"](), transform)
    H = HessianLinearOperator(*arguments, keep_graph=keep_graph, check_deterministic=check)
    message = "differentiates layer_norm, whose third derivatives, .* PyTorch computes wrongly"
    for v in (torch.rand(H.shape[1]).double(), torch.rand(H.shape[1], 2).double()):
        with pytest.raises(NotImplementedError, match=message):
            H @ v


def test_statistics_of_the_batch_are_refused():
    model, *arguments = problem(NORMS["batch norm"](), False)
    model.train()
    H = HessianLinearOperator(model, *arguments, check_deterministic=False)
    with pytest.raises(NotImplementedError, match="batch_norm or instance_norm in training mode"):
        H @ torch.rand(H.shape[1]).double()


@each_way
def test_ggn_needs_second_derivatives_only(transform: bool):
    model, loss, params, data = problem(NORMS["layer norm"](), transform)
    G = GGNLinearOperator(model, loss, params, data)

    def residuals(point: dict[str, Tensor]) -> Tensor:
        return torch.cat([functional_call(model, point, (X,)) for X, _ in data]).flatten()

    point = {k: p.detach() for k, p in params.items()}
    J = torch.func.jacrev(residuals)(point) if transform else None
    if J is None:  # torch.func cannot trace torch.autograd.grad
        other = problem(NORMS["layer norm"](), True)
        assert torch.equal(other[2]["first.weight"], params["first.weight"])
        model = other[0]
        J = torch.func.jacrev(residuals)(point)
    dense = torch.cat([j.flatten(1) for j in J.values()], dim=1)
    torch.testing.assert_close(G.to_dense(), 2 * dense.T @ dense)


def test_plain_layer_norm_is_not_refused():
    """A model that does not differentiate itself needs its second derivatives, which are right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.rand(3, 3).double(), torch.rand(3, 2).double())]
    arguments = (model, nn.MSELoss(reduction="sum"), dict(model.named_parameters()), data)
    H = HessianLinearOperator(*arguments)
    torch.testing.assert_close(H.to_dense(), differences(*arguments), rtol=1e-5, atol=1e-6)
