"""Jacobians of a model's predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Size, Tensor

from curvlinops.distributed import refuse_process_group
from curvlinops.risk import Batch
from curvlinops.risk.model import ModelFunction
from curvlinops.rows import RowsLinearOperator, TransposedRowsLinearOperator


class JacobianLinearOperator(RowsLinearOperator):
    r"""The Jacobian of the predictions for all data with respect to the parameters.

    .. math::
        J = \nabla_\theta
        \begin{pmatrix} f_\theta(x_1) \\ \vdots \\ f_\theta(x_N) \end{pmatrix}

    Rows are the entries of the predictions, row-major and example by example in the order of the
    data, which must be fixed. The space of rows is one tensor of the shape that all batches'
    predictions have when they are concatenated along the first axis, or a flat one where the other
    axes differ between batches. Products with a vector use forward mode, those of the adjoint,
    a :class:`~curvlinops.TransposedJacobianLinearOperator`, reverse mode.

    Arguments and errors are those of :class:`~curvlinops.CurvatureLinearOperator`, without a loss
    (the targets in ``data`` are not used).

    Example:
        >>> import torch
        >>> from curvlinops import JacobianLinearOperator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> J = JacobianLinearOperator(model, dict(model.named_parameters()), data)
        >>> J.out_shape
        [torch.Size([2, 1])]
        >>> [y.tolist() for y in J @ {"weight": torch.tensor([[3.0, 4.0]])}]
        [[[3.0], [4.0]]]
    """

    def __init__(
        self,
        model_func: ModelFunction,
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
        super().__init__(
            model_func,
            None,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
            chunk_size=chunk_size,
            process_group=process_group,
        )

    def _known_rows(self) -> list[Size] | None:
        return self._risk.prediction_shapes

    def _rows_of(self, batch: Batch, f: Tensor) -> Size:
        return f.shape

    def _adjoint(self) -> TransposedJacobianLinearOperator:
        return TransposedJacobianLinearOperator._of(self)


class TransposedJacobianLinearOperator(TransposedRowsLinearOperator):
    r"""The transpose of the Jacobian of the predictions for all data.

    It has one column for each entry of the predictions, in the order of the rows of
    :class:`~curvlinops.JacobianLinearOperator`, which see for arguments and errors. Each is the
    other's adjoint, and takes over the model, the data, and what is known of them.

    Example:
        >>> import torch
        >>> from curvlinops import TransposedJacobianLinearOperator
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> params = dict(model.named_parameters())
        >>> JT = TransposedJacobianLinearOperator(model, params, data)
        >>> JT @ torch.tensor([3.0, 4.0])
        tensor([3., 4.])
        >>> JT.shape, JT.adjoint().shape
        (torch.Size([2, 2]), torch.Size([2, 2]))
    """

    def __init__(
        self,
        model_func: ModelFunction,
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
        refuse_process_group(type(self).__name__, process_group)
        self._transposed = JacobianLinearOperator(
            model_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
            chunk_size=chunk_size,
            process_group=process_group,
        )
