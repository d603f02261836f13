"""Which factors are diagonal: ``max_factor_size`` is that of one channel group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvlinops import EKFACLinearOperator, GGNLinearOperator
from curvlinops.computers.kfac_hooks import HooksKFACComputer
from curvlinops.diag import DiagonalLinearOperator


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
def test_limit_of_grouped_convolutions(approx: str, bias: bool) -> None:
    """Groups of 2 channels and a kernel of 3: an input factor has 6 rows, 7 with the bias."""
    model = nn.Sequential(nn.Conv1d(4, 16, 3, groups=2, bias=bias), nn.Flatten()).double()
    data = [(torch.randn(5, 4, 3).double(), torch.randn(5, 16).double())]
    params = dict(model.named_parameters())
    width = 6 + bias
    for limit, diagonal in ((width, False), (width - 1, True)):
        computer = HooksKFACComputer(
            model,
            nn.MSELoss(),
            params,
            data,
            kfac_approx=approx,
            max_factor_size=limit,
            separate_weight_and_bias=False,
        )
        (blocks,) = computer.blocks().values()
        assert len(blocks) == 2
        for B, A in blocks:
            assert isinstance(A, DiagonalLinearOperator) == diagonal
            assert tuple(A.shape) == (width, width)
            assert isinstance(B, DiagonalLinearOperator)  # 8 rows


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("joint", [False, True])
def test_ekfac_with_identities_as_eigenvectors(positions: bool, limit: int, joint: bool) -> None:
    """With diagonal factors alone it is the GGN's diagonal; gradients are not changed meanwhile."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3), nn.Flatten()).double()
    shape = (2, 3) if positions else (3,)
    data = [(torch.randn(n, *shape).double(), None) for n in (4, 3)]
    data = [(X, torch.zeros_like(model(X))) for X, _ in data]
    params = dict(model.named_parameters())
    E = EKFACLinearOperator(
        model,
        nn.MSELoss(),
        params,
        data,
        fisher_type="type-2",
        max_factor_size=limit,
        separate_weight_and_bias=not joint,
    )
    ggn = GGNLinearOperator(model, nn.MSELoss(), params, data).to_dense()
    torch.testing.assert_close(E.trace(), ggn.trace())
    if limit == 1:
        torch.testing.assert_close(E.to_dense(), ggn.diagonal().diag())
