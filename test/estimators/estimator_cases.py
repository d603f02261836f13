"""What the tests of estimators share: exact values, slow references, planted vectors, operators."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from curvlinops import (
    PyTorchLinearOperator,
    hutchinson_diag,
    hutchinson_squared_fro,
    hutchinson_trace,
    hutchpp_trace,
    xdiag,
    xtrace,
)
from curvlinops.estimators._sampling import Sampler

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
C128, C64 = torch.complex128, torch.complex64

DISTRIBUTIONS = ["rademacher", "normal"]
PARTS: dict[Callable[..., Any], int] = {
    hutchinson_trace: 1,
    hutchinson_diag: 1,
    hutchinson_squared_fro: 1,
    xtrace: 2,
    xdiag: 2,
    hutchpp_trace: 3,
}
"""How many products each sample of an estimator needs."""

ESTIMATORS = [pytest.param(estimator, id=estimator.__name__) for estimator in PARTS]
SQUARE = [
    pytest.param(estimator, id=estimator.__name__)
    for estimator in PARTS
    if estimator is not hutchinson_squared_fro
]


def exact(estimator: Callable[..., Any], A: Tensor) -> Tensor:
    """Return what an estimator estimates, from the matrix."""
    if estimator is hutchinson_squared_fro:
        return (A.abs() ** 2).sum()
    return A.diagonal() if estimator in (hutchinson_diag, xdiag) else A.trace()


def reference_samples(estimator: Callable[..., Any], A: Tensor, V: Tensor) -> Tensor:
    """Return an estimator's samples ``[k, *S]`` by its definition, one projector after another.

    ``V`` has all random vectors, in the order in which they are drawn.
    """
    if estimator is hutchinson_trace:
        return torch.stack([v.conj() @ A @ v for v in V.T])
    if estimator is hutchinson_diag:
        return torch.stack([v.conj() * (A @ v) for v in V.T])
    if estimator is hutchinson_squared_fro:
        return torch.stack([torch.linalg.vector_norm(A @ v) ** 2 for v in V.T])
    k, eye = V.shape[1], torch.eye(len(A), dtype=A.dtype)
    samples = []
    if estimator is hutchpp_trace:
        P = projector(A @ V[:, : k // 2])
        for v in V[:, k // 2 :].T:
            x = (eye - P) @ v
            samples.append((P @ A @ P).trace() + x.conj() @ A @ x)
        return torch.stack(samples)
    for i, v in enumerate(V.T):
        P = projector(A @ V[:, [j for j in range(k) if j != i]])
        x = (eye - P) @ v
        if estimator is xtrace:
            samples.append((P @ A @ P).trace() + x.conj() @ A @ x)
        else:
            samples.append((P @ A).diagonal() + v.conj() * ((eye - P) @ A @ v))
    return torch.stack(samples)


def projector(Y: Tensor) -> Tensor:
    """Return the projector onto the range of a matrix."""
    return Y @ torch.linalg.pinv(Y, rtol=1e-10)


def num_vectors(estimator: Callable[..., Any], num_matvecs: int) -> int:
    """Return how many random vectors an estimator draws."""
    return num_matvecs * {1: 1, 2: 1, 3: 2}[PARTS[estimator]] // PARTS[estimator]


class Planted:
    """Makes estimators use given vectors instead of random ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._vectors: Iterator[Tensor] = iter(())
        monkeypatch.setattr(Sampler, "_vector", lambda sampler: next(self._vectors))

    def run(self, estimator: Callable[..., Any], A: Any, V: Tensor, **kwargs: Any) -> Any:
        """Run an estimator on the columns of V; it must use them all."""
        num_matvecs = V.shape[1] * PARTS[estimator] // num_vectors(estimator, PARTS[estimator])
        self._vectors = iter(V.T)
        result = estimator(A, num_matvecs, **kwargs)
        assert next(self._vectors, None) is None
        return result


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Planted:
    """Makes estimators use given vectors."""
    return Planted(monkeypatch)


def all_tuples(atoms: Tensor, num: int) -> Iterator[Tensor]:
    """Yield all matrices ``[D, num]`` whose columns are among those of ``atoms [D, a]``."""
    for columns in itertools.product(range(atoms.shape[1]), repeat=num):
        yield atoms[:, list(columns)]


def sign_vectors(dim: int, dtype: torch.dtype = F64) -> Tensor:
    """Return all vectors of signs as columns, but one of v and -v, which give the same samples."""
    signs = itertools.product([1, -1], repeat=dim - 1)
    return torch.tensor([(1, *rest) for rest in signs], dtype=dtype).T


def unitary(dim: int, dtype: torch.dtype = F64) -> Tensor:
    """A random unitary matrix."""
    return torch.linalg.qr(torch.randn(dim, dim, dtype=dtype)).Q


def with_spectrum(eigenvalues: Tensor, dtype: torch.dtype = F64) -> Tensor:
    """Return a Hermitian matrix with these eigenvalues and random eigenvectors."""
    Q = unitary(len(eigenvalues), dtype)
    return (Q * eigenvalues.to(dtype)) @ Q.mH


def low_rank(dim: int, rank: int, dtype: torch.dtype = F64) -> Tensor:
    """A random matrix of low rank, not Hermitian."""
    left, right = torch.randn(2, dim, rank, dtype=dtype)
    return left @ right.mH


MATRICES: dict[str, Callable[[int], Tensor]] = {
    "symmetric": lambda dim: with_spectrum(torch.linspace(-1, 2, dim)),
    "general": lambda dim: torch.randn(dim, dim, dtype=F64),
    "hermitian": lambda dim: with_spectrum(torch.linspace(-1, 2, dim), C128),
    "complex": lambda dim: torch.randn(dim, dim, dtype=C128),
    "rank 1": lambda dim: low_rank(dim, 1),
    "rank 2": lambda dim: low_rank(dim, 2, C128),
    "nilpotent": lambda dim: torch.diag(torch.ones(dim - 1, dtype=F64), 1),
    "identity": lambda dim: torch.eye(dim, dtype=F64),
    "zero": lambda dim: torch.zeros(dim, dim, dtype=F64),
}


class Counting(PyTorchLinearOperator):
    """A matrix on a list of tensors that notes the columns of all products."""

    def __init__(self, matrix: Tensor, shapes: Sequence[tuple[int, ...]] | None = None):
        shapes = [(matrix.shape[1],)] if shapes is None else shapes
        super().__init__(
            shapes, shapes if matrix.shape[0] == matrix.shape[1] else [matrix.shape[:1]]
        )
        self.matrix = matrix
        self.products: list[Tensor] = []
        self.adjoint_products: list[Tensor] = []

    def _multiply(self, matrix: Tensor, X: list[Tensor], noted: list[Tensor]) -> list[Tensor]:
        columns = torch.cat([x.flatten(0, -2) for x in X])
        noted.append(columns)
        result = matrix @ columns
        sizes = [shape.numel() for shape in self.out_shape]
        return [
            y.reshape(*shape, -1)
            for y, shape in zip(result.split(sizes), self.out_shape, strict=True)
        ]

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._multiply(self.matrix, X, self.products)

    def _adjoint_matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._multiply(self.matrix.mH, X, self.adjoint_products)
