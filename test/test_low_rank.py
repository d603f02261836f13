"""``U diag(λ) Uᴴ + c (I - U Uᴴ)``: the closed forms, against the dense matrix.

With two eigenvalues, a rest that occurs three times, and no number that is its own square or
reciprocal, a sum that became a mean, or a power that got lost, shows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo import C128, F64

from curvlinops._algebra import IdentityLinearOperator
from curvlinops.low_rank import LowRankLinearOperator


def low_rank(
    values: tuple[float, ...] = (3.0, 0.5), rest: float = 2.0, dtype: torch.dtype = F64
) -> tuple[LowRankLinearOperator, Tensor]:
    """Return an operator of dimension 5 and its matrix, made by the definition."""
    U, _ = torch.linalg.qr(torch.randn(5, len(values), dtype=dtype))
    eigenvalues = torch.tensor(values, dtype=F64)
    eye = torch.eye(5, dtype=dtype)
    matrix = U @ torch.diag(eigenvalues).to(dtype) @ U.mH + rest * (eye - U @ U.mH)
    return LowRankLinearOperator(eigenvalues, U, [(5,)], rest), matrix


CASES = [((3.0, 0.5), 2.0), ((3.0, -0.5), -2.0), ((3.0, -0.5), 0.0), ((3.0, 2, 5, 0.7, 4), 9.0)]


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize(("values", "rest"), CASES)
def test_closed_forms(values: tuple[float, ...], rest: float, dtype: torch.dtype) -> None:
    A, matrix = low_rank(values, rest, dtype)
    torch.testing.assert_close(A.to_dense(), matrix)
    torch.testing.assert_close(A.trace(), matrix.trace())
    torch.testing.assert_close(A.diagonal(), matrix.diagonal())
    torch.testing.assert_close(A.frobenius_norm(), matrix.norm())
    sign, log = A.slogdet()
    expected = torch.linalg.slogdet(matrix)
    if rest or len(values) == 5:
        torch.testing.assert_close(sign, expected[0])
        torch.testing.assert_close(log, expected[1])
    else:
        assert sign == 0 and log == -torch.inf
    torch.testing.assert_close(A.pinv().to_dense(), torch.linalg.pinv(matrix))
    torch.testing.assert_close(A.power(3).to_dense(), matrix @ matrix @ matrix)
    torch.testing.assert_close((-1.5 * A).to_dense(), -1.5 * matrix)
    torch.testing.assert_close(A._conjugate().to_dense(), matrix.conj())


@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize(("values", "rest"), CASES)
def test_inverse(values: tuple[float, ...], rest: float, dtype: torch.dtype) -> None:
    """Also where the sum is indefinite, and where the difference would be singular."""
    A, matrix = low_rank(values, rest, dtype)
    eye = torch.eye(5, dtype=dtype)
    for damping in (3.0, 2.0, 0.25):
        if -damping not in (*values, rest):
            expected = torch.linalg.inv(matrix + damping * eye)
            torch.testing.assert_close(A.inverse(damping).to_dense(), expected)
    shifted = A + 3.0 * IdentityLinearOperator([(5,)], dtype=dtype, device=torch.device("cpu"))
    assert isinstance(shifted, LowRankLinearOperator)
    torch.testing.assert_close(shifted.to_dense(), matrix + 3.0 * eye)


@pytest.mark.parametrize("damping", [-3.0, 0.5, -2.0])
def test_inverse_of_singular_operators(damping: float) -> None:
    """One of the eigenvalues, or the rest, and the damping cancel."""
    A, _ = low_rank((3.0, -0.5), 2.0)
    with pytest.raises(RuntimeError, match="it has eigenvalues 0"):
        A.inverse(damping)


def test_rest_that_does_not_occur() -> None:
    """It may be zero, or cancel the damping: there is nothing of it to be inverted."""
    A, matrix = low_rank((3.0, 2, 5, 0.7, 4), 0.0)
    torch.testing.assert_close(A.inverse().to_dense(), torch.linalg.inv(matrix))
    B, matrix = low_rank((3.0, 2, 5, 0.7, 4), -1.0)
    torch.testing.assert_close(B.inverse(1.0).to_dense(), torch.linalg.inv(matrix + torch.eye(5)))
