"""Some eigenpairs of a Hermitian operator."""

from __future__ import annotations

from typing import Any, Literal, overload
from warnings import warn

import torch
from torch import Tensor

from curvlinops._operator import PyTorchLinearOperator
from curvlinops._scalars import as_integer
from curvlinops.solvers._arguments import as_bound, check_square
from curvlinops.solvers._lanczos import (
    WHICH,
    Eigenpairs,
    dense_eigenpairs,
    own_dtype,
    relative_criterion,
    restarted_lanczos,
    start_vector,
)

_MAX_LISTED = 5  # pairs that a warning lists before it abbreviates


@overload
def eigsh(
    A: PyTorchLinearOperator,
    k: int = ...,
    which: str = ...,
    *,
    ncv: int | None = ...,
    max_iter: int | None = ...,
    tolerance: float = ...,
    v0: Any = ...,
    generator: torch.Generator | None = ...,
    return_eigenvectors: Literal[True] = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def eigsh(
    A: PyTorchLinearOperator,
    k: int = ...,
    which: str = ...,
    *,
    ncv: int | None = ...,
    max_iter: int | None = ...,
    tolerance: float = ...,
    v0: Any = ...,
    generator: torch.Generator | None = ...,
    return_eigenvectors: Literal[False],
) -> Tensor: ...


def eigsh(
    A: PyTorchLinearOperator,
    k: int = 6,
    which: str = "LM",
    *,
    ncv: int | None = None,
    max_iter: int | None = None,
    tolerance: float = 0.0,
    v0: Any = None,
    generator: torch.Generator | None = None,
    return_eigenvectors: bool = True,
) -> tuple[Tensor, Tensor] | Tensor:
    r"""Compute k eigenvalues and eigenvectors of a Hermitian operator, on its device.

    .. math::
        A x_i = \lambda_i x_i, \qquad x_i^H x_j = \delta_{ij}

    The arguments are those of SciPy's ``eigsh``, and so is the number of products, but everything
    is computed in PyTorch on A's device. The method is

    - Wu, K. & Simon, H. (2000). Thick-restart Lanczos method for large symmetric eigenvalue
      problems. SIAM Journal on Matrix Analysis and Applications, 22(2), 602-616.

    with full reorthogonalisation. It holds ``ncv + 1`` vectors, and up to ``ncv`` more at a
    restart. A pair counts as converged once the norm of :math:`A x - \lambda x` is at most
    ``tolerance`` times :math:`|\lambda|`, or 4 machine epsilons times :math:`\lVert A \rVert`,
    below which rounding does not get. Errors of eigenvalues are smaller than this norm; those of
    eigenvectors are about the norm divided by the distance to the next eigenvalue.

    The copies of a multiple eigenvalue appear one after another through rounding, as in SciPy: with
    a tolerance far above the machine epsilon, or if there are many copies, some may be missed, and
    other eigenvalues are returned in their place. Where the Krylov space ends in an invariant
    subspace (as for multiples of the identity, and operators of low rank) the search goes on from a
    random vector, and finds them.

    bfloat16 and float16 operators multiply in their own dtype, but the iteration is in float32.
    Gradients are not recorded.

    Args:
        A: Hermitian operator of dimension D; this is trusted.
        k: The number of eigenpairs, from 1 to D - 1.
        which: Which eigenvalues: ``"LM"``, the largest in magnitude; ``"SM"``, the smallest in
            magnitude (slow, as there are no solves with A); ``"LA"``, the largest; ``"SA"``, the
            smallest; ``"BE"``, half of them from each end, and the odd one from the upper end.
        ncv: The number of Lanczos vectors, ``k < ncv <= D``. Default: ``min(D, max(2k + 1, 20))``.
            If it is D, the matrix is formed with D products and decomposed instead, which is exact.
        max_iter: The largest number of restarts, plus one. Default: ``10 * D``.
        tolerance: Relative accuracy, see above. Default: 0, which stands for machine precision.
        v0: Where to start: a vector in any format that A multiplies. Default: normal numbers.
        generator: Random numbers for it. Default: PyTorch's global generator of A's device.
        return_eigenvectors: Whether to return eigenvectors, too.

    Returns:
        The eigenvalues ``[k]``, ascending, real, and eigenvectors as flat columns ``[D, k]``, in
        the precision and on the device of A; or the eigenvalues only. Those that have not converged
        are the best approximations so far.

    Raises:
        ValueError: If A does not map a space to itself, if its products are not finite, for an
            unknown ``which``, and if a number is out of range.
        TypeError: If A is no operator, or if ``k >= D``, as in SciPy: use ``A.to_dense()`` and
            ``torch.linalg.eigh``.

    Warns:
        UserWarning: Once, if some pairs have not converged, with their places and residual norms.

    Example:
        >>> import torch
        >>> from curvlinops import DiagonalLinearOperator, eigsh
        >>> A = DiagonalLinearOperator([torch.arange(100.0), torch.tensor([-200.0])])
        >>> values, vectors = eigsh(A, k=3)
        >>> print(values.round(decimals=3))
        tensor([-200.,   98.,   99.])
        >>> torch.allclose(A @ vectors, vectors * values, atol=1e-3)
        True
    """
    check_square("eigsh", A)
    pairs = eigenpairs(
        A,
        k,
        which,
        ncv=ncv,
        max_iter=max_iter,
        tolerance=tolerance,
        v0=v0,
        generator=generator,
        return_vectors=return_eigenvectors,
    )
    if not bool(pairs.converged.all()):
        warn(account("eigsh", pairs, tolerance), stacklevel=2)
    dtype = own_dtype(A)
    values = pairs.values.to(dtype=dtype.to_real(), device=A.device)
    if pairs.rows is None:
        return values
    return values.to(pairs.rows.device), pairs.rows.T.contiguous().to(dtype)


def eigenpairs(
    A: PyTorchLinearOperator,
    k: int,
    which: str,
    *,
    ncv: int | None,
    max_iter: int | None,
    tolerance: float,
    v0: Any,
    generator: torch.Generator | None,
    return_vectors: bool,
) -> Eigenpairs:
    """Check the arguments, and compute eigenpairs by Lanczos or from the dense matrix."""
    dim = A.shape[1]
    k = as_integer("k", k, least=1)
    if k >= dim:
        raise TypeError(
            f"eigsh computes fewer than all {dim} eigenpairs, got k = {k}: use "
            "torch.linalg.eigh(A.to_dense())."
        )
    if which not in WHICH:
        raise ValueError(f"Unknown which = {which!r}: choose from {[*WHICH]}.")
    ncv = min(dim, max(2 * k + 1, 20)) if ncv is None else as_integer("ncv", ncv, least=1)
    if not k < ncv <= dim:
        raise ValueError(f"ncv must satisfy k < ncv <= D, got {ncv} with k = {k} and D = {dim}.")
    max_iter = 10 * dim if max_iter is None else as_integer("max_iter", max_iter, least=1)
    tolerance = as_bound("tolerance", tolerance)
    with torch.no_grad():
        start = start_vector(A, v0, generator)
        if ncv == dim:
            return dense_eigenpairs(A, k, which, return_vectors)
        return restarted_lanczos(
            A,
            k,
            which,
            ncv=ncv,
            start=start,
            max_iter=max_iter,
            criterion=relative_criterion(tolerance, torch.finfo(start.dtype).eps),
            generator=generator,
            return_vectors=return_vectors,
        )


def account(name: str, pairs: Eigenpairs, tolerance: float) -> str:
    """Return the text of the warning that some pairs have not converged."""
    failed = (~pairs.converged).nonzero().flatten().tolist()
    norms = pairs.residual_norms[failed]
    listed = ", ".join(map(str, failed[:_MAX_LISTED])) + (
        ", …" if len(failed) > _MAX_LISTED else ""
    )
    return (
        f"{name} did not reach the tolerance {tolerance:g} after {pairs.products} products: "
        f"{len(failed)} of {len(pairs.values)} eigenpairs ({listed}) have residual norms up to "
        f"{norms.max().item():.1e}. Increase max_iter, ncv or the tolerance."
    )
