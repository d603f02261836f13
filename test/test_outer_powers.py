"""Which powers of ``Σᵢ cᵢ aᵢ aᵢᵀ`` exist: what counts as rounding of its few eigenvalues."""

from __future__ import annotations

import pytest
import torch
from zoo import F64

from curvlinops import OuterProductLinearOperator


def test_negative_powers_of_singular_operators() -> None:
    """As many vectors as rows, but dependent: an eigenvalue is zero up to rounding."""
    for _ in range(5):
        vectors = torch.randn(4, 3, dtype=F64)
        vectors = torch.cat([vectors, vectors @ torch.randn(3, 1, dtype=F64)], dim=1)
        A = OuterProductLinearOperator(torch.ones(4, dtype=F64), vectors)
        for exponent in (-1, -0.5):
            with pytest.raises(ValueError, match="does not exist: it is singular"):
                A.power(exponent)
        root = A.power(0.5).to_dense()
        torch.testing.assert_close(root @ root, A.to_dense(), rtol=1e-6, atol=1e-6)


def test_what_is_decomposed_is_as_small_as_the_rank() -> None:
    """Of two vectors with a thousand entries: rounding is that of a matrix with two rows."""
    c = torch.tensor([1.0, -1e-13], dtype=F64)
    A = OuterProductLinearOperator(c, torch.eye(1000, dtype=F64)[:, :2])
    with pytest.raises(ValueError, match=r"power 0.5 of .* is not real.* is -1.000e-13"):
        A.power(0.5)
    rounding = OuterProductLinearOperator(torch.tensor([1.0, -1e-16], dtype=F64), A.A)
    assert rounding.power(0.5).diagonal()[:2].tolist() == [1.0, 0.0]
