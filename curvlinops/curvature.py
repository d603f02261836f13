"""What all curvature operators share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from curvlinops._formats import Columns
from curvlinops._torch_base import PyTorchLinearOperator
from curvlinops.risk import Batch, EmpiricalRisk, loss_entry
from curvlinops.risk.model import ModelFunction

# The types of torch do not tell two results from the three with has_aux=True.
jvp: Any = torch.func.jvp
vjp: Any = torch.func.vjp


class CurvatureLinearOperator(PyTorchLinearOperator):
    r"""Public base of the curvature matrices of an empirical risk, as linear operators.

    The risk of parameters :math:`\theta` is :math:`L(\theta) = c \sum_m \ell_m`, where
    :math:`\ell_m` is the loss of one (prediction vector, target) pair: one per example for
    classification, one per token or pixel for sequence outputs. :math:`c = 1` for the reduction
    ``"sum"``; for ``"mean"`` :math:`c` is one over what the loss's mean divides by, counted over
    all data: results do not depend on how the data are batched.

    Rows and columns are the entries of the parameters, each flattened row-major, in the order of
    ``params``. Vectors and matrices come as flat tensors, lists of parameter-shaped tensors, or
    dicts keyed by parameter name.

    The arguments below are those of every curvature operator; the operators' own documentation
    lists only what they add.

    Args:
        model_func: An ``nn.Module``, or a function ``(params, X) -> prediction``.
        loss_func: The loss, with a ``reduction`` of ``"mean"`` or ``"sum"``.
        params: The parameters, by name, for instance ``dict(model.named_parameters())``. The matrix
            is that of the given tensors, which may differ from the module's; parameters of the
            module that are not in ``params`` are constants. The module is left as found.
        data: Batches ``(X, y)`` that can be iterated repeatedly: a list, or a ``DataLoader``. ``X``
            is a tensor or a mapping, ``y`` a tensor.
        progressbar: Whether to show a progress bar for every pass over the data.
        check_deterministic: Whether to check at construction that two passes over the data give the
            same predictions and loss.
        num_data: The number of examples, to save counting them.
        batch_size_fn: Returns the number of examples in an ``X``; needed if it is a mapping.
            Default: ``X.shape[0]``.

    Raises:
        TypeError: If ``params`` is no dict of tensors, or the prediction is no tensor.
        ValueError: If names are unknown, the data are empty or can only be iterated once, or the
            loss has no ``reduction`` of ``"mean"`` or ``"sum"``.
        RuntimeError: If the check finds that model or data are not deterministic; the message names
            the likely cause.
    """

    SELF_ADJOINT = True


class RiskLinearOperator(CurvatureLinearOperator):
    """A curvature matrix that is multiplied batch by batch; arguments as its base class."""

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
    ):
        """Build the risk; no product is computed yet."""
        loss_entry(loss_func)  # refuses None, with which a risk can do without a loss
        self._risk = EmpiricalRisk(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
        )
        shapes = [p.shape for p in self._risk.params.values()]
        super().__init__(shapes, shapes)

    @property
    def risk(self) -> EmpiricalRisk:
        """The empirical risk whose curvature this is."""
        return self._risk

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self._risk.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self._risk.dtype

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to move: the model, which the operator does not own, would have to move too."""
        raise NotImplementedError(
            f"{self!r} cannot be moved: move the model and params, and build it anew."
        )

    @property
    def _in_names(self) -> list[str] | None:
        return list(self._risk.params)

    @property
    def _out_names(self) -> list[str] | None:
        return list(self._risk.params)

    @property
    def _theta(self) -> dict[str, Tensor]:
        """The parameters without requires_grad: plain autograd would record a second graph."""
        return {name: p.detach() for name, p in self._risk.params.items()}

    def _matmat(self, X: Columns) -> Columns:
        def multiply(batch: Batch) -> tuple[list[Tensor], Tensor | float]:
            return self._multiply_batch(batch, X)

        return self._risk.sum_over_data(multiply, f"{self._formula()} product")

    def _multiply_batch(self, batch: Batch, X: Columns) -> tuple[Columns, Tensor | float]:
        """Multiply a batch's matrix, summed over loss terms, onto tensors ``[*N_i, K]``.

        Returns the product and the batch's normalizer of the loss.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement _multiply_batch.")


def stack_columns(columns: list[dict[str, Tensor]]) -> Columns:
    """Stack K products, dicts of tensors ``[*N_i]`` (maybe sparse), to tensors ``[*N_i, K]``."""
    return [
        torch.stack([column[name].to_dense() for column in columns], dim=-1).detach()
        for name in columns[0]
    ]


def unstack_columns(names: Iterable[str], X: Columns) -> list[dict[str, Tensor]]:
    """Split tensors ``[*N_i, K]`` into K dicts of tensors ``[*N_i]``."""
    columns = zip(*(x.unbind(-1) for x in X), strict=True)
    return [dict(zip(names, column, strict=True)) for column in columns]
