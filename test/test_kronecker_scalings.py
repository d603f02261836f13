"""The numbers with which Kronecker products are damped, where no other term hides them."""

from __future__ import annotations

import torch
from zoo import F64

from curvlinops import KroneckerProductLinearOperator


def test_default_minimum_of_heuristic_damping() -> None:
    """1e-8: it is all that the inverses of factors which are zero consist of."""
    zero = torch.zeros(1, 1, dtype=F64)
    (inverse,) = KroneckerProductLinearOperator(zero).inverse(0.0, use_heuristic_damping=True)
    torch.testing.assert_close(inverse, torch.full_like(zero, 1e8))
    # δ m₂ / m₁ = 0 for both: they get the minimum, not only the smaller one
    small, large = torch.full_like(zero, 1e-9), torch.full_like(zero, 4e-8)
    pair = KroneckerProductLinearOperator(small, large).inverse(0.0, use_heuristic_damping=True)
    torch.testing.assert_close(pair[0], 1 / (small + 1e-8))
    torch.testing.assert_close(pair[1], 1 / (large + 1e-8))
