"""Tests of the Hessian against dense autodiff."""

from __future__ import annotations

import pytest
import torch
from exact_cases import PROBLEMS, assert_matrix
from torch import nn

from curvlinops import HessianLinearOperator


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_autodiff(name: str, reduction: str) -> None:
    problem = PROBLEMS[name]()
    assert_matrix(problem.operator(HessianLinearOperator, reduction), problem.hessian(reduction))


def test_rosenbrock() -> None:
    # (1 - x)² + b (z - x²)² is the square loss of the prediction (1 - x, √b (z - x²))
    b, x, z = 100.0, -1.2, 0.7

    def predict(params: dict[str, torch.Tensor], X: torch.Tensor) -> torch.Tensor:
        x, z = params["x"], params["z"]
        return X * torch.stack([1 - x, b**0.5 * (z - x**2)])

    params = {name: torch.tensor(p, dtype=torch.float64) for name, p in (("x", x), ("z", z))}
    data = [(torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, 2))]
    H = HessianLinearOperator(predict, nn.MSELoss(reduction="sum"), params, data)
    expected = [[2 + 12 * b * x**2 - 4 * b * z, -4 * b * x], [-4 * b * x, 2 * b]]
    torch.testing.assert_close(H.to_dense(), torch.tensor(expected, dtype=torch.float64))


def test_symmetric_and_indefinite() -> None:
    H = PROBLEMS["CE all options"]().operator(HessianLinearOperator).to_dense()
    torch.testing.assert_close(H, H.T)
    eigenvalues = torch.linalg.eigvalsh(H)
    assert eigenvalues.min() < -1e-3 < 1e-3 < eigenvalues.max()
