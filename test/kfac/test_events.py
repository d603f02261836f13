"""The public stream of layer inputs and output gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import LAYER_CASES, layer_setup
from torch import Tensor, nn
from torch.func import functional_call

from curvlinops import KFACLinearOperator
from curvlinops.computers.events import Pairs, Statistic
from curvlinops.computers.kfac_hooks import HooksKFACComputer
from curvlinops.computers.kfac_make_fx import MakeFxKFACComputer
from curvlinops.computers.listeners import Bundled
from curvlinops.computers.usages import Part, Usage

# PyTorch's own remark about an even kernel with padding "same"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
each_backend = pytest.mark.parametrize("computer", [HooksKFACComputer, MakeFxKFACComputer])


class Gradients:
    """Adds pairs up to gradients of parameters in canonical form, as a user would."""

    def __init__(self) -> None:
        self.matrices: dict[str, Tensor] = {}
        self.embeddings: dict[str, Tensor] = {}  # in the canonical form of an embedding

    def add(self, usage: Usage, a: Tensor | None, g: Tensor) -> None:
        assert not g.requires_grad
        if usage.weight is not None:
            assert a is not None and a.shape[:2] == g.shape[1:3]
            groups = usage.format.groups
            if usage.format.is_norm:
                W = (a * g).sum((0, 1, 2)).unsqueeze(1)
            else:
                g_parts, a_parts = (t.unflatten(-1, (groups, -1)) for t in (g, a.to(g.dtype)))
                W = torch.einsum("vnsgo, nsgi -> goi", g_parts, a_parts).flatten(0, 1)
            self.put(
                self.embeddings if usage.format.is_embedding else self.matrices, usage.weight, W
            )
        if usage.bias is not None:
            self.put(self.matrices, usage.bias, g.sum((0, 1, 2)).unsqueeze(1))

    def put(self, totals: dict[str, Tensor], part: Part, rows: Tensor) -> None:
        """Add the gradient of some rows."""
        total = totals.setdefault(part.name, rows.new_zeros(part.whole, rows.shape[1]))
        total[part.start : part.stop] += rows

    def total(self, name: str, p: Tensor) -> Tensor:
        """Return the gradient of a parameter, flat."""
        found = self.matrices.get(name)
        embedding = self.embeddings.get(name)
        if embedding is not None:  # a linear layer with this weight has the transpose
            found = embedding if found is None else found + embedding.T
        return torch.zeros_like(p).flatten() if found is None else found.flatten()


@each_backend
@pytest.mark.parametrize("name", LAYER_CASES)
def test_pairs_add_up_to_gradients(name: str, computer: Any) -> None:
    """For empirical vectors; with c, and through K's map from canonical form, of the loss."""
    problem = layer_setup(name)
    options = {"fisher_type": "empirical", "loss_terms": "exact"}
    gatherer = computer(**problem.kwargs(), **options)
    gradients = Gradients()
    scale = gatherer.stream(Pairs(gradients.add))
    assert isinstance(scale, float)
    K = KFACLinearOperator(**problem.kwargs(), **options)
    P, *_ = K
    canonical = [
        torch.cat([gradients.total(name, problem.params[name]) for name in group.values()])
        for group in gatherer.mapping
    ]
    actual = [scale * block for block in P @ canonical]

    params = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
    predictions = [functional_call(problem.model, params, (X,)) for X, _ in problem.data]
    num_entries = sum(y.numel() for _, y in problem.data)
    loss = sum(
        problem.loss(f, y) * (1 if problem.loss.reduction == "sum" else y.numel() / num_entries)
        for f, (_, y) in zip(predictions, problem.data, strict=True)
    )
    expected = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


@each_backend
def test_type2_pairs_add_up_to_the_dense_block(computer: Any) -> None:
    """Σ vec(G) vec(G)ᵀ of single examples is the GGN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = [(torch.rand(n, 3).double(), torch.arange(n) % 3) for n in (3, 2)]
    params = dict(model.named_parameters())
    total = torch.zeros(12, 12, dtype=torch.float64)

    def add(usage: Usage, a: Tensor | None, g: Tensor) -> None:
        if usage.weight is not None and usage.weight.name == "2.weight":
            assert a is not None
            G = torch.einsum("vnso, nsi -> vnoi", g, a).flatten(0, 1).flatten(1)
            total.add_(G.T @ G)

    arguments = (model, nn.CrossEntropyLoss(), params, data)
    scale = computer(*arguments, fisher_type="type-2").stream(Pairs(add))

    def loss(W: Tensor) -> Tensor:
        f = [functional_call(model, {**params, "2.weight": W}, (X,)) for X, _ in data]
        return nn.functional.cross_entropy(torch.cat(f), torch.cat([y for _, y in data]))

    # the loss is convex in the last weight: its Hessian is the GGN
    expected = torch.func.hessian(loss)(params["2.weight"]).reshape(12, 12)
    torch.testing.assert_close(scale * total, expected.detach())


@each_backend
@pytest.mark.parametrize(("rows", "bundles"), [(12, [3]), (8, [2, 1]), (7, [1, 1, 1])])
def test_order_of_events(
    computer: Any, rows: int, bundles: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs first, then gradients from the last layer to the first, for each vector and batch.

    Those of several vectors come together if there are few rows.
    """
    monkeypatch.setattr(Bundled, "_ROWS", rows)
    log: list[str] = []

    class Log(Statistic):
        def on_input(self, usage: Usage, index: int, positions: Any) -> None:
            log.append(f"input {usage.part('W').name}")

        def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
            log.append(f"{len(gradient)} gradient {usage.part('W').name}")

        def end_of_forward(self) -> None:
            log.append("forward")

        def end_of_backward(self) -> None:
            log.append("backward")

        def end_of_batch(self) -> None:
            log.append("batch")

    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    data = [(torch.rand(4, 3), torch.rand(4, 2))] * 2
    params = dict(model.named_parameters())
    options = {"fisher_type": "mc", "mc_samples": 3}
    computer(model, nn.MSELoss(), params, data, **options).stream(Log())
    back = [
        event
        for number in bundles
        for event in (f"{number} gradient 1.weight", f"{number} gradient 0.weight", "backward")
    ]
    one = ["input 0.weight", "input 1.weight", "forward", *back, "batch"]
    assert log == one * 2


def test_silent_statistic_needs_nothing_overridden() -> None:
    class Silent(Statistic):
        pass

    model = nn.Linear(3, 2)
    data = [(torch.rand(2, 3), torch.rand(2, 2))]
    scale = HooksKFACComputer(model, nn.MSELoss(), dict(model.named_parameters()), data).stream(
        Silent()
    )
    assert scale == 1 / 4
