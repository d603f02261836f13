"""The Hessian of an empirical risk."""

from __future__ import annotations

from torch import Tensor
from torch.func import grad

from curvlinops._formats import Columns
from curvlinops.curvature import RiskLinearOperator, stack_columns, unstack_columns, vjp
from curvlinops.risk import Batch, Loss


class HessianLinearOperator(RiskLinearOperator):
    r"""The Hessian of the empirical risk.

    .. math::
        H = \nabla_\theta^2 L(\theta) = c \sum_m \nabla_\theta^2 \ell_m

    It is symmetric, and in general indefinite. Products are exact, by differentiating the gradient
    once more in reverse mode (Pearlmutter, 1994, "Fast exact multiplication by the Hessian"). The
    loss may be any module or function of (prediction, target) with a ``reduction``.

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

    def _multiply_batch(self, batch: Batch, X: Columns) -> tuple[Columns, Tensor | float]:
        risk, params = self.risk, self._theta
        loss: Loss = risk.loss  # type: ignore[assignment]
        risk.inspect(batch)

        def value(theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            f = risk.predict(theta, batch.X)
            return loss.value(*loss.terms(f, batch.y), batch.n), f

        # differentiate the gradient; its graph serves all columns
        _, multiply, f = vjp(grad(value, has_aux=True), params, has_aux=True)
        products = [multiply(column)[0] for column in unstack_columns(params, X)]
        return stack_columns(products), loss.normalizer(*loss.terms(f, batch.y), batch.n)
