"""The number of positions that a format says is that of its inputs, and so is their mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvlinops.computers.formats import (
    ChannelNormFormat,
    ConvolutionFormat,
    EmbeddingFormat,
    Format,
    NormFormat,
    TransposedConvolutionFormat,
)

CONVOLUTION = ConvolutionFormat(2, (2, 3), (1, 2), ((1, 1), (0, 1)), (2, 1))
TRANSPOSED = TransposedConvolutionFormat(1, (2, 3), (1, 2), (0, 1), (0, 1), (2, 1))
CASES: dict[str, tuple[Format, tuple[int, ...]]] = {
    "linear": (Format(), (6, 5, 4)),
    "convolution": (CONVOLUTION, (6, 4, 5, 7)),
    "transposed": (TRANSPOSED, (6, 4, 5, 7)),
    "layer norm": (NormFormat(1, "LayerNorm", (4, 2)), (6, 5, 4, 2)),
    "group norm": (ChannelNormFormat(1, "GroupNorm", 2), (6, 4, 5, 7)),
}


@pytest.mark.parametrize("n", [6, 3])
@pytest.mark.parametrize("name", CASES)
def test_number_and_mean(name: str, n: int) -> None:
    """Also if an example has several rows of the batch."""
    form, shape = CASES[name]
    positions = form.positions(torch.randn(shape, dtype=torch.float64), n, "a layer")
    check(positions.expanded(), positions.num_positions, positions.mean(), n)


@pytest.mark.parametrize("n", [6, 3])
def test_tokens(n: int) -> None:
    form = EmbeddingFormat(size=9, padding_idx=2, dtype=torch.float64)
    positions = form.positions(torch.randint(9, (6, 5)), n, "a layer")
    check(positions.expanded(), positions.num_positions, positions.mean(), n)


def check(inputs: Tensor, number: int, mean: Tensor, n: int) -> None:
    assert inputs.shape[:2] == (n, number)
    torch.testing.assert_close(mean, inputs.mean(1))
