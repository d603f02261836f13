"""What operators have in common whose rows belong to the examples in the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from typing import Any, TypeVar

import torch
from torch import Size, Tensor

from curvlinops._formats import Columns, numel
from curvlinops._scalars import as_integer
from curvlinops._torch_base import PyTorchLinearOperator
from curvlinops.autodiff import Theta
from curvlinops.curvature import CurvatureLinearOperator, ModelLinearOperator
from curvlinops.distributed import refuse_process_group
from curvlinops.linearization import Differentiator
from curvlinops.risk import Batch, EmpiricalRisk
from curvlinops.risk.model import ModelFunction, refuse_sharded

Self = TypeVar("Self", bound="TransposedRowsLinearOperator")
Linear = Callable[[Tensor], Tensor]


class RowsLinearOperator(ModelLinearOperator):
    """Base of ``R J``: the Jacobian of all predictions, and a linear map for each batch.

    The number of rows needs predictions. Where the check for determinism has made none, they are
    made when the shape is asked for.

    Arguments as its base class, except that the loss may be None.
    """

    SELF_ADJOINT = False

    def __init__(
        self,
        model_func: ModelFunction,
        loss_func: Callable[[Any, Any], Tensor] | None,
        params: dict[str, Tensor],
        data: Iterable[Any],
        *,
        progressbar: bool,
        check_deterministic: bool,
        num_data: int | None,
        batch_size_fn: Callable[[Any], int] | None,
        chunk_size: int | None,
        process_group: Any,
    ) -> None:
        refuse_process_group(type(self).__name__, process_group)
        refuse_sharded(type(self).__name__, model_func, params)
        chunk_size = None if chunk_size is None else as_integer("chunk_size", chunk_size, 1)
        self._risk = EmpiricalRisk(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
            needs_fixed_order=True,
        )
        self._differentiator = Differentiator(self._risk, chunk_size)
        self._row_shapes = self._known_rows()
        self.in_shape = [p.shape for p in self._risk.params.values()]

    # ---- what a subclass implements ---------------------------------------------------------
    def _known_rows(self) -> list[Size] | None:
        """Return the shape of each batch's rows, if the check for determinism has told them."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _known_rows.")

    def _rows_of(self, batch: Batch, f: Tensor) -> Size:
        """Return the shape of a batch's rows, given its prediction."""
        raise NotImplementedError(f"{type(self).__name__} does not implement _rows_of.")

    def _differentiated(self, batch: Batch, f: Tensor) -> Tensor:
        """Return the part of a prediction that J is the Jacobian of."""
        return f

    def _row_maps(self, batch: Batch, F: Tensor, f: Tensor) -> tuple[Linear, Linear]:
        """Return R for a batch, and its adjoint."""
        return _identity, _identity

    def _normalizer(self, batch: Batch, f: Tensor) -> Tensor | float:
        """Return the batch's normalizer of the loss."""
        return 1.0

    # ---- spaces ------------------------------------------------------------------------------
    @property
    def out_shape(self) -> list[Size]:  # type: ignore[override]
        """The space of rows: one tensor."""
        if self._row_shapes is None:
            self._look()
        assert self._row_shapes is not None
        return [_concatenated(self._row_shapes)]

    def _look(self) -> Tensor | float:
        """Predict all data to count the rows; return the scale c of the loss."""
        shapes: list[Size] = []

        def count(batch: Batch) -> Tensor | float:
            f = self._risk.evaluate(batch.X)
            with torch.no_grad():
                shapes.append(self._rows_of(batch, f))
                return self._normalizer(batch, f)

        scale = self._risk.for_each_batch(count, "Counting rows")
        self._row_shapes = shapes
        return scale

    # ---- products ----------------------------------------------------------------------------
    def _matmat(self, X: Columns) -> Columns:
        recording = torch.is_grad_enabled()
        parts: list[Tensor] = []

        def multiply(batch: Batch) -> float:
            def middle(F: Tensor, f: Tensor) -> Linear:
                return self._row_maps(batch, F, f)[0]

            function = partial(self._function, batch, True)
            part = self._differentiator.jacobian(function, self._theta, X, middle, recording)
            parts.append(part if recording else part.detach())
            return 1.0

        self._risk.for_each_batch(multiply, f"{self._formula()} product")
        self._row_shapes = [part.shape[:-1] for part in parts]
        shape = _concatenated(self._row_shapes)
        if len(shape) == 1:  # the other axes may differ
            parts = [part.reshape(part.shape[:-1].numel(), -1) for part in parts]
        return [torch.cat(parts)]

    def _adjoint_matmat(self, X: Columns) -> Columns:
        (U,) = X
        recording = torch.is_grad_enabled()
        start = 0

        def multiply(batch: Batch) -> tuple[Columns, float]:
            nonlocal start
            function = partial(self._function, batch, False)
            F, pull, f = self._differentiator.pullback(function, self._theta)
            shape = self._rows_of(batch, f)
            stop = start + (shape[0] if U.ndim > 2 else prod(shape))
            if stop > U.shape[0] or (U.ndim > 2 and shape[1:] != U.shape[1:-1]):
                raise ValueError(_CHANGED)
            with torch.set_grad_enabled(recording):
                part = U[start:stop].reshape(*shape, U.shape[-1])
                adjoint = self._row_maps(batch, F, f)[1]
                start = stop
                return self._differentiator.each(lambda u: pull(adjoint(u)), part), 1.0

        name = f"{self._formula()}.T product"
        products = self._risk.sum_over_data(multiply, name, scaled=False)
        if start != U.shape[0]:
            raise ValueError(_CHANGED)
        return products

    def _function(self, batch: Batch, any_derivative: bool, theta: Theta) -> tuple[Tensor, Tensor]:
        """Return what is differentiated, and the prediction."""
        f = self._risk.predict(theta, batch.X, any_derivative)
        return self._differentiated(batch, f), f


class TransposedRowsLinearOperator(CurvatureLinearOperator):
    """Base of the adjoints of operators with rows; nothing is read or evaluated anew."""

    SELF_ADJOINT = False
    _transposed: RowsLinearOperator

    @classmethod
    def _of(cls: type[Self], operator: RowsLinearOperator) -> Self:
        """Return the adjoint of an operator."""
        adjoint = cls.__new__(cls)
        adjoint._transposed = operator
        return adjoint

    @property
    def in_shape(self) -> list[Size]:  # type: ignore[override]
        """The space of rows of the adjoint: one tensor."""
        return self._transposed.out_shape

    @property
    def out_shape(self) -> list[Size]:  # type: ignore[override]
        """The shapes of the parameters."""
        return self._transposed.in_shape

    @property
    def risk(self) -> EmpiricalRisk:
        """The empirical risk that holds model and data."""
        return self._transposed.risk

    @property
    def _out_names(self) -> list[str] | None:
        return self._transposed._in_names

    def _matmat(self, X: Columns) -> Columns:
        return self._transposed._adjoint_matmat(X)

    def _adjoint_matmat(self, X: Columns) -> Columns:
        return self._transposed._matmat(X)

    def _adjoint(self) -> PyTorchLinearOperator:
        return self._transposed


_CHANGED = (
    "The number of rows has changed since it was counted: predictions must have the same shapes in "
    "each pass over the data. Build the operator anew."
)


def _identity(x: Tensor) -> Tensor:
    return x


def _concatenated(shapes: list[Size]) -> Size:
    """Return the shape of tensors that are concatenated along the first axis, or flat ones."""
    trailing = {shape[1:] for shape in shapes}
    if len(trailing) == 1 and all(len(shape) > 0 for shape in shapes):
        return Size((sum(shape[0] for shape in shapes), *trailing.pop()))
    return Size((numel(shapes),))
