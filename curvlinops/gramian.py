"""What curvature matrices of the form Jᵀ M J have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvlinops._formats import Columns
from curvlinops.curvature import RiskLinearOperator
from curvlinops.kept_graphs import KeptGraph
from curvlinops.linearization import Function, Theta
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

    def _prediction(self, batch: Batch) -> Function:
        """Return the function from parameters to predictions of loss terms, and raw ones."""
        risk, loss = self.risk, self._loss

        def predict(theta: Theta) -> tuple[Tensor, Tensor]:
            f = risk.predict(theta, batch.X, any_derivative=True)
            return loss.terms(f, batch.y)[0], f

        return predict

    def _multiply_batch(
        self, batch: Batch, X: Columns, counter: TermCounter, recording: bool
    ) -> tuple[Columns, Tensor | float]:
        first_term = counter.position

        def middle(F: Tensor, f: Tensor) -> Multiply:
            _, targets = self._loss.terms(f, batch.y)
            return self._term_curvature(F, targets, batch.n, first_term)

        products, F, f = self._differentiator.gramian(
            self._prediction(batch), self._theta, X, middle, recording
        )
        counter.advance(F.shape[0])
        _, targets = self._loss.terms(f, batch.y)
        return products, self._loss.normalizer(F, targets, batch.n)

    def _keep_batch(self, batch: Batch, counter: TermCounter) -> KeptGraph | None:
        if not self._differentiator.keeping_pays:
            return None
        F, f, push, pull = self._differentiator.kept_gramian(self._prediction(batch), self._theta)
        num_terms = F.shape[0]
        _, targets = self._loss.terms(f.detach(), batch.y)
        curvature = self._term_curvature(F, targets, batch.n, counter.advance(num_terms))

        def multiply(v: Theta) -> Columns:
            return pull(curvature(push(v)))

        return KeptGraph(multiply, self._loss.normalizer(F, targets, batch.n), num_terms)


def generic_hess_vec(value: Callable[[Tensor], Tensor], F: Tensor) -> Multiply:
    """Return the multiplication by the Hessian of a function of predictions, by autodiff."""
    gradient: Callable[[Tensor], Tensor] = torch.func.grad(value)
    pull: Any = torch.func.vjp(gradient, F)[1]
    return lambda V: pull(V)[0]
