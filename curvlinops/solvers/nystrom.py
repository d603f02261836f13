"""Randomised low-rank approximation of positive semi-definite operators."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops._operator import PyTorchLinearOperator
from curvlinops._scalars import as_integer, as_scalar
from curvlinops._tensors import CHECK_ORIGIN, widened
from curvlinops.low_rank import LowRankLinearOperator
from curvlinops.solvers._arguments import check_square
from curvlinops.solvers._lanczos import normal, own_dtype

_ATTEMPTS = 3  # of the Cholesky factorisation, each with a shift 100 times larger


def nystrom(
    A: PyTorchLinearOperator,
    rank: int,
    *,
    generator: torch.Generator | None = None,
    shift: float | str = "auto",
) -> LowRankLinearOperator:
    r"""Approximate a positive semi-definite operator by one of low rank, from random products.

    .. math::
        A \approx (A \Omega) (\Omega^H A \Omega)^{+} (A \Omega)^H
        = U \operatorname{diag}(\hat\lambda) U^H, \qquad \Omega \in \mathbb{R}^{D \times r}

    with an orthonormal basis :math:`\Omega` of random normal vectors. The approximation is never
    larger than A, up to rounding (:math:`A - \hat A` is positive semi-definite), and exact if the
    rank of A is at most r. It takes one product with r columns. The stable form is that of

    - Frangella, Z., Tropp, J. A. & Udell, M. (2023). Randomized Nyström preconditioning. SIAM
      Journal on Matrix Analysis and Applications, 44(2), 718-752 (algorithm 2.1):

    a multiple of the identity is added to A for the Cholesky factorisation, and subtracted from the
    eigenvalues.

    ``nystrom(A, rank).inverse(damping)`` is a preconditioner of :func:`~curvlinops.cg` for the
    operator ``A + damping * I``, whose condition number becomes about that of a matrix with only
    the eigenvalues of A that follow the first r ones.

    bfloat16 and float16 operators multiply in their own dtype; the rest is in float32.

    Args:
        A: Hermitian positive semi-definite operator on any space, of dimension D.
        rank: The number r of columns, from 1 to D.
        generator: Random numbers. Default: PyTorch's global generator of A's device.
        shift: The multiple of the identity. Default: ``sqrt(D)`` machine epsilons of the norm of
            :math:`A \Omega`; it grows if the factorisation fails.

    Returns:
        The approximation, with ``eigenvalues`` ``[r]``, descending, and orthonormal
        ``eigenvectors`` ``[D, r]``. Its inverse, powers, trace and determinant have closed forms.

    Raises:
        ValueError: If A does not map a space to itself, is not positive semi-definite as far as its
            products tell, or not finite; if rank or shift are out of range.
        TypeError: If A is no operator.

    Example:
        >>> import torch
        >>> from curvlinops import DiagonalLinearOperator, cg
        >>> from curvlinops.solvers import nystrom
        >>> A = DiagonalLinearOperator([torch.arange(1.0, 101.0) ** -2])
        >>> approximation = nystrom(A, 20, generator=torch.Generator().manual_seed(0))
        >>> damped, b = A + 1e-3 * A**0, torch.ones(100)
        >>> _, plain = cg(damped, b)
        >>> _, info = cg(damped, b, preconditioner=approximation.inverse(1e-3))
        >>> bool(info.iterations < plain.iterations)
        True
    """
    check_square("nystrom", A)
    dim, dtype = A.shape[1], own_dtype(A)
    rank = as_integer("rank", rank, least=1)
    if rank > dim:
        raise ValueError(f"rank must be at most the dimension {dim}, got {rank}.")
    automatic = isinstance(shift, str) and shift == "auto"
    given = None if automatic or isinstance(shift, complex) else as_scalar(shift)
    if not automatic and (given is None or not 0 < float(given) < torch.inf):  # type: ignore[arg-type]
        raise ValueError(f"shift must be 'auto' or a positive number, got {shift!r}.")
    with torch.no_grad():
        omega = torch.linalg.qr(normal(A, rank, generator).T).Q.to(dtype)  # [D, r]
        product, omega = widened(A @ omega), widened(omega)
        if not bool(product.isfinite().all()):
            raise ValueError(f"The products of {A!r} are not finite. {CHECK_ORIGIN}")
        norm = torch.linalg.matrix_norm(product)
        if norm == 0:
            values, vectors = product.new_zeros(rank).real, omega
        else:
            eps = torch.finfo(dtype).eps
            first = dim**0.5 * eps * norm if given is None else given * torch.ones_like(norm)
            values, vectors = _decompose(A, omega, product, first)
    return LowRankLinearOperator(values.to(dtype.to_real()), vectors.to(dtype), A.in_shape)


def _decompose(
    A: PyTorchLinearOperator, omega: Tensor, product: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[r]`` and eigenvectors ``[D, r]`` from Ω and A Ω, both ``[D, r]``."""
    for _ in range(_ATTEMPTS):
        shifted = product + shift * omega
        core = omega.mH @ shifted
        factor, info = torch.linalg.cholesky_ex((core + core.mH) / 2)  # lower
        if info == 0:
            root = torch.linalg.solve_triangular(factor.mH, shifted, upper=True, left=False)
            vectors, singular, _ = torch.linalg.svd(root, full_matrices=False)
            return (singular**2 - shift).clamp(min=0), vectors
        shift = 100 * shift
    smallest = torch.linalg.eigvalsh((core + core.mH) / 2)[0].item()
    raise ValueError(
        f"{A!r} is not positive semi-definite: xᴴ A x is {smallest:.1e} for some unit vector x "
        "from a random subspace. If this is rounding, pass a larger shift."
    )
