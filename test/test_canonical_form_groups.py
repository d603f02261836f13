"""Canonical forms of groups of several tensors of one shape, which are concatenated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo import F64

from curvlinops import FromCanonicalLinearOperator, ToCanonicalLinearOperator


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 2)])
def test_normalisation_over_several_axes(shape: tuple[int, ...]) -> None:
    """Weight and bias of LayerNorm((2, 3)) have two axes, and are no matrix with a bias column."""
    shapes = {"bias": shape, "other": (2,), "weight": shape}
    groups = [{"W": "weight", "b": "bias"}, {"b": "other"}]
    P = ToCanonicalLinearOperator(shapes, groups)
    bias, other, weight = (torch.randn(shapes[name], dtype=F64) for name in shapes)
    result: list[Tensor] = P @ [bias, other, weight]
    assert torch.equal(result[0], torch.cat([weight.flatten(), bias.flatten()]))
    assert torch.equal(result[1], other)
    back = FromCanonicalLinearOperator(shapes, groups) @ result
    assert all(torch.equal(a, b) for a, b in zip(back, [bias, other, weight], strict=True))
