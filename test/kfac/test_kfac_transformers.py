"""Whole models: their batches are not mixed up, and their inverses can be applied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BatchEncoding
from whole_models import NAMES, TINY, model_setup

from curvlinops import EKFACLinearOperator, KFACLinearOperator


def arguments(name: str, single: bool = False) -> dict[str, Any]:
    """Return what an operator is built from; examples in batches, or each in one of its own."""
    problem = model_setup(name, TINY)
    data: Any = problem.data
    if single:
        data = [(rows(X, i), y[i : i + 1]) for X, y in data for i in range(len(y))]
    if name != "resnet":  # what tokenizers return
        data = [(BatchEncoding(X), y) for X, y in data]
    return problem.kwargs(data=data, check_deterministic=True, loss_terms="exact")


def rows(X: Any, i: int) -> Any:
    return {key: value[i : i + 1] for key, value in X.items()}


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cls", [KFACLinearOperator, EKFACLinearOperator])
def test_batching_does_not_matter(cls: Any, name: str, joint: bool, approx: str) -> None:
    """Embeddings of positions, which all examples of a batch share, have gradients of each.

    With one example in each batch there is nothing that could be mixed.
    """
    options = {"kfac_approx": approx, "separate_weight_and_bias": not joint}
    few = name in ("bert", "resnet")  # vectors: others have one for each token and class
    for fisher_type in ("type-2" if few else "mc", "empirical"):
        A, B = (
            cls(**arguments(name, single), **options, fisher_type=fisher_type)
            for single in (False, True)
        )
        torch.testing.assert_close(A.trace(), B.trace())
        if cls is KFACLinearOperator or approx == "expand":  # else the basis is not unique
            torch.testing.assert_close(A.to_dense(), B.to_dense(), rtol=1e-8, atol=1e-10)
    assert sum(len(group) for group in A.mapping) == len(arguments(name)["params"])
    for line in A.summary().splitlines()[2:-1]:
        assert "diagonal" not in line or "counts of tokens" in line


@pytest.mark.parametrize("name", NAMES)
def test_inverse(name: str) -> None:
    K = KFACLinearOperator(**arguments(name))
    v = torch.rand(K.shape[1]).double()
    inverse = K.inverse(damping=0.1, use_exact_damping=True)
    torch.testing.assert_close(inverse @ (K @ v + 0.1 * v), v)
