"""What curvature matrices of the form Jᵀ M J have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from curvlinops._formats import Columns
from curvlinops.curvature import RiskLinearOperator
from curvlinops.kept_graphs import KeptGraph
from curvlinops.risk import Batch
from curvlinops.risk.data import TermCounter

#: Multiplies a tensor of predictions' shape, ``[m, C]``.
Multiply = Callable[[Tensor], Tensor]


class GramianLinearOperator(RiskLinearOperator):
    r"""Base of :math:`c \sum_m J_m^\top M_m J_m`, with a matrix :math:`M_m` for each loss term.

    A subclass implements :meth:`_term_curvature`. Arguments as its base class.
    """

    def _term_curvature(self, F: Tensor, targets: Any, n: int, first_term: int) -> Multiply:
        """Return the multiplication of ``[m, C]`` by M.

        Args:
            F: Predictions of the batch's loss terms ``[m, C]``.
            targets: Their targets.
            n: Number of examples in the batch.
            first_term: Index of the first loss term in the data.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement _term_curvature.")

    def _multiply_batch(
        self, batch: Batch, X: Columns, counter: TermCounter, recording: bool
    ) -> tuple[Columns, Tensor | float]:
        middle = partial(self._middle, batch, counter.position)
        products, F, f = self._differentiator.gramian(
            partial(self._terms, batch), self._theta, X, middle, recording
        )
        counter.advance(F.shape[0])
        return products, self._normalizer(batch, f)

    def _keep_batch(self, batch: Batch, counter: TermCounter) -> KeptGraph | None:
        multiply, F, f = self._differentiator.kept_gramian(
            partial(self._terms, batch),
            self._theta,
            partial(self._middle, batch, counter.position),
        )
        counter.advance(F.shape[0])
        return KeptGraph(multiply, self._normalizer(batch, f), F.shape[0])

    def _middle(self, batch: Batch, first_term: int, F: Tensor, f: Tensor) -> Multiply:
        """Return the multiplication by M for a batch."""
        _, targets = self._loss.terms(f, batch.y)
        return self._term_curvature(F, targets, batch.n, first_term)
