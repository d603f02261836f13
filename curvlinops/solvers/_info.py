"""What an iterative solver did: the result object that all solvers share, and its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONVERGED = "converged"
_MAX_LISTED = 5  # columns that a text lists before it abbreviates


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class SolverInfo:
    """What happened in a solve with K right-hand sides (K = 1 for a vector).

    All tensors are on the CPU.

    Attributes:
        iterations: How many steps each column took, int64 ``[K]``.
        residual_norms: Each column's norm of the residual relative to that of its right-hand
            side, float64 ``[K]``; 0 for a right-hand side of zeros. It is the number that the
            solver stops by; solvers update it from step to step, so that it drifts from the
            residual of the returned solution by rounding.
        converged: Whether each column reached the tolerance, bool ``[K]``.
        reason: ``"converged"`` if all columns did; otherwise which did not, and why. Solvers warn
            with the same text.
        history: The largest of the columns' ``residual_norms`` at the start and after each
            iteration; columns that have stopped count with their last value.

    Example:
        >>> import torch
        >>> from curvlinops import TensorLinearOperator
        >>> from curvlinops.solvers import cg
        >>> A = TensorLinearOperator(torch.tensor([[3.0, 1.0], [1.0, 2.0]]))
        >>> x, info = cg(A, torch.tensor([1.0, 1.0]))
        >>> info.iterations, info.reason
        (tensor([2]), 'converged')
        >>> len(info.history)
        3
    """

    iterations: Tensor
    residual_norms: Tensor
    converged: Tensor
    reason: str
    history: list[float]


def make_info(
    solver: str,
    tolerance: float,
    iterations: Tensor,
    residual_norms: Tensor,
    reasons: Sequence[str],
    history: list[float],
) -> SolverInfo:
    """Return a solver's info from each column's reason to stop, ``CONVERGED`` among them."""
    converged = torch.tensor([reason == CONVERGED for reason in reasons], dtype=torch.bool)
    failures = []
    for reason in dict.fromkeys(r for r in reasons if r != CONVERGED):
        columns = [column for column, other in enumerate(reasons) if other == reason]
        residual = residual_norms[columns].max().item()
        where = f"{_list_columns(columns)} of {len(reasons)}: " if len(reasons) > 1 else ""
        failures.append(f"{where}{reason} (relative residual {residual:.1e})")
    text = CONVERGED
    if failures:
        text = f"{solver} did not reach the tolerance {tolerance:g}. {'; '.join(failures)}."
    return SolverInfo(iterations, residual_norms, converged, text, history)


def _list_columns(columns: list[int]) -> str:
    """Return column numbers as text."""
    numbers = ", ".join(map(str, columns[:_MAX_LISTED]))
    more = ", …" if len(columns) > _MAX_LISTED else ""
    return f"{len(columns)} column{'s' * (len(columns) > 1)} ({numbers}{more})"
