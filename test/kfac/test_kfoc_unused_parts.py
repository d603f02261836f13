"""KFOC of a layer of which a part is computed, but not used: that part's blocks are zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvlinops import KFOCLinearOperator
from curvlinops.computers.kfoc_hooks import HooksKFOCComputer


class HalfUsed(nn.Module):
    """A weight and a bias whose first two rows give the output; the other three are for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        functional.linear(x, self.weight[2:], self.bias[2:])
        return functional.linear(x, self.weight[:2], self.bias[:2])


@pytest.mark.parametrize("separate", [True, False])
def test_unused_part(separate: bool) -> None:
    """Its blocks have its size, and are zero; those of the used part are the GGN's."""
    model = HalfUsed().double()
    data = [(torch.randn(6, 4).double(), torch.randn(6, 2).double())]
    options = {"separate_weight_and_bias": separate, "fisher_type": "type-2"}
    params = dict(model.named_parameters())
    K = KFOCLinearOperator(model, nn.MSELoss(reduction="sum"), params, data, **options)
    matrix = K.to_dense()
    assert matrix.shape == (25, 25)
    rows = torch.arange(25)
    of_weight = rows < 20
    used = torch.where(of_weight, rows // 4 < 2, rows - 20 < 2)
    assert not matrix[~used].any() and not matrix[:, ~used].any()
    x = data[0][0]
    inputs = x.mT @ x
    assert torch.allclose(matrix[:8, :8], 2 * torch.kron(torch.eye(2).double(), inputs))
    assert torch.allclose(matrix[20:22, 20:22], 2 * 6 * torch.eye(2).double())


def test_sizes_of_zero_factors() -> None:
    """The gradient factor has the rows of the part, and the input factor those of the input."""
    model = HalfUsed().double()
    data = [(torch.randn(6, 4).double(), torch.randn(6, 2).double())]
    params = {"weight": model.weight}
    computer = HooksKFOCComputer(model, nn.MSELoss(), params, data)
    ((used, unused),) = computer.blocks().values()
    assert [tuple(factor.shape) for factor in used] == [(2, 2), (4, 4)]
    assert [tuple(factor.shape) for factor in unused] == [(3, 3), (4, 4)]
    assert not any(factor.any() for factor in unused)
