"""Diagonal second moments of channel groups are the diagonals of the whole ones."""

from __future__ import annotations

import pytest
import torch

from curvlinops.computers.positions import Moment


@pytest.mark.parametrize("ones", [None, 0.5])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_diagonals(groups: int, ones: float | None) -> None:
    """Sums over rows, not means; of two updates."""
    whole, diagonal = Moment(False, groups), Moment(True, groups)
    for num_rows in (5, 3):
        rows = torch.randn(num_rows, 4 * groups, dtype=torch.float64)
        for moment in (whole, diagonal):
            moment.update(rows, ones)
    assert whole.count == diagonal.count == 8
    expected, actual = whole.symmetric(), diagonal.symmetric()
    assert expected is not None and actual is not None
    torch.testing.assert_close(actual, expected.diagonal(dim1=-2, dim2=-1))
