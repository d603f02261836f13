"""The vectors that KFAC back-propagates: how many there are, and their second moment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from curvlinops._random import RandomSource
from curvlinops.computers.vectors import loss_vectors, num_vectors
from curvlinops.kfac_utils import FisherType
from curvlinops.risk.losses import loss_entry

R, N, C = 3, 2, 4


def made(fisher_type: FisherType, per_example: int, loss_terms: str) -> tuple[int, list[Tensor]]:
    """Return the number that is said and the vectors for a cross-entropy, of which 5 samples."""
    loss, _ = loss_entry(nn.CrossEntropyLoss(reduction="sum"))
    F = torch.randn(N * per_example, C, dtype=torch.float64)
    targets = torch.randint(C, (N * per_example,))
    vectors = loss_vectors(
        loss,
        F,
        targets,
        fisher_type=fisher_type,
        mc_samples=5,
        per_example=per_example,
        loss_terms=loss_terms,
        random=RandomSource(7),
        signs="signs",
        first_term=0,
    )
    number = num_vectors(loss, C, fisher_type, 5, per_example, loss_terms)
    return number, list(vectors)


@pytest.mark.parametrize("loss_terms", ["signs", "exact"])
@pytest.mark.parametrize("per_example", [1, R])
@pytest.mark.parametrize("fisher_type", list(FisherType))
def test_number(fisher_type: FisherType, per_example: int, loss_terms: str) -> None:
    """As many as are said, also none; each has a row for each term."""
    number, vectors = made(fisher_type, per_example, loss_terms)
    assert len(vectors) == number
    assert all(v.shape == (N * per_example, C) for v in vectors)
    expected = {
        FisherType.FORWARD_ONLY: 0,
        FisherType.MC: 5,
        FisherType.EMPIRICAL: 1,
        FisherType.TYPE2: C - 1,
    }
    assert number == expected[fisher_type] * (per_example if loss_terms == "exact" else 1)


def test_exact_vectors_are_of_one_term() -> None:
    """One term of each example, whose number is the same for all, in their order."""
    _, vectors = made(FisherType.EMPIRICAL, R, "exact")
    terms = [v.any(dim=1).nonzero().flatten().tolist() for v in vectors]
    assert terms == [[0, 3], [1, 4], [2, 5]]
