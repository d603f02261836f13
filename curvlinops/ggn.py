"""The generalized Gauss-Newton matrix of an empirical risk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from curvlinops._formats import Columns
from curvlinops.curvature import RiskLinearOperator, jvp, stack_columns, unstack_columns, vjp
from curvlinops.risk import Batch, Loss

Predict = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
Linearized = Iterator[tuple[Tensor, Tensor, Tensor, Callable[[Tensor], tuple[dict[str, Tensor]]]]]
Linearize = Callable[[Predict, dict[str, Tensor], list[dict[str, Tensor]]], Linearized]


class GGNLinearOperator(RiskLinearOperator):
    r"""The generalized Gauss-Newton matrix of the empirical risk.

    .. math::
        G = c \sum_m J_m^\top \left( \nabla_f^2 \ell_m \right) J_m

    with the Jacobian :math:`J_m` of loss term :math:`m`'s prediction vector with respect to the
    parameters (Schraudolph, 2002, "Fast curvature matrix-vector products for second-order gradient
    descent"). It is symmetric, positive semi-definite for convex losses, and equals the Hessian
    where the model is linear in its parameters; for the negative log-likelihoods
    ``CrossEntropyLoss``, ``BCEWithLogitsLoss`` and ``MSELoss`` it is the Fisher information.

    Arguments and errors: see :class:`~curvlinops.CurvatureLinearOperator`.

    Example:
        >>> import torch
        >>> from curvlinops import GGNLinearOperator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> params = dict(model.named_parameters())
        >>> G = GGNLinearOperator(model, torch.nn.MSELoss(reduction="mean"), params, data)
        >>> G @ {"weight": torch.tensor([[1.0, 2.0]])}
        {'weight': tensor([[1., 2.]])}
    """

    _forward_mode = True  # until PyTorch says that a function of the model has none

    def _multiply_batch(self, batch: Batch, X: Columns) -> tuple[Columns, Tensor | float]:
        if self.risk.forward_mode_ok(batch) and self._forward_mode:
            try:
                return self._multiply_linearized(_forward_over_reverse, batch, X)
            except NotImplementedError:
                self._forward_mode = False
        return self._multiply_linearized(_double_reverse, batch, X)

    def _multiply_linearized(
        self, linearize: Linearize, batch: Batch, X: Columns
    ) -> tuple[Columns, Tensor | float]:
        """Multiply Jᵀ ∇²ℓ J with the products of J and Jᵀ that ``linearize`` makes."""
        risk, params = self.risk, self._theta
        loss: Loss = risk.loss  # type: ignore[assignment]

        def predict(theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            f = risk.predict(theta, batch.X)
            return loss.terms(f, batch.y)[0], f

        products = []
        for F, f, JV, pullback in linearize(predict, params, unstack_columns(params, X)):
            _, targets = loss.terms(f, batch.y)
            products.append(pullback(_loss_hess_vec(loss, F, targets, batch.n, JV))[0])
        return stack_columns(products), loss.normalizer(F, targets, batch.n)


def _forward_over_reverse(
    predict: Predict, params: dict[str, Tensor], columns: list[dict[str, Tensor]]
) -> Linearized:
    """Yield F, f, J v and the map u -> Jᵀ u for each v, with one forward pass for both products."""
    for v in columns:

        def push(
            theta: dict[str, Tensor], v: dict[str, Tensor] = v
        ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            F, JV, f = jvp(predict, (theta,), (v,), has_aux=True)
            return F, (JV, f)

        F, pullback, (JV, f) = vjp(push, params, has_aux=True)
        yield F, f, JV, pullback


def _double_reverse(
    predict: Predict, params: dict[str, Tensor], columns: list[dict[str, Tensor]]
) -> Linearized:
    """The same in reverse mode only: J is the transpose of u -> Jᵀ u, which is linear in u."""
    F, pullback, f = vjp(predict, params, has_aux=True)
    _, push = vjp(lambda u: pullback(u)[0], torch.zeros_like(F))
    for v in columns:
        yield F, f, push(v)[0], pullback


def _loss_hess_vec(loss: Loss, F: Tensor, targets: Any, n: int, V: Tensor) -> Tensor:
    """Multiply the Hessian of a batch's loss terms onto V, a tensor of F's shape."""
    if loss.closed_form:
        return loss.hess_vec(F, targets, V)
    _, multiply = vjp(grad(lambda f: loss.value(f, targets, n)), F)
    return multiply(V)[0]
