"""Low-rank operators."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from curvlinops._formats import Columns, concatenate, split_flat
from curvlinops._operator import PyTorchLinearOperator
from curvlinops._saving import saveable
from curvlinops.dense import TensorLinearOperator


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
            raise ValueError("Coefficients and vectors must share dtype and device.")
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

    def _formula(self) -> str:
        return f"LowRank({self.shape[0]}, rank {self.c.shape[0]})"
