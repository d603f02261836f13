"""Some singular values and vectors of an operator."""

from __future__ import annotations

from typing import Any, Literal, overload
from warnings import warn

import torch
from torch import Tensor

from curvlinops._operator import PyTorchLinearOperator
from curvlinops._scalars import as_integer
from curvlinops._tensors import widened
from curvlinops.solvers._arguments import check_operator
from curvlinops.solvers._lanczos import own_dtype
from curvlinops.solvers.eigsh import account, eigenpairs


@overload
def svds(
    A: PyTorchLinearOperator,
    k: int = ...,
    which: str = ...,
    *,
    ncv: int | None = ...,
    max_iter: int | None = ...,
    tolerance: float = ...,
    v0: Any = ...,
    generator: torch.Generator | None = ...,
    return_singular_vectors: Literal[True] = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def svds(
    A: PyTorchLinearOperator,
    k: int = ...,
    which: str = ...,
    *,
    ncv: int | None = ...,
    max_iter: int | None = ...,
    tolerance: float = ...,
    v0: Any = ...,
    generator: torch.Generator | None = ...,
    return_singular_vectors: Literal[False],
) -> Tensor: ...


def svds(
    A: PyTorchLinearOperator,
    k: int = 6,
    which: str = "LM",
    *,
    ncv: int | None = None,
    max_iter: int | None = None,
    tolerance: float = 0.0,
    v0: Any = None,
    generator: torch.Generator | None = None,
    return_singular_vectors: bool = True,
) -> tuple[Tensor, Tensor, Tensor] | Tensor:
    r"""Compute k singular values and vectors of any operator, on its device.

    .. math::
        A v_i = \sigma_i u_i, \qquad A^H u_i = \sigma_i v_i

    The arguments are those of SciPy's ``svds``. Eigenvectors of the smaller one of the Gramians
    :math:`A^H A` and :math:`A A^H` are computed as in :func:`~curvlinops.eigsh`; each product with
    it is one with A and one with its adjoint. Then A multiplies their k vectors once more, and the
    singular value decomposition of the result gives the triplets.

    The Gramian has squared singular values, with rounding errors of :math:`\epsilon \sigma_1^2`.
    Directions whose singular values are below :math:`\sqrt\epsilon\, \sigma_1` are therefore mixed
    (1e-8 of the largest in float64, 3e-4 in float32). All that are larger have errors of
    :math:`\epsilon \sigma_1`, due to the last step: squares are never subject to a root. Of smaller
    ones only that they are small is to be trusted, unless the operator has no larger ones than
    those that are asked for. Both sets of vectors are orthonormal up to rounding in any case, those
    of singular values 0, too.

    bfloat16 and float16 operators multiply in their own dtype, but the iteration is in float32.
    Gradients are not recorded.

    Args:
        A: Operator with M rows and N columns, with an adjoint.
        k: The number of triplets, from 1 to ``min(M, N) - 1``.
        which: ``"LM"``, the largest singular values; or ``"SM"``, the smallest ones (slow, as there
            are no solves with A).
        ncv: The number of Lanczos vectors, ``k < ncv <= min(M, N)``. Default:
            ``min(M, N, max(2k + 1, 20))``.
        max_iter: The largest number of restarts, plus one. Default: ``10 * min(M, N)``.
        tolerance: Bound on :math:`\lVert A^H u - \sigma v \rVert` relative to :math:`\sigma` (for
            M < N the same with A and its adjoint interchanged). Default: 0, which stands for
            machine precision.
        v0: Where to start: a vector of the space of the smaller Gramian (the input space for
            ``M >= N``, else the output space), in any format. Default: normal numbers.
        generator: Random numbers for it. Default: PyTorch's global generator of A's device.
        return_singular_vectors: Whether to return singular vectors, too.

    Returns:
        U ``[M, k]``, the singular values ``[k]``, ascending as in SciPy, and Vᴴ ``[k, N]``, in the
        precision and on the device of A; or the singular values only.

    Raises:
        ValueError: If k is not between 1 and ``min(M, N) - 1``, for an unknown ``which``, if
            products are not finite, and if a number is out of range.
        TypeError: If A is no operator.

    Warns:
        UserWarning: Once, if some triplets have not converged. The residual norms in the text are
            those of eigenpairs of the Gramian.

    Example:
        >>> import torch
        >>> from curvlinops import TensorLinearOperator, svds
        >>> matrix = torch.zeros(40, 30)
        >>> matrix[range(30), range(30)] = torch.arange(30.0)
        >>> U, s, Vh = svds(TensorLinearOperator(matrix), k=2)
        >>> print(s.round(decimals=3))
        tensor([28., 29.])
        >>> U.shape, Vh.shape
        (torch.Size([40, 2]), torch.Size([2, 30]))
    """
    check_operator(A)
    smaller = min(A.shape)
    k = as_integer("k", k, least=1)
    if k >= smaller:
        raise ValueError(
            f"svds computes fewer than all {smaller} singular values, got k = {k}: use "
            "torch.linalg.svd(A.to_dense())."
        )
    if which not in ("LM", "SM"):
        raise ValueError(f"Unknown which = {which!r}: choose 'LM' or 'SM'.")
    wide = A.shape[0] < A.shape[1]
    B = A.adjoint() if wide else A  # more rows than columns
    pairs = eigenpairs(
        B.adjoint() @ B,
        k,
        which,
        ncv=ncv,
        max_iter=max_iter,
        tolerance=tolerance,
        v0=v0,
        generator=generator,
        return_vectors=True,
    )
    if not bool(pairs.converged.all()):
        warn(account("svds", pairs, tolerance), stacklevel=2)
    dtype = own_dtype(A)
    with torch.no_grad():
        assert pairs.rows is not None  # they were asked for
        right = pairs.rows.T  # [columns of B, k]
        left, values, rotation = torch.linalg.svd(widened(B @ right.to(dtype)), full_matrices=False)
        values = values.flip(0).to(dtype.to_real())
        if not return_singular_vectors:
            return values
        left, right = left.flip(1).to(dtype), (right @ rotation.mH).flip(1).to(dtype)
        if wide:
            left, right = right, left
        return left, values, right.mH
