"""The Hessian of an empirical risk."""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops._formats import Columns
from curvlinops.curvature import RiskLinearOperator
from curvlinops.kept_graphs import KeptGraph
from curvlinops.linearization import Function, Theta
from curvlinops.risk import Batch
from curvlinops.risk.data import TermCounter


class HessianLinearOperator(RiskLinearOperator):
    r"""The Hessian of the empirical risk.

    .. math::
        H = \nabla_\theta^2 L(\theta) = c \sum_m \nabla_\theta^2 \ell_m

    It is symmetric, and in general indefinite. Products are exact, by differentiating the gradient
    once more (Pearlmutter, 1994, "Fast exact multiplication by the Hessian"), in reverse mode, or
    in forward mode where that is cheaper. The loss may be any module or function of (prediction,
    target) with a ``reduction``.

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

    def _gradient(self, batch: Batch) -> Function:
        """Return the function from parameters to the gradient, and raw predictions."""
        risk, loss, vjp = self.risk, self._loss, self._differentiator.vjp

        def predict(theta: Theta) -> tuple[Tensor, Tensor]:
            f = risk.predict(theta, batch.X, any_derivative=True)
            return loss.terms(f, batch.y)[0], f

        def value(theta: Theta) -> tuple[Tensor, Tensor]:
            F, f = predict(theta)
            return loss.value(F, loss.terms(f, batch.y)[1], batch.n), f

        def gradient(theta: Theta) -> tuple[Theta, Tensor]:
            # The loss's gradient in closed form: autodiff would keep more for its derivative.
            y, pull, f = vjp(predict if loss.closed_form else value, theta)
            _, targets = loss.terms(f, batch.y)
            cotangent = loss.grad(y, targets) if loss.closed_form else torch.ones_like(y)
            (g,) = pull(cotangent, retain_graph=torch.is_grad_enabled())
            return g, f

        return gradient

    def _multiply_batch(
        self, batch: Batch, X: Columns, counter: TermCounter, recording: bool
    ) -> tuple[Columns, Tensor | float]:
        products, f = self._differentiator.second(self._gradient(batch), self._theta, X, recording)
        return products, self._normalizer(batch, f)

    def _keep_batch(self, batch: Batch, counter: TermCounter) -> KeptGraph | None:
        multiply, f = self._differentiator.kept_second(self._gradient(batch), self._theta)
        return KeptGraph(multiply, self._normalizer(batch, f), 0)

    def _normalizer(self, batch: Batch, f: Tensor) -> Tensor | float:
        """Return the batch's normalizer of the loss."""
        return self._loss.normalizer(*self._loss.terms(f.detach(), batch.y), batch.n)
