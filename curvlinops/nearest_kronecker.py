"""One Kronecker product for a sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvlinops import _tensors
from curvlinops.diag import DiagonalLinearOperator

Factor = Tensor | DiagonalLinearOperator

# Squaring a matrix that often separates its largest eigenvalue from all those that are smaller by
# more than 1e-8 of it; ties stay ties, as rounding errors of 1e-16 do not grow to 1.
_NUM_SQUARINGS = 30


def nearest_kronecker(
    terms: Sequence[tuple[Factor, Factor]],
    keep_diagonal: tuple[bool, bool] = (False, False),
    check_values: bool = True,
    overwrite: bool = False,
    traced: bool = False,
) -> tuple[Factor, Factor]:
    r"""Return the Kronecker product nearest to a sum of Kronecker products.

    The factors B and A minimise

    .. math::
        \Big\| \sum_{k=1}^K B_k \otimes A_k - B \otimes A \Big\|_F

    for Hermitian positive semi-definite :math:`B_k, A_k`; then B and A are positive semi-definite,
    too. No Kronecker product is formed. With :math:`R = \sum_k \mathrm{vec}(B_k)
    \mathrm{vec}(A_k)^\top` this is the best approximation of R by a matrix of rank one (Van Loan &
    Pitsianis, 1993, "Approximation with Kronecker products"). So :math:`B = \sum_k b_k B_k` and
    :math:`A = \sum_k a_k A_k`, and with the Gram matrices :math:`G_B = [\langle B_k, B_l \rangle]`
    and :math:`G_A = [\langle A_k, A_l \rangle]` the coefficients are the leading eigenvectors of

    .. math::
        G_A G_B \, b = \sigma^2 b, \qquad a \propto G_B \, b.

    Inner products of positive semi-definite matrices are non-negative, and so are, by the theorem
    of Perron and Frobenius, the coefficients. If the largest singular value :math:`\sigma` of R is
    degenerate, there are several nearest products; b is then the projection of
    :math:`[\|A_k\|_F]` onto the eigenspace, which (up to rounding) depends neither on the terms'
    order nor on the scales of their factors, nor on whether a term comes in several parts.

    A product fixes its factors up to a scale only: those returned have equal Frobenius norms,
    :math:`\sqrt\sigma` each, also for a single term. If all terms vanish, so do the factors.

    The coefficients are computed in double precision, from inner products in at least single
    precision. What is done is the same sequence of tensor operations for any entries, which can be
    traced, but for the check of the values.

    Args:
        terms: Pairs :math:`(B_k, A_k)` of matrices ``[d, d]`` or diagonal operators. All first
            factors are of one size, and all second ones.
        keep_diagonal: Whether the first and the second factor shall be diagonal, also where terms
            are tensors. The result is then the nearest product with such factors: the entries off
            the tensors' diagonals have no influence on it.
        check_values: Whether to read the entries, to raise if they are not what they must be.
            Without this check, of entries that are not finite some results are not finite, either.
        overwrite: Whether the results may take the place of terms in memory. No two terms may share
            it then, and none may be used afterwards.
        traced: Whether this is traced, and shall take few operations, rather than little memory.

    Returns:
        B and A: diagonal operators where this was asked for or all terms are diagonal, else
        tensors, in the dtype of the terms.

    Raises:
        ValueError: If there is no term, factors differ in size, dtype or device, or, with
            ``check_values``, have non-finite entries or are not positive semi-definite (as far as
            this shows).

    Example:
        >>> import torch
        >>> from curvlinops.nearest_kronecker import nearest_kronecker
        >>> B, A = torch.eye(2), torch.tensor([[4.0, 2.0], [2.0, 4.0]])
        >>> first, second = nearest_kronecker([(B, A), (3 * B, A)])
        >>> torch.allclose(torch.kron(first, second), torch.kron(4 * B, A))
        True
    """
    terms = list(terms)
    if not terms:
        raise ValueError("The nearest Kronecker product needs at least one term, got none.")
    first, second = (_Side([t[i] for t in terms], i, keep_diagonal[i], traced) for i in (0, 1))
    if (first.dtype, first.device) != (second.dtype, second.device):
        raise ValueError(
            f"The first factors have {first.dtype} on {first.device}, the second ones "
            f"{second.dtype} on {second.device}. Convert one of them with .to(...)."
        )
    (cosines_B, norms_B), (cosines_A, norms_A) = (s.gram(check_values) for s in (first, second))
    sizes = norms_B * norms_A  # [K], those of the terms
    largest = sizes.max()
    largest = torch.where(largest == 0, 1, largest)
    # the terms as w_k U_k ⊗ w_k V_k, with the factors' directions U and V
    weights = (sizes / largest).sqrt()
    gram_B, gram_A = (weights.outer(weights) * cosines for cosines in (cosines_B, cosines_A))
    power = gram_A @ gram_B
    for _ in range(_NUM_SQUARINGS):
        power = power / power.max()
        power = power @ power
    b = power @ weights  # ‖w_k V_k‖ = w_k
    b = b / b.max()
    a = gram_B @ b
    a = a / (b @ a)  # the best one for this b
    ratio = ((a @ gram_A @ a) / (b @ gram_B @ b)).sqrt().sqrt()
    scale = largest.sqrt() * weights
    # Terms that vanish have weight 0, and perhaps norm 0; if all do, there was 0 / 0 above. (NaN is
    # not 0: it stays.)
    coefficients_B = torch.where(weights == 0, 0, ratio * b * scale / norms_B)
    coefficients_A = torch.where(weights == 0, 0, a / ratio * scale / norms_A)
    B = first.combine(coefficients_B, overwrite)
    return B, second.combine(coefficients_A, overwrite)


class _Side:
    """The first or the second factors of all terms, as tensors ``[d]`` or ``[d, d]``.

    Matrices are multiplied and added a few rows at a time: copies would be several times as large
    as the result.
    """

    def __init__(self, factors: list[Factor], index: int, keep_diagonal: bool, traced: bool):
        self.name = f"{('first', 'second')[index]} factors"
        for factor in factors:
            _check_factor(factor, self.name)
        for what in ("shape", "dtype", "device"):
            values = list(dict.fromkeys(getattr(factor, what) for factor in factors))
            if len(values) > 1:
                raise ValueError(
                    f"The {self.name} must share their {what}, got {', '.join(map(str, values))}."
                )
        self.diagonal = keep_diagonal or not any(isinstance(f, Tensor) for f in factors)
        self.diagonals = [f.diagonal() for f in factors]
        #: The terms that are no diagonals, by their number.
        self.matrices = {
            k: factor
            for k, factor in enumerate(factors)
            if isinstance(factor, Tensor) and not self.diagonal
        }
        self.dtype, self.device = self.diagonals[0].dtype, self.diagonals[0].device
        self.traced = traced or torch.compiler.is_compiling()

    def gram(self, check_values: bool) -> tuple[Tensor, Tensor]:
        """Return the cosines ``[K, K]`` between factors and their norms ``[K]``, in float64."""
        # the largest entries of a semi-definite matrix are on its diagonal
        diagonals = torch.stack(self.diagonals)
        entries = _tensors.widened(diagonals).abs().amax(dim=1)
        units = torch.where(entries > 0, entries, 1)  # lest squares overflow
        gram = _products(diagonals, units)
        for i, row in zip(self.matrices, self._matrix_products(units), strict=True):
            for j, product in zip(self.matrices, row, strict=True):
                gram[i, j] = product
        norms = gram.diagonal().sqrt()
        lengths = torch.where(norms > 0, norms, 1)
        cosines = gram / lengths.outer(lengths)
        sizes = _double(entries) * norms
        if check_values:
            self._check_values(cosines, sizes)
        return cosines.clamp(min=0), sizes

    def _check_values(self, cosines: Tensor, norms: Tensor) -> None:
        """Raise if factors are not finite, or not positive semi-definite."""
        if not bool(cosines.isfinite().all() and norms.isfinite().all()):
            raise ValueError(
                f"The {self.name} have non-finite entries. Check what they were made from for NaN, "
                "infinities and overflow."
            )
        # rounding errors of low precision may turn 0 into a small negative number
        if bool((cosines < -max(1e-2, 10 * torch.finfo(self.dtype).eps)).any()):
            raise ValueError(
                f"The {self.name} are not all positive semi-definite, which they must be: two of "
                "them have a negative inner product."
            )

    def _matrix_products(self, units: Tensor) -> Tensor:
        """Return the inner products of the matrices, in units of their own."""
        matrices = self.matrices.values()
        products = _double(units.new_zeros(len(matrices), len(matrices)))
        units = units[list(self.matrices)]
        for start, stop in self._slices():
            rows = torch.stack([matrix[start:stop].flatten() for matrix in matrices])
            products = products + _products(rows, units)
        return products

    def combine(self, coefficients: Tensor, overwrite: bool) -> Factor:
        """Return the factors' linear combination, with coefficients ``[K]``."""
        like = _tensors.widened(self.diagonals[0])
        factors = coefficients.to(like.real.dtype).to(self.device)
        # entry by entry in the same order: symmetric matrices have a symmetric sum
        total = torch.zeros_like(like)
        for k, diagonal in enumerate(self.diagonals):
            if k not in self.matrices:
                total += factors[k] * diagonal.to(like.dtype)
        if not self.matrices:
            return DiagonalLinearOperator([total.to(self.dtype)])
        (first, matrix), *others = self.matrices.items()
        if overwrite and matrix.dtype == like.dtype:
            result = matrix.mul_(factors[first])
        else:
            result = factors[first] * matrix.to(like.dtype)
        for k, matrix in others:
            for start, stop in self._slices():
                result[start:stop] += factors[k] * matrix[start:stop].to(like.dtype)
        result.diagonal().add_(total)
        return result.to(self.dtype)

    def _slices(self) -> list[tuple[int, int]]:
        """Return which rows of matrices are multiplied at once."""
        d = len(self.diagonals[0]) if self.matrices else 0
        if self.traced:
            step = -(-d // 8)
        else:
            step = (2**16 if self.device.type == "cpu" else 2**22) // max(d, 1)
        step = max(step, 1)
        return [(start, min(start + step, d)) for start in range(0, d, step)]


def _products(rows: Tensor, units: Tensor) -> Tensor:
    """Return the inner products ``[K, K]`` of rows ``[K, N]`` in units, in float64."""
    rows = _tensors.widened(rows) / units.unsqueeze(-1)
    with torch.autocast(rows.device.type, enabled=False):
        return _double((rows.conj() @ rows.T).real)


def _check_factor(factor: Factor, name: str) -> None:
    """Raise if a factor is neither a square matrix of numbers nor a diagonal operator."""
    if isinstance(factor, DiagonalLinearOperator):
        return
    if not isinstance(factor, Tensor):
        raise ValueError(
            f"The {name} must be 2-d tensors or diagonal operators, got {type(factor).__name__}."
        )
    if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
        raise ValueError(f"The {name} must be square matrices, got shape {list(factor.shape)}.")
    _tensors.check_floating(factor, "A Kronecker product")


def _double(tensor: Tensor) -> Tensor:
    """Return real numbers in double precision: on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
