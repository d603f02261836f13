"""Systems with known spectra, and operators that note what is multiplied, for all solvers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlinops import PyTorchLinearOperator

F64 = torch.float64


def hermitian(eigenvalues: Tensor, dtype: torch.dtype = F64) -> Tensor:
    """Return a matrix with these eigenvalues and random eigenvectors."""
    dim = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=dtype))
    matrix = (Q * eigenvalues.to(dtype)) @ Q.mH
    return (matrix + matrix.mH) / 2


def spd(dim: int, condition: float = 100.0, dtype: torch.dtype = F64) -> Tensor:
    """Return a Hermitian positive definite matrix, with eigenvalues in [1/2, condition/2].

    They are evenly spaced: conjugate gradients then take the same number of steps whatever the
    rounding (with many scales among them, SciPy's number changes with the order of the entries).
    """
    return hermitian(torch.linspace(1, condition, dim, dtype=F64) / 2, dtype)


def relative_residuals(A: Tensor, x: Tensor, b: Tensor) -> Tensor:
    """Return the norm of each column's residual, relative to that of b."""
    return torch.linalg.vector_norm(b - A @ x, dim=0) / torch.linalg.vector_norm(b, dim=0)


class Counting(PyTorchLinearOperator):
    """A matrix on a space of tensors that notes the columns of each product."""

    SELF_ADJOINT = True

    def __init__(self, matrix: Tensor, shapes: list[tuple[int, ...]] | None = None):
        shapes = [(matrix.shape[0],)] if shapes is None else shapes
        super().__init__(shapes, shapes)
        self.matrix = matrix
        self.widths: list[int] = []

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        assert not torch.is_grad_enabled()
        width = X[0].shape[-1]
        self.widths.append(width)
        result = self.matrix @ torch.cat([x.reshape(-1, width) for x in X])
        sizes = [x.numel() // width for x in X]
        return [y.reshape(x.shape) for x, y in zip(X, result.split(sizes), strict=True)]


class Function(PyTorchLinearOperator):
    """A function of flat columns, without dtype or device."""

    SELF_ADJOINT = True

    def __init__(self, function: Callable[[Tensor], Tensor], dim: int):
        super().__init__([(dim,)], [(dim,)])
        self.function = function

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self.function(X[0])]


def with_singular_values(
    rows: int, columns: int, values: Tensor, dtype: torch.dtype = F64
) -> Tensor:
    """Return a matrix with these singular values (and zeros) and random singular vectors."""
    rank = len(values)
    U, _ = torch.linalg.qr(torch.randn(rows, rank, dtype=dtype))
    V, _ = torch.linalg.qr(torch.randn(columns, rank, dtype=dtype))
    return (U * values.to(dtype)) @ V.mH


def alternating(values: Tensor) -> Tensor:
    """Return eigenvalues of alternating signs."""
    return values * (-1.0) ** torch.arange(len(values))


class Late:
    """Multiply with a matrix, and put a number into the first column of the n-th product."""

    def __init__(self, matrix: Tensor, value: float, number: int = 3):
        self.matrix, self.value, self.number, self.calls = matrix, value, number, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        result = self.matrix @ v
        if self.calls == self.number:
            result[0, 0] = self.value
        return result
