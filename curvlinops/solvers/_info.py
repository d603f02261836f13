"""What an iterative solver did: the result object that all solvers share, and its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from warnings import warn

from torch import Tensor

CONVERGED = "converged"
_MAX_LISTED = 5  # columns that a text lists before it abbreviates


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class SolverInfo:
    r"""What happened in a solve with K right-hand sides (K = 1 for a vector).

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
        reasons: Why each column stopped: a sentence, or ``"converged"``.
        normal_residual_norms: Of solvers that find least-squares solutions, each column's
            :math:`\lVert A^H r \rVert / (\lVert A \rVert \lVert r \rVert)` as they last
            estimated it, float64 ``[K]``; 0 at a least-squares solution. None of other solvers.

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
    reasons: list[str]
    normal_residual_norms: Tensor | None = None


def make_info(
    solver: str,
    goal: str,
    iterations: Tensor,
    residual_norms: Tensor,
    converged: Tensor,
    reasons: Sequence[str],
    history: list[float],
    normal_residual_norms: Tensor | None = None,
) -> SolverInfo:
    """Return a solver's info from each column's reason to stop, and whether that is a success."""
    failures = []
    failed = [column for column, success in enumerate(converged.tolist()) if not success]
    for reason in dict.fromkeys(reasons[column] for column in failed):
        columns = [column for column in failed if reasons[column] == reason]
        where = f"{_list_columns(columns)} of {len(reasons)}: " if len(reasons) > 1 else ""
        numbers = f"relative residual {residual_norms[columns].max().item():.1e}"
        if normal_residual_norms is not None:
            numbers += f", of the normal equations {normal_residual_norms[columns].max():.1e}"
        failures.append(f"{where}{reason} ({numbers})")
    text = CONVERGED
    if failures:
        text = f"{solver} did not reach {goal}. {'; '.join(failures)}."
    return SolverInfo(
        iterations, residual_norms, converged, text, history, list(reasons), normal_residual_norms
    )


def warn_of(info: SolverInfo, stacklevel: int) -> None:
    """Warn with the text of the info, unless all columns have converged."""
    if info.reason != CONVERGED:
        warn(info.reason, stacklevel=stacklevel + 1)


def _list_columns(columns: list[int]) -> str:
    """Return column numbers as text."""
    numbers = ", ".join(map(str, columns[:_MAX_LISTED]))
    more = ", …" if len(columns) > _MAX_LISTED else ""
    return f"{len(columns)} column{'s' * (len(columns) > 1)} ({numbers}{more})"
