"""The loss terms' gradients, and their second moment: the empirical Fisher."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Size, Tensor

from curvlinops.gramian import GramianLinearOperator, Multiply
from curvlinops.kept_graphs import mark
from curvlinops.risk import Batch, Loss, loss_entry
from curvlinops.risk.model import ModelFunction
from curvlinops.rows import Linear, RowsLinearOperator, TransposedRowsLinearOperator


class EFLinearOperator(GramianLinearOperator):
    r"""The empirical Fisher: the uncentred second moment of the loss terms' gradients.

    .. math::
        E = c \sum_m \nabla_\theta \ell_m \nabla_\theta \ell_m^\top

    Each loss term counts on its own: for sequences, the gradients of tokens, not those of whole
    examples. It is symmetric and positive semi-definite. It is not the Fisher information, whose
    targets are the model's own predictions (Kunstner et al., 2019, "Limitations of the empirical
    Fisher approximation for natural gradient descent").

    With the gradients as rows of a matrix,
    :class:`~curvlinops.PerExampleGradientLinearOperator` ``A``, it is ``A.scale * A.T @ A``.

    Arguments and errors: see :class:`~curvlinops.CurvatureLinearOperator`. The loss must be
    ``MSELoss``, ``CrossEntropyLoss``, ``BCEWithLogitsLoss``, or one that was registered with
    :func:`~curvlinops.register_loss`.

    Example:
        >>> import torch
        >>> from curvlinops import EFLinearOperator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> torch.nn.init.ones_(model.weight)
        Parameter containing:
        tensor([[1., 1.]], requires_grad=True)
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> params = dict(model.named_parameters())
        >>> E = EFLinearOperator(model, torch.nn.MSELoss(reduction="sum"), params, data)
        >>> E @ torch.tensor([1.0, 2.0])  # the gradients are [2, 0] and [0, 2]
        tensor([4., 8.])
    """

    def _check_loss(self, loss: Loss) -> None:
        loss.require_closed_form("gradients of single loss terms")

    def _term_curvature(self, F: Tensor, targets: Any, n: int, first_term: int) -> Multiply:
        loss = self._loss  # and not the operator, which keeps graphs
        return lambda V: loss.grad_outer_vec(F, targets, V)


class PerExampleGradientLinearOperator(RowsLinearOperator):
    r"""The gradients of all loss terms, as rows of a matrix.

    .. math::
        A = \begin{pmatrix}
            \nabla_\theta \ell_1^\top \\ \vdots \\ \nabla_\theta \ell_M^\top
        \end{pmatrix}

    There is one row per example, or one per token or pixel for sequence outputs (the example's
    gradient is the sum of its rows), in the order of the data, which must be fixed. The
    :math:`\ell_m` are not averaged, whatever the loss's reduction: the gradient of the loss is
    ``A.scale`` times the sum of the rows, and the empirical Fisher ``A.scale * A.T @ A``.

    ``A @ v`` is the change of each loss term along ``v``: with :math:`v = -H^{-1} \nabla
    \ell_\text{test}`, the influence of each training example on a test loss (Koh & Liang, 2017,
    "Understanding black-box predictions via influence functions").

    Arguments and errors: see :class:`~curvlinops.CurvatureLinearOperator`, and
    :class:`~curvlinops.EFLinearOperator` for the loss.

    Example:
        >>> import torch
        >>> from curvlinops import PerExampleGradientLinearOperator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> torch.nn.init.ones_(model.weight)
        Parameter containing:
        tensor([[1., 1.]], requires_grad=True)
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> params = dict(model.named_parameters())
        >>> A = PerExampleGradientLinearOperator(model, torch.nn.MSELoss(), params, data)
        >>> A @ torch.tensor([1.0, 3.0])  # the gradients are [2, 0] and [0, 2]
        tensor([2., 6.])
        >>> A.T @ torch.tensor([1.0, 1.0]) * A.scale  # the gradient of the loss
        tensor([1., 1.])
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
        *,
        chunk_size: int | None = None,
        process_group: Any = None,
    ):
        loss, _ = loss_entry(loss_func)
        loss.require_closed_form("gradients of single loss terms")
        self._scale: float | None = None
        self._scale_of: tuple[list[Any], list[Any]] = [], []
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
            process_group=process_group,
        )

    @property
    def scale(self) -> float:
        """The factor c between the sum of the loss terms and the loss."""
        made_from = self._risk.loss_dependencies()
        marks = [mark(x) for x in made_from]
        if self._scale is None or marks != self._scale_of[1]:
            self._scale = 1.0 if self._risk.reduction == "sum" else float(self._look())
            # Both, so that no other tensor gets the memory of one that it was made from.
            self._scale_of = made_from, marks
        return self._scale

    def _known_rows(self) -> list[Size] | None:
        terms = self._risk.batch_terms
        return None if terms is None else [Size((m,)) for m in terms]

    def _rows_of(self, batch: Batch, f: Tensor) -> Size:
        return self._loss.terms(f, batch.y)[0].shape[:1]

    def _differentiated(self, batch: Batch, f: Tensor) -> Tensor:
        return self._loss.terms(f, batch.y)[0]

    def _row_maps(self, batch: Batch, F: Tensor, f: Tensor) -> tuple[Linear, Linear]:
        _, targets = self._loss.terms(f, batch.y)
        g = self._loss.grad(F, targets)  # [m, C]
        return lambda V: (g * V).sum(-1), lambda u: g * u.unsqueeze(-1)

    def _normalizer(self, batch: Batch, f: Tensor) -> Tensor | float:
        return self._loss.normalizer(*self._loss.terms(f, batch.y), batch.n)

    def _adjoint(self) -> TransposedRowsLinearOperator:
        return _TransposedPerExampleGradientLinearOperator._of(self)


class _TransposedPerExampleGradientLinearOperator(TransposedRowsLinearOperator):
    """The gradients of all loss terms, as columns of a matrix."""

    def _formula(self) -> str:
        return f"{self._transposed._formula()}.T"
