"""The Lanczos process, which eigenpairs, singular triplets and spectral densities share.

All basis vectors are held, and every new one is orthogonalised against them, twice: that is enough
for orthogonality up to rounding (Giraud, Langou & Rozložník 2005), so no eigenvalue shows up
several times by mistake. Everything of the size of the basis is on the CPU in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvlinops._operator import PyTorchLinearOperator
from curvlinops._tensors import CHECK_ORIGIN, widened
from curvlinops.solvers._arguments import flatten, names_of

WHICH = ("LM", "SM", "LA", "SA", "BE")
_BREAKDOWN = 10  # machine epsilons of the largest product's norm: a residual of zero, rounded
_SUSPICION = 1e4  # the same, if rounding grew in the steps before: nothing is changed by that
_FLOOR = 4  # machine epsilons of the largest eigenvalue: no residual is smaller, but by chance
_CHECKS = 16  # for convergence, while a basis is filled again

Criterion = Callable[[Tensor, Tensor, float], Tensor]
"""From Ritz values, residual norms and the largest magnitude to which pairs have converged."""


# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------
def own_dtype(A: PyTorchLinearOperator) -> torch.dtype:
    """Return the dtype in which A multiplies."""
    return torch.get_default_dtype() if A.dtype is None else A.dtype


def normal(A: PyTorchLinearOperator, num: int, generator: torch.Generator | None = None) -> Tensor:
    """Return ``num`` normal vectors for A, one after another, as rows ``[num, N]``."""
    device = A.device
    if device is None and generator is not None:
        device = generator.device
    like = widened(torch.empty(0, dtype=own_dtype(A)))
    size = (num, A.shape[1])
    return torch.randn(size, dtype=like.dtype, device=device, generator=generator)


def start_vector(
    A: PyTorchLinearOperator, v0: Any, generator: torch.Generator | None = None
) -> Tensor:
    """Return where to start ``[N]``, in float32 at least: v0 in any format, or a random vector.

    Raises:
        ValueError: If v0 does not fit, is zero, or not finite.
    """
    if v0 is None:
        return normal(A, 1, generator)[0]
    columns, fmt = flatten(A, v0, "v0", A.in_shape, names_of(A))
    if not fmt.is_vector:
        raise ValueError(f"v0 must be one vector, got {columns.shape[1]} columns.")
    flat = columns.squeeze(1)
    if not bool(flat.isfinite().all()) or not bool((flat != 0).any()):
        got = "only zeros" if bool(flat.isfinite().all()) else "NaN or infinities"
        raise ValueError(f"v0 must be finite and not zero, got {got}.")
    return widened(flat.detach())


# --------------------------------------------------------------------------------------------------
# The process
# --------------------------------------------------------------------------------------------------
class LanczosBasis:
    """Orthonormal vectors, a projection of A on them, and a residual.

    With the first m vectors as columns of V, ``A V = V T + beta v_{m+1} e_mᵀ`` up to rounding. T is
    real and symmetric, for complex Hermitian A too: tridiagonal, and after a restart an arrowhead
    followed by a tridiagonal part.

    Args:
        A: Hermitian operator.
        size: The largest m.
        start: The first vector ``[D]`` up to its norm, in float32 at least.
        generator: Random numbers for :meth:`add_random`.
    """

    def __init__(
        self,
        A: PyTorchLinearOperator,
        size: int,
        start: Tensor,
        generator: torch.Generator | None = None,
    ):
        self._A, self._generator = A, generator
        self._dtype = own_dtype(A)
        self.vectors = start.new_empty(size + 1, len(start))  # rows
        self.vectors[0] = start / _norm(start)
        self.vectors[0] /= _norm(self.vectors[0])  # of subnormal numbers once is not enough
        self.T = torch.zeros(size, size, dtype=torch.float64)
        self.beta = 0.0
        self._largest = 0.0  # norm of a product
        self.length = 0  # m
        self.products = 0
        self.suspicious = False  # whether there may have been an invariant subspace

    def extend(self) -> bool:
        """Multiply the last vector; return False if the vectors span an invariant subspace.

        Then the residual is zero, and there is no next vector, unless :meth:`add_random` adds one.

        Raises:
            ValueError: If the product is not finite.
        """
        return self.take(self._A @ self.last)

    @property
    def last(self) -> Tensor:
        """The vector to multiply next ``[D]``, in A's dtype."""
        return self.vectors[self.length].to(self._dtype)

    def take(self, product: Tensor) -> bool:
        """Go on with the product of A and :attr:`last`, as :meth:`extend` does."""
        j, w = self.length, widened(product)
        if w.is_complex() and not self.vectors.is_complex():  # of an operator without dtype
            raise ValueError(
                f"{self._A!r} has no dtype, but its product is complex. Give the operator a tensor "
                "of its dtype, or a property dtype."
            )
        self.products += 1
        before = _norm(w)
        w, coefficients = self._orthogonalised(w, j + 1)
        beta = _norm(w)
        # the step's only transfer: all that the host decides by
        alpha, size, norm = torch.stack([coefficients[j].real, before, beta]).cpu().tolist()
        if not abs(size) < torch.inf:
            raise ValueError(
                f"The product of {self._A!r} with a unit vector is not finite. {CHECK_ORIGIN}"
            )
        self.T[j, j] = alpha
        self.length += 1
        self._largest = max(self._largest, size)
        rounding = torch.finfo(w.dtype).eps * self._largest
        negligible = norm <= _BREAKDOWN * rounding
        self.beta = 0.0 if negligible else norm
        self.suspicious |= norm <= _SUSPICION * rounding
        if not negligible:
            self.vectors[self.length] = w / beta
        if self.length < len(self.T):
            self.T[j, j + 1] = self.T[j + 1, j] = self.beta
        return not negligible

    def add_random(self) -> None:
        """Go on from a random vector that is orthogonal to the others, instead of the residual."""
        self.beta = 0.0
        if self.length < len(self.T):
            self.T[self.length] = self.T[:, self.length] = 0
        w = normal(self._A, 1, self._generator)[0].to(self.vectors)
        if self.length < len(w):  # else they span the space
            for _ in range(2):
                w, _coefficients = self._orthogonalised(w / _norm(w), self.length)
            self.vectors[self.length] = w / _norm(w)

    def _orthogonalised(self, w: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return w without its components along the first vectors, and these ``[number]``."""
        basis = self.vectors[:number]
        first = basis.conj() @ w
        w = w - first @ basis
        second = basis.conj() @ w
        return w - second @ basis, first + second

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values ``[m]``, ascending, their vectors in the basis ``[m, m]``, residuals.

        The residual norms ``[m]`` are those of the Ritz pairs, up to rounding.
        """
        values, vectors = torch.linalg.eigh(self.T[: self.length, : self.length])
        return values, vectors, self.beta * vectors[-1].abs()

    def combined(self, coefficients: Tensor) -> Tensor:
        """Return combinations of the vectors as rows ``[p, D]``; coefficients ``[m, p]``."""
        return coefficients.T.to(self.vectors) @ self.vectors[: self.length]

    def restart(self, values: Tensor, coefficients: Tensor) -> None:
        """Keep p Ritz vectors and the residual only (Wu & Simon 2000).

        Args:
            values: Their Ritz values ``[p]``.
            coefficients: The vectors in the basis ``[m, p]``.
        """
        kept, coupling = len(values), self.beta * coefficients[-1]
        self.vectors[:kept] = self.combined(coefficients)
        self.vectors[kept] = self.vectors[self.length]
        self.T.zero_()
        self.T[range(kept), range(kept)] = values
        self.T[kept, :kept] = self.T[:kept, kept] = coupling
        self.length = kept


def _norm(w: Tensor) -> Tensor:
    """Return a vector's norm; squares neither overflow nor underflow."""
    largest = w.abs().amax()
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return torch.linalg.vector_norm(w / scale) * scale


# --------------------------------------------------------------------------------------------------
# Eigenpairs by restarts
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs, ascending, and what is known of them.

    Attributes:
        values: Eigenvalues ``[k]``, float64 on the CPU.
        rows: Eigenvectors as rows ``[k, D]``, None if they were not asked for.
        residual_norms: Norms of ``A x - λ x``, float64 ``[k]`` on the CPU.
        converged: Which satisfy the criterion, bool ``[k]``.
        products: The number of products with A.
    """

    values: Tensor
    rows: Tensor | None
    residual_norms: Tensor
    converged: Tensor
    products: int


def preference(values: Tensor, which: str) -> Tensor:
    """Return the order ``[m]`` in which ascending eigenvalues are wanted."""
    number = len(values)
    ascending = torch.arange(number)
    if which == "LA":
        return ascending.flip(0)
    if which == "SA":
        return ascending
    if which == "BE":  # from both ends in turn, the upper one first
        return torch.stack([ascending.flip(0), ascending], dim=1).flatten()[:number]
    return values.abs().argsort(descending=which == "LM", stable=True)


def relative_criterion(tolerance: float, eps: float) -> Criterion:
    """Return ARPACK's criterion, with a bound below that rounding permits to reach.

    The residual norm is at most ``tolerance * max(|λ|, eps^(2/3) scale)``, or some machine epsilons
    of the scale, which is the largest magnitude of a Ritz value.
    """

    def criterion(values: Tensor, residuals: Tensor, scale: float) -> Tensor:
        bounds = tolerance * values.abs().clamp(min=eps ** (2 / 3) * scale)
        return residuals <= bounds.clamp(min=_FLOOR * eps * scale)

    return criterion


def restarted_lanczos(
    A: PyTorchLinearOperator,
    k: int,
    which: str,
    *,
    ncv: int,
    start: Tensor,
    max_iter: int,
    criterion: Criterion,
    generator: torch.Generator | None = None,
    return_vectors: bool = True,
) -> Eigenpairs:
    """Compute k eigenpairs of a Hermitian operator by thick-restart Lanczos.

    Args:
        A: The operator, of dimension D.
        k: The number of pairs.
        which: Which, see :data:`WHICH`.
        ncv: The size of the basis, ``k < ncv < D``.
        start: The first vector ``[D]``, in float32 at least.
        max_iter: The largest number of times that the basis is filled, at least 1.
        criterion: Which pairs have converged.
        generator: Random numbers for what follows an invariant subspace.
        return_vectors: Whether to compute eigenvectors.
    """
    basis = LanczosBasis(A, ncv, start, generator)
    before = None  # the eigenvalues when all had converged, one basis ago
    step = max(1, ncv // _CHECKS)
    for iteration in range(1, max_iter + 1):
        while True:
            if not basis.extend():
                basis.add_random()
            full = basis.length == ncv
            if not full and (iteration == 1 or basis.suspicious or basis.length % step):
                continue
            values, vectors, residuals = basis.ritz()
            order = preference(values, which)
            wanted, scale = order[:k], values.abs().max().item()
            converged = criterion(values[wanted], residuals[wanted], scale)
            num_converged = int(converged.sum())
            if full or num_converged == k:
                break
        if num_converged == k:
            # An invariant subspace holds one copy of each eigenvalue only: others may be missing.
            # Then what was found must stand against the basis of a new random vector.
            now = values[wanted].sort().values
            rounding = 100 * torch.finfo(start.dtype).eps * scale
            same = before is not None and bool((now - before).abs().max() <= rounding)
            if same or not basis.suspicious:
                break
            before = now
        else:
            before = None
        if iteration < max_iter:
            number = k if before is not None else _number_to_keep(k, num_converged, ncv)
            kept = order[:number].sort().values
            basis.restart(values[kept], vectors[:, kept])
            if before is not None:
                basis.add_random()
    place = wanted.argsort()
    wanted, converged = wanted[place], converged[place]
    rows = basis.combined(vectors[:, wanted]) if return_vectors else None
    return Eigenpairs(values[wanted], rows, residuals[wanted], converged, basis.products)


def _number_to_keep(k: int, num_converged: int, ncv: int) -> int:
    """Return how many Ritz vectors survive a restart: as in ARPACK, more as more converge."""
    if k + num_converged == 1 and ncv > 2:
        return ncv // 2 if ncv >= 6 else 2
    return k + min(num_converged, (ncv - k) // 2)


def dense_eigenpairs(
    A: PyTorchLinearOperator, k: int, which: str, return_vectors: bool
) -> Eigenpairs:
    """Decompose the dense matrix: D products, as many as a basis of D vectors needs."""
    matrix = widened(A.to_dense())
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"The products of {A!r} are not finite. {CHECK_ORIGIN}")
    values, vectors = torch.linalg.eigh((matrix + matrix.mH) / 2)
    values = values.cpu().double()
    wanted = preference(values, which)[:k].sort().values
    rows = vectors.T[wanted.to(vectors.device)] if return_vectors else None
    # LAPACK's errors are of the size of rounding errors of the matrix
    residuals = torch.finfo(matrix.dtype).eps * values.abs().max().repeat(k)
    return Eigenpairs(values[wanted], rows, residuals, torch.ones(k, dtype=torch.bool), A.shape[1])


# --------------------------------------------------------------------------------------------------
# Quadrature
# --------------------------------------------------------------------------------------------------
def lanczos_quadrature(
    A: PyTorchLinearOperator, starts: Tensor, ncv: int
) -> list[tuple[Tensor, Tensor]]:
    """Return nodes and weights for which ``Σ w f(θ) ≈ vᴴ f(A) v`` with ``v = start / ‖start‖``.

    This is Gaussian quadrature, exact for polynomials f of degree ``2 m - 1`` with m nodes. The
    processes are independent, but share products.

    Args:
        A: Hermitian operator.
        starts: Vectors as columns ``[D, K]``, in float32 at least.
        ncv: The number of products, and of nodes; fewer if an invariant subspace ends a process.

    Returns:
        Nodes and weights ``[m]``, float64 on the CPU, for each vector.
    """
    bases = [LanczosBasis(A, ncv, start) for start in starts.T]
    active = bases
    for _ in range(ncv):
        if not active:
            break
        products = (A @ torch.stack([basis.last for basis in active], dim=1)).unbind(1)
        active = [b for b, product in zip(active, products, strict=True) if b.take(product)]
    pairs = []
    for basis in bases:
        values, vectors, _ = basis.ritz()
        pairs.append((values, vectors[0] ** 2))
    return pairs
