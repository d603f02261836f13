"""What every linear operator must do, checked against its dense matrix."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from curvlinops._torch_base import PyTorchLinearOperator
from curvlinops.testing._algebra import check_algebra
from curvlinops.testing._check import Check
from curvlinops.testing._closed_forms import FORMS, check_closed_forms
from curvlinops.testing._products import (
    check_adjoint,
    check_copies,
    check_determinism,
    check_errors,
    check_formats,
    check_linearity,
    check_products,
    check_saving,
    check_scipy,
    check_spaces,
    check_to_dense,
)

GROUPS = {
    "spaces": check_spaces,
    "determinism": check_determinism,
    "linearity": check_linearity,
    "products": check_products,
    "adjoint": check_adjoint,
    "formats": check_formats,
    "errors": check_errors,
    "to_dense": check_to_dense,
    "scipy": check_scipy,
    "copies": check_copies,
    "algebra": check_algebra,
    "closed forms": check_closed_forms,
    "saving": check_saving,
}
"""The properties, in the order in which they are checked."""


def check_operator(
    op: PyTorchLinearOperator,
    dense: Tensor | None = None,
    *,
    rtol: float | None = None,
    num_columns: int = 3,
    seed: int = 0,
    skip: Collection[str] = (),
) -> None:
    r"""Check that an operator does what every operator must do.

    Call it in the tests of a new operator, with a small instance (ten columns, say) and, if there
    is an independent way to compute it, its matrix. The parameters of a good test space have
    different sizes along every axis, so that swapped axes do not pass. The properties, by group:

    ========================  ===================================================================
    ``"spaces"``              shapes, ``SELF_ADJOINT``, ``device``, ``dtype``, ``repr``
    ``"determinism"``         two equal products; the global random generator, the input and the
                              memory of the input stay untouched; no gradients are recorded; also
                              inside of ``torch.inference_mode()``
    ``"linearity"``           :math:`A (s x + t y) = s A x + t A y`
    ``"products"``            vectors and matrices, with one column and without any
    ``"adjoint"``             :math:`\langle y, A x \rangle = \langle A^* y, x \rangle`, ``A.H``,
                              ``A.T`` (without conjugation), ``x @ A``, and ``SELF_ADJOINT``
    ``"formats"``             lists, tuples and dicts (where there are names), on both sides, are
                              returned as they are given
    ``"errors"``              inputs and operators of a wrong shape, name, dtype, device or type
    ``"to_dense"``            several chunk sizes
    ``"scipy"``               all four products of ``to_scipy()``, of real and complex vectors
    ``"copies"``              ``copy.deepcopy``, ``.to(dtype)``
    ``"algebra"``             multiples, sums, differences, products, powers, and their adjoints
    ``"closed forms"``        ``trace diagonal frobenius_norm slogdet inverse eigh sqrt power
                              inverse_sqrt pinv sample`` (``det`` and ``logdet`` with ``slogdet``;
                              ``pinv`` also of rectangular matrices): exact where they do not raise
                              ``NotImplementedError``, also of multiples, adjoints, shifts by
                              :math:`\delta I` and inverses; of a rectangular matrix an error that
                              is both a ``ValueError`` and a ``RuntimeError``
    ``"saving"``              ``torch.save`` and ``torch.load`` with its safe default and with
                              ``map_location``, for types that can be saved
    ========================  ===================================================================

    Nothing is printed, and no global random generator is used.

    Args:
        op: The operator.
        dense: Its matrix ``[rows, columns]``, best computed in another way and in float64 or
            complex128. Without it the matrix comes from ``op @ I``; the properties then still
            check each other.
        rtol: Largest error, relative to the size of a typical result. Default: 1e-9 for float64,
            1e-4 for float32, 2e-2 for float16, 5e-2 for bfloat16.
        num_columns: The number of columns of the matrices to multiply; at least 2.
        seed: Fixes the vectors to multiply.
        skip: Groups from the table, or single closed forms, to leave out.

    Raises:
        AssertionError: If a property does not hold. The message names the first such property and
            says by how much it fails.
        ValueError: If ``skip`` names no group, or arguments do not fit together.

    Example:
        >>> import torch
        >>> from curvlinops import PyTorchLinearOperator
        >>> from curvlinops.testing import check_operator
        >>> class Flip(PyTorchLinearOperator):
        ...     SELF_ADJOINT = True
        ...     def _matmat(self, X):
        ...         return [x.flip(0) for x in X]
        >>> check_operator(Flip([(4,)], [(4,)]), torch.eye(4).flip(0))
        >>> class Wrong(Flip):
        ...     def _matmat(self, X):
        ...         return [x.cumsum(0) for x in X]
        >>> check_operator(Wrong([(4,)], [(4,)]))
        Traceback (most recent call last):
        AssertionError: <4×4 operator Wrong>: adjoint: SELF_ADJOINT needs a Hermitian matrix: ...
    """
    unknown = sorted(set(skip) - set(GROUPS) - set(FORMS))
    if unknown:
        raise ValueError(f"Cannot skip {unknown}: choose from {[*GROUPS, *FORMS]}.")
    if num_columns < 2:
        raise ValueError(f"num_columns must be at least 2, got {num_columns}.")
    check = Check(op, dense, rtol, num_columns, seed, frozenset(skip))
    for group, function in GROUPS.items():
        if group not in skip:
            check.group = group
            function(check)
