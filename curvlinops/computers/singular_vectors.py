"""The leading singular vectors of a linear map between symmetric matrices, from its products."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops import _tensors

_PATIENCE = 5  # iterations in which a residual near rounding errors may fail to fall


class SingularVectorSearch:
    r"""The leading singular vectors of a linear map R between symmetric matrices (or diagonals).

    The largest eigenvalue of :math:`R^\top R` is sought from the identity, with one step of power
    iteration and an optimal combination with the two last iterates in turn (conjugate gradients of
    the Rayleigh quotient, or LOBPCG without preconditioner: Knyazev, 2001). All iterates are
    polynomials in :math:`R^\top R` applied to the identity, so that the limit is, as that of power
    iteration, the projection of the identity to the leading eigenspace. If R and its adjoint map
    positive semi-definite matrices to such, the limit is one, too.

    Whoever uses it alternates between giving ``R(search.operand)`` to :meth:`take_image`, and
    ``Rᵀ(search.operand)`` to :meth:`take_adjoint`, until ``search.done``.

    Args:
        identity: The start, ``[d, d]`` or ``[d]``, in the dtype of the search.
        tol: The search is done when :math:`\|R^\top R x - \sigma^2 x\| \leq \text{tol}\,\sigma^2`,
            or rounding errors keep it from falling further.

    Attributes:
        done: Whether it has converged.
        residual: The last relative residual.
        operand: What R or its adjoint is to be applied to.
        sigma: The leading singular value.
        left: Its left singular vector, of norm 1; None for R = 0.
        right: Its right singular vector, of norm 1.

    Example:
        >>> R = torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0]))  # of 2 x 2 matrices
        >>> search = SingularVectorSearch(torch.eye(2), tol=1e-6)
        >>> while not search.done:
        ...     search.take_image((R @ search.operand.flatten()).reshape(2, 2))
        ...     if not search.done:
        ...         search.take_adjoint((R.T @ search.operand.flatten()).reshape(2, 2))
        >>> round(search.sigma, 5)
        3.0
    """

    def __init__(self, identity: Tensor, tol: float):
        self._tol = tol
        self.operand = identity / identity.norm()
        self._basis = [self.operand]  # orthonormal
        self._images: list[Tensor] = []  # R of each
        self.done = False
        self.residual = self._best = float("inf")
        self._since_best = 0  # iterations since then
        self.sigma = 0.0
        self.left: Tensor | None = None
        self.right = self.operand

    def take_image(self, image: Tensor) -> None:
        """Take R of the operand."""
        self._images.append(_symmetric(image))
        largest = max(image.abs().max().item() for image in self._images)
        if largest == 0 or largest != largest or largest == float("inf"):
            self.done, self.residual = True, 0.0
            self.left = self._images[0] if largest else None
            self.sigma = largest
            return
        gram = [[_inner(a, b, largest) for b in self._images] for a in self._images]
        coefficients = torch.linalg.eigh(torch.tensor(gram, dtype=torch.float64))[1][:, -1]
        # the best combination, and what is orthogonal to it of the span of it and the last one
        other = -coefficients[0] * coefficients
        other[0] += 1
        kept = [coefficients]
        if other.norm() > 1e-6:
            other = other - (other @ coefficients) * coefficients
            kept.append(other / other.norm())
        self._basis = [_combined(c, self._basis) for c in kept]
        self._images = [_combined(c, self._images) for c in kept]
        if _trace(self._basis[0]) < 0:
            self._basis[0], self._images[0] = -self._basis[0], -self._images[0]
        self.sigma, self.left = _normalized(self._images[0])
        self.operand = self.left

    def take_adjoint(self, z: Tensor) -> None:
        """Take Rᵀ of the operand."""
        z = _symmetric(z)
        x = self._basis[0]
        # for the left vector this is the best right one, and nearer to the limit than x
        self.sigma, self.right = _normalized(z)
        w = z / self.sigma if self.sigma else z
        for _ in range(2):
            for v in self._basis:
                w = w - (w * v).sum() * v
        projection = (z / self.sigma * x).sum()
        residual = (z / self.sigma - x * projection).norm().item() if self.sigma else 0.0
        self._since_best = 0 if residual < self._best else self._since_best + 1
        self._best = min(self._best, residual)
        # rounding errors keep it from falling further
        stalled = self._since_best >= _PATIENCE and residual < torch.finfo(z.dtype).eps ** 0.5
        self.residual = residual
        norm = w.norm().item()
        if not residual > self._tol or stalled or norm == 0:
            self.done = True
            return
        self.operand = w / norm
        self._basis.append(self.operand)


def _symmetric(matrix: Tensor) -> Tensor:
    """Remove rounding errors from a symmetric matrix, or leave a diagonal."""
    return matrix if matrix.ndim == 1 else (matrix + matrix.T) / 2


def _inner(a: Tensor, b: Tensor, scale: float) -> float:
    """Return the inner product of two matrices divided by a number."""
    return ((a / scale) * (b / scale)).sum().item()


def _trace(matrix: Tensor) -> float:
    """Return the trace of a matrix or diagonal."""
    return (matrix if matrix.ndim == 1 else matrix.diagonal()).sum().item()


def _combined(coefficients: Tensor, matrices: list[Tensor]) -> Tensor:
    """Return a linear combination."""
    total = coefficients[0].item() * matrices[0]
    for coefficient, matrix in zip(coefficients[1:].tolist(), matrices[1:], strict=True):
        total.add_(matrix, alpha=coefficient)
    return total


def _normalized(matrix: Tensor) -> tuple[float, Tensor]:
    """Return the Frobenius norm, and the matrix divided by it; squares do not underflow."""
    largest = matrix.abs().max().item()
    if largest == 0:
        return 0.0, matrix
    norm = (matrix / largest).norm().item()
    return largest * norm, matrix / largest / norm


def positive_part(matrix: Tensor, name: str = "a singular vector, as a matrix,") -> Tensor:
    """Return the positive semi-definite part of a symmetric matrix, or of a diagonal.

    Args:
        matrix: The matrix ``[d, d]`` or diagonal ``[d]``. Non-finite ones are returned as they are.
        name: What it is, for warnings and errors.

    Example:
        >>> positive_part(torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
        tensor([[1., 0.], [0., 0.]])
    """
    if not bool(matrix.isfinite().all()):
        return matrix
    if matrix.ndim == 1:
        return matrix.clamp(min=0)
    values, Q = _tensors.eigh(matrix, name=name)
    if bool((values >= 0).all()):
        return matrix
    return _symmetric((Q * values.clamp(min=0)) @ Q.T)


__all__ = ["SingularVectorSearch", "positive_part"]
