"""The generalized Gauss-Newton matrix of an empirical risk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from curvlinops._random import RandomSource
from curvlinops._scalars import as_integer
from curvlinops.gramian import GramianLinearOperator, Multiply
from curvlinops.risk import Loss
from curvlinops.risk.model import ModelFunction


class GGNLinearOperator(GramianLinearOperator):
    r"""The generalized Gauss-Newton matrix of the empirical risk.

    .. math::
        G = c \sum_m J_m^\top \left( \nabla_f^2 \ell_m \right) J_m

    with the Jacobian :math:`J_m` of loss term :math:`m`'s prediction vector with respect to the
    parameters (Schraudolph, 2002, "Fast curvature matrix-vector products for second-order gradient
    descent"). It is symmetric, positive semi-definite for convex losses, and equals the Hessian
    where the model is linear in its parameters; for the negative log-likelihoods
    ``CrossEntropyLoss``, ``BCEWithLogitsLoss`` and ``MSELoss`` it is the Fisher information
    (Martens, 2020, "New insights and perspectives on the natural gradient method").

    With ``mc_samples`` :math:`S > 0`, the loss's Hessian is replaced by its Monte-Carlo estimate
    :math:`\frac{1}{S} \sum_s g_{m,s} g_{m,s}^\top`, where :math:`g_{m,s}` is the gradient of the
    loss for a target that is drawn from the model's predictive distribution. Each product uses the
    same samples: the matrix is random, but fixed, symmetric, and positive semi-definite.

    Arguments and errors: see :class:`~curvlinops.CurvatureLinearOperator`, and in addition:

    Args:
        mc_samples: Number of samples per loss term; 0 for the exact matrix. Samples belong to the
            loss terms by their order in the data, which must be fixed.
        seed: Fixes the samples, together with the index of a loss term in the data.

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

    def __init__(
        self,
        model_func: ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: dict[str, Tensor],
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        mc_samples: int = 0,
        seed: int = 2147483647,
        *,
        chunk_size: int | None = None,
        keep_graph: bool = False,
        process_group: Any = None,
    ):
        self._mc_samples = as_integer("mc_samples", mc_samples, 0)
        self._random = RandomSource(seed)
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
            chunk_size=chunk_size,
            keep_graph=keep_graph,
            process_group=process_group,
        )

    def _purpose(self) -> str:
        options = f", mc_samples={self._mc_samples}, seed={self._random.seed}"
        return super()._purpose() + options * self._needs_fixed_order

    @property
    def _needs_fixed_order(self) -> bool:
        return self._mc_samples > 0

    def _check_loss(self, loss: Loss) -> None:
        if self._mc_samples > 0:
            loss.require_closed_form("Monte-Carlo samples")

    def _term_curvature(self, F: Tensor, targets: Any, n: int, first_term: int) -> Multiply:
        loss, S = self._loss, self._mc_samples
        if S > 0:
            m, C = F.shape
            draws = loss.draws(C)
            uniforms = self._random.uniforms("samples", first_term, m, S * draws)
            uniforms = uniforms.reshape(m, S, draws)
            return lambda V: loss.sampled_hess_vec(F, targets, uniforms, V)
        return self._loss_hessian(F, targets, n)
