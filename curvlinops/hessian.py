"""The Hessian of an empirical risk."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from curvlinops._formats import Columns
from curvlinops.curvature import RiskLinearOperator
from curvlinops.kept_graphs import KeptGraph
from curvlinops.risk import Batch
from curvlinops.risk.data import TermCounter


class HessianLinearOperator(RiskLinearOperator):
    r"""The Hessian of the empirical risk.

    .. math::
        H = \nabla_\theta^2 L(\theta) = c \sum_m \nabla_\theta^2 \ell_m

    It is symmetric, and in general indefinite. Products are exact, by differentiating the gradient
    once more, or the directional derivative, whichever is cheaper (Pearlmutter, 1994, "Fast exact
    multiplication by the Hessian"). The loss may be any module or function of (prediction, target)
    with a ``reduction``.

    Arguments and errors: see :class:`~curvlinops.CurvatureLinearOperator`.

    Example:
        >>> import torch
        >>> from curvlinops import HessianLinearOperator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> params = dict(model.named_parameters())
        >>> H = HessianLinearOperator(model, torch.nn.MSELoss(reduction="sum"), params, data)
        >>> H @ torch.tensor([1.0, 2.0])
        tensor([2., 4.])
    """

    @property
    def _uses_forward_mode(self) -> bool:
        return False

    def _multiply_batch(
        self, batch: Batch, X: Columns, counter: TermCounter, recording: bool
    ) -> tuple[Columns, Tensor | float]:
        products, f = self._differentiator.hessian(
            partial(self._terms, batch),
            self._theta,
            X,
            partial(self._gradient, batch),
            recording,
        )
        return products, self._normalizer(batch, f)

    def _keep_batch(self, batch: Batch, counter: TermCounter) -> KeptGraph | None:
        multiply, f = self._differentiator.kept_hessian(
            partial(self._terms, batch), self._theta, partial(self._gradient, batch)
        )
        return KeptGraph(multiply, self._normalizer(batch, f), num_terms=0)

    def _gradient(self, batch: Batch, F: Tensor, f: Tensor) -> Tensor:
        """Return the gradient of the batch's loss with respect to predictions."""
        # In closed form: autodiff would keep more for the derivative.
        loss = self._loss
        _, targets = loss.terms(f, batch.y)
        if loss.closed_form:
            return loss.grad(F, targets)
        return self._differentiator.gradient_of(lambda F: loss.value(F, targets, batch.n), F)
