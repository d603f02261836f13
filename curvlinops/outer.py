"""Low-rank operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvlinops import _tensors
from curvlinops._formats import Columns, concatenate, split_flat
from curvlinops._operator import PyTorchLinearOperator
from curvlinops._rules import combine, rule
from curvlinops._saving import saveable
from curvlinops._scalars import Scalar, is_real
from curvlinops.dense import TensorLinearOperator
from curvlinops.low_rank import LowRankLinearOperator


@saveable
class OuterProductLinearOperator(PyTorchLinearOperator):
    """A sum of scaled outer products, ``Σᵢ cᵢ aᵢ aᵢᵀ``.

    For complex vectors ᵀ is the transpose, without conjugation.

    Args:
        c: The coefficients ``[R]``.
        A: The vectors as columns: a tensor ``[D, R]`` or a list of tensors ``[*N_i, R]``.

    Raises:
        ValueError: If the number of vectors is not that of the coefficients.

    Example:
        >>> import torch
        >>> from curvlinops import OuterProductLinearOperator
        >>> OuterProductLinearOperator(torch.tensor([2.0]), torch.ones(3, 1)).trace()
        tensor(6.)
    """

    _init_args = ("c", "A")

    def __init__(self, c: Tensor, A: Tensor | Sequence[Tensor]):
        vectors = [A] if isinstance(A, Tensor) else list(A)
        if c.ndim != 1 or any(a.ndim < 1 or a.shape[-1] != c.shape[0] for a in vectors):
            raise ValueError(
                f"Coefficients of shape {list(c.shape)} need vectors of shapes [..., {c.numel()}], "
                f"got {[list(a.shape) for a in vectors]}."
            )
        if any((a.dtype, a.device) != (c.dtype, c.device) for a in vectors):
            got = ", ".join(f"{t.dtype} on {t.device}" for t in (c, *vectors))
            raise ValueError(f"Coefficients and vectors must share dtype and device, got {got}.")
        shapes = [a.shape[:-1] for a in vectors]
        super().__init__(shapes, shapes)
        self.c = c
        self.A = vectors
        self.SELF_ADJOINT = not c.is_complex()

    @property
    def _matrix(self) -> Tensor:
        """The vectors as columns ``[D, R]``."""
        return concatenate(self.A)

    def _matmat(self, X: Columns) -> Columns:
        matrix = self._matrix
        coordinates = matrix.T @ concatenate(X)  # [R, K]
        return split_flat(matrix @ (self.c.unsqueeze(-1) * coordinates), self.in_shape)

    def _adjoint(self) -> OuterProductLinearOperator:
        return self._conjugate()

    def _conjugate(self) -> OuterProductLinearOperator:
        if not self.c.is_complex():
            return self
        return OuterProductLinearOperator(self.c.conj(), [a.conj() for a in self.A])

    def trace(self) -> Tensor:
        """Return ``Σ cᵢ aᵢᵀaᵢ``."""
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        """Return ``Σ cᵢ aᵢ²`` (entry-wise)."""
        return (self._matrix**2) @ self.c

    def frobenius_norm(self) -> Tensor:
        """Return the norm, from the vectors' ``R × R`` inner products."""
        gram = self._matrix.mH @ self._matrix  # [R, R]
        # tr(Mᴴ M) with M = A diag(c) Aᵀ is Σ_ij c̄_i G_ij c_j G_ij, where G = AᴴA
        square = (self.c.conj().unsqueeze(-1) * gram**2 * self.c).sum().real
        return square.clamp(min=0).sqrt()

    def slogdet(self) -> tuple[Tensor, Tensor]:
        """Return sign and logarithm of the determinant; it is 0 for fewer vectors than rows."""
        matrix = self._matrix
        dim, rank = matrix.shape
        if rank < dim:
            zero = self.c.new_zeros(())
            return zero, zero.abs().log()
        return TensorLinearOperator((matrix * self.c) @ matrix.T).slogdet()

    def eigh(self) -> LowRankLinearOperator:
        """Return a real operator in eigendecomposed form, with at most R eigenvalues besides 0.

        Not in half precision, in which eigenvectors are far from orthogonal.
        """
        if self.c.itemsize < 4:
            raise self._missing("eigh")
        return LowRankLinearOperator(*self._thin_eigh("eigh"), self.in_shape)

    def power(self, exponent: float) -> PyTorchLinearOperator:
        """Return a power of a real operator, again of low rank (unless the exponent is 0)."""
        if exponent == 0:
            return combine("identity", self)
        values, vectors = self._thin_eigh("power")
        dim, rank = vectors.shape
        if exponent < 0 and rank < dim:
            values = values.new_zeros(1)  # raises the error
        power = _tensors.real_power(
            values, exponent, name=repr(self), size=min(dim, rank), computed=True
        )
        return self._of(power, vectors)

    def pinv(self, rtol: float | None = None) -> OuterProductLinearOperator:
        """Return the Moore-Penrose inverse of a real operator, again of low rank."""
        values, vectors = self._thin_eigh("pinv")
        cutoff = _tensors.relative_cutoff(rtol, values.numel(), values.dtype)
        largest = values.abs().max() if values.numel() else 0.0
        return self._of(_tensors.reciprocals(values, cutoff * largest), vectors)

    def _thin_eigh(self, form: str) -> tuple[Tensor, Tensor]:
        """Return eigenvalues ``[r]`` and orthonormal eigenvectors ``[D, r]``, r = min(D, R)."""
        if self.c.is_complex():  # a complex symmetric matrix
            raise self._missing(form)
        basis, small = torch.linalg.qr(_tensors.widened(self._matrix))  # [D, r], [r, R]
        small = (small * self.c) @ small.mT
        values, vectors = _tensors.eigh((small + small.mT) / 2, name=repr(self))
        return values, basis @ vectors

    def _of(self, values: Tensor, vectors: Tensor) -> OuterProductLinearOperator:
        """Return a low-rank operator on the same space."""
        parts = split_flat(vectors.to(self.c.dtype), self.in_shape)
        return OuterProductLinearOperator(values.to(self.c.dtype), parts)

    def _formula(self) -> str:
        return f"LowRank({self.shape[0]}, rank {self.c.shape[0]})"


@rule("scale", OuterProductLinearOperator, object)
def _scale(a: OuterProductLinearOperator, scalar: Scalar) -> PyTorchLinearOperator:
    """A multiple has the same vectors and multiplied coefficients."""
    if not is_real(scalar) and not a.c.is_complex():
        return NotImplemented
    return OuterProductLinearOperator(scalar * a.c, a.A)
