"""EKFAC of grouped convolutions with one output pixel: sums over vectors, for each group."""

from __future__ import annotations

import torch
from torch import nn

from curvlinops import EKFACLinearOperator, GGNLinearOperator


def test_trace_of_each_group() -> None:
    """The trace is exact. Groups whose inputs have other sizes show sums that are swapped."""
    model = nn.Sequential(nn.Conv1d(6, 6, 3, groups=3, bias=False), nn.Flatten()).double()
    scales = torch.tensor([1.0, 1, 2, 2, 5, 5]).double().unsqueeze(-1)
    data = [(scales * torch.randn(n, 6, 3).double(), torch.randn(n, 6).double()) for n in (4, 3)]
    params = dict(model.named_parameters())
    loss = nn.MSELoss(reduction="sum")
    E = EKFACLinearOperator(model, loss, params, data, fisher_type="type-2")
    diagonal = GGNLinearOperator(model, loss, params, data).to_dense().diagonal()
    expected = diagonal.reshape(3, -1).sum(1)
    actual = E.to_dense().diagonal().reshape(3, -1).sum(1)
    torch.testing.assert_close(actual, expected)
