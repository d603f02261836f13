"""Second moments: blocks, constant column, sums of sums, layers wide enough to have blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from curvlinops import KFACLinearOperator
from curvlinops.computers.positions import Moment

# below, at, and around the width from which there are blocks, and multiples of their sizes
WIDTHS = (1, 2, 127, 128, 129, 159, 160, 161, 256, 300)


def rows(r: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(r * 1000 + d)
    return torch.randn(r, d, generator=generator, dtype=dtype)


@pytest.mark.parametrize("ones", [None, 1.0, 0.0])
@pytest.mark.parametrize("d", WIDTHS)
def test_dense(d: int, ones: float | None):
    moment, all_rows = Moment(), []
    for r in (3, 1, 2):
        X = rows(r, d)
        # stored by columns, as the patches of images are
        moment.update(X.T.contiguous().T if r == 2 else X, ones)
        all_rows.append(X if ones is None else torch.cat([X, X.new_full((r, 1), ones)], dim=1))
    X = torch.cat(all_rows)
    total = moment.symmetric()
    assert total is not None and moment.count == 6
    torch.testing.assert_close(total, X.T @ X)
    assert moment.symmetric() is total
    torch.testing.assert_close(total, X.T @ X)


@pytest.mark.parametrize("d", WIDTHS)
def test_more_after_it_was_made_symmetric(d: int):
    moment = Moment()
    X = rows(5, d)
    moment.update(X[:2], 1.0)
    moment.symmetric()
    moment.update(X[2:], 1.0)
    X = torch.cat([X, X.new_ones(5, 1)], dim=1)
    torch.testing.assert_close(moment.symmetric(), X.T @ X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ones", [None, 1.0])
@pytest.mark.parametrize("S", [2, 130])
@pytest.mark.parametrize("d", [1, 3, 127, 128, 130])
def test_rows_of_positions(d: int, S: int, ones: float | None, dtype: torch.dtype):
    """Tensors with more axes, stored by rows, by columns as images are, and mixed in a sum."""
    moment, parts = Moment(), []
    for by_columns in (True, False, True):
        X = rows(3 * 2 * S, d, dtype).unflatten(0, (3, 2, S))
        moment.update(X.mT.contiguous().mT if by_columns else X, ones)
        X = X.flatten(0, -2).to(torch.promote_types(dtype, torch.float32))
        parts.append(X if ones is None else torch.cat([X, X.new_ones(len(X), 1)], dim=1))
    X = torch.cat(parts)
    assert moment.count == len(X)
    total = moment.symmetric()
    assert total is not None and total.dtype == X.dtype
    torch.testing.assert_close(total.double(), X.double().T @ X.double(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("by_columns", [False, True])
def test_gradients_of_images_are_not_copied(by_columns: bool):
    """One product of all rows; or, where that would have to move pixels in memory, one for each."""
    X = rows(2 * 4 * 100, 5).unflatten(0, (2, 4, 100))
    X = X.mT.contiguous().mT if by_columns else X
    moment = Moment()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        moment.update(X)
    names = {event.name for event in profiler.events()}
    assert not names & {"aten::clone", "aten::copy_", "aten::cat"}
    assert ("aten::bmm" in names) is by_columns


def test_half_precision_is_summed_in_float32():
    moment = Moment()
    X = rows(4, 130, torch.bfloat16)
    for _ in range(3):
        moment.update(X)
    total = moment.symmetric()
    assert total is not None and total.dtype == torch.float32
    torch.testing.assert_close(total, 3 * X.float().T @ X.float())


@pytest.mark.parametrize("ones", [None, 1.0])
@pytest.mark.parametrize("d", WIDTHS)
def test_taken(d: int, ones: float | None):
    """A multiple without gaps between rows, of which no second copy is held."""
    moment, X = Moment(), rows(5, d)
    moment.update(X, ones)
    assert moment.total is not None
    memory = moment.total.untyped_storage().data_ptr()
    total = moment.taken(3.0)
    X = X if ones is None else torch.cat([X, X.new_full((5, 1), ones)], dim=1)
    assert total is not None and total.is_contiguous()
    assert total.untyped_storage().data_ptr() == memory and moment.total is None
    torch.testing.assert_close(total, 3 * X.T @ X)


def test_nothing_was_added():
    assert Moment().symmetric() is None
    assert Moment().taken(2.0) is None


class Twice(nn.Module):
    """A wide layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(150, 150)
        self.last = nn.Linear(150, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(self.first(torch.sin(self.first(x))))
        return self.last(x).mean(1)


@pytest.mark.parametrize("backend", ["hooks", "make_fx"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_wide_layer(approx: str, separate: bool, backend: str):
    """Against sums of outer products, for a layer whose factors have blocks."""
    torch.manual_seed(0)
    model = Twice().double()
    data = [(torch.rand(n, 2, 150).double(), torch.rand(n, 2).double()) for n in (3, 2)]
    params = dict(model.named_parameters())
    loss = nn.MSELoss(reduction="sum")
    K = KFACLinearOperator(
        model,
        loss,
        params,
        data,
        fisher_type="empirical",
        kfac_approx=approx,
        separate_weight_and_bias=separate,
        backend=backend,
    )
    A: Any = 0
    B: Any = 0
    for X, y in data:
        calls: list[Tensor] = []
        inputs: list[Tensor] = []

        def hook(layer: nn.Module, args: Any, output: Tensor, c: Any = calls, i: Any = inputs):
            c.append(output)
            i.append(args[0].detach())

        handle = model.first.register_forward_hook(hook)
        value = loss(model(X), y)
        handle.remove()
        a = torch.cat(inputs, dim=1)  # [n, S, d]
        g = torch.cat(torch.autograd.grad(value, calls), dim=1)
        if not separate:
            a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], dim=-1)
        if approx == "reduce":
            a, g = a.mean(1, keepdim=True), g.sum(1, keepdim=True)
        A = A + torch.einsum("nsi, nsj -> ij", a, a) / (5 * a.shape[1])
        B = B + torch.einsum("nsi, nsj -> ij", g, g)
    gradient_factor, input_factor = K.factors("first.weight")
    torch.testing.assert_close(input_factor, A)
    torch.testing.assert_close(gradient_factor, B)
    if separate:
        torch.testing.assert_close(K.factors("first.bias")[0], B)
