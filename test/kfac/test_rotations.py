"""Inputs in the eigenbasis of their factor: without copies for the constant one, zeros beyond."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvlinops import EKFACLinearOperator
from curvlinops.computers.eigenvalues import _rotated_inputs

#: Shapes of rows: fewer and more of them than there are columns of zeros for.
SHAPES = [(3, 10), (70, 10), (2, 3, 10), (2, 70, 10), (5, 64, 15), (70, 2, 15)]


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) - 0.5


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("what", ["whole", "one", "last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotated_inputs(shape: tuple[int, ...], what: str, by_columns: bool) -> None:
    rows, last = rand(*shape), rand(*shape[:-1])
    rows = rows.mT.contiguous().mT if by_columns else rows
    d = shape[-1] + (what != "whole")
    Q = torch.linalg.qr(rand(d, d))[0]
    columns = {"whole": [rows], "one": [rows, torch.ones_like(last)[..., None]]}
    expected = torch.cat(columns.get(what, [rows, last[..., None]]), dim=-1) @ Q
    actual = _rotated_inputs(rows, Q, what == "one", last if what == "last" else None)
    torch.testing.assert_close(actual[..., :d], expected)
    assert not actual[..., d:].any()
    many = torch.Size(shape[:-1]).numel() > 4 * d
    assert actual.shape[-1] == (d + -d % 8 if many else d)


class Joined(TorchDispatchMode):
    """Notes the sizes of tensors that others are copied into, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("fisher_type", ["mc", "type-2"])
def test_inputs_are_not_copied_for_the_constant_one(fisher_type: str) -> None:
    """The patches of images are the largest tensors there are."""
    n, pixels = 4, 81
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Flatten()).double()
    data = [(rand(n, 3, 11, 11), rand(n, 98))]
    with Joined() as joined:
        EKFACLinearOperator(
            *(model, nn.MSELoss(), dict(model.named_parameters()), data),
            fisher_type=fisher_type,
            separate_weight_and_bias=False,
            check_deterministic=False,
        )
    assert max(joined.sizes, default=0) < n * pixels * 27
