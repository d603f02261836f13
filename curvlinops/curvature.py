"""What all curvature operators share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from curvlinops._formats import Columns
from curvlinops._scalars import as_integer
from curvlinops._torch_base import PyTorchLinearOperator
from curvlinops.distributed import collective_of
from curvlinops.kept_graphs import KeptGraph, KeptGraphs
from curvlinops.linearization import Differentiator
from curvlinops.risk import Batch, EmpiricalRisk, Loss, loss_entry
from curvlinops.risk.data import TermCounter
from curvlinops.risk.empirical_risk import RECORDING
from curvlinops.risk.model import ModelFunction, device_of, refuse_sharded


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
        loss_func: The loss, with a ``reduction`` of ``"mean"`` or ``"sum"``. As for the parameters,
            products follow changes of its options, if it is a module.
        params: The parameters, by name, for instance ``dict(model.named_parameters())``. The matrix
            is that of the given tensors, which may differ from the module's; parameters of the
            module that are not in ``params`` are constants. The module is left as found.
        data: Batches ``(X, y)`` that can be iterated repeatedly: a list, or a ``DataLoader``. ``X``
            is a tensor or a mapping, ``y`` a tensor.
        progressbar: Whether to show a progress bar for every pass over the data.
        check_deterministic: Whether to check at construction that two passes over the data give the
            same predictions and loss. The first batch also shows which functions the model uses:
            without the check, compiled products cannot tell those without second derivatives.
        num_data: The number of examples, to save counting them.
        batch_size_fn: Returns the number of examples in an ``X``; needed if it is a mapping.
            Default: ``X.shape[0]``.
        chunk_size: How many columns of a matrix are multiplied at once (by ``torch.vmap``), of
            operators that are multiplied batch by batch. All columns share one forward pass, except
            that for networks with convolutions each chunk has one. Default: as many as need little
            memory.
        keep_graph: Whether to keep the graph of each batch between products, on fixed data, of
            square operators that are multiplied batch by batch. Further products then need no
            forward pass, but all graphs stay in memory: for each batch, about twice the peak memory
            of its gradient. They are made anew when parameters, buffers, batches or the loss's
            options were changed in place or replaced, or the module switched between training and
            evaluation; changes that PyTorch does not count (through ``.data`` or NumPy), of the
            model's Python attributes, and of what a function that is no module has captured go
            unnoticed. Where a graph cannot be kept, there is a warning, and products are made as
            without.
        process_group: A ``torch.distributed`` process group (gloo for parameters on a CPU, NCCL for
            GPUs), of operators that sum over examples. ``data`` is then this rank's part of the
            data, see :class:`~curvlinops.ShardSampler`; it may be empty. Parameters, loss, options
            and vectors are the same on all ranks, which make the same calls in the same order, and
            each gets the result for all data. ``num_data`` counts those of all ranks.

    With a process group, a product takes one all-reduce, also of its checks (and a second one if it
    has more columns than the one before it, or, as the first, than one). Random numbers are
    those of one process that has the parts of all ranks, in their order; only the first rank shows
    progress bars. An exception on one rank is one on all of them. What cannot be told (a
    ``KeyboardInterrupt``, the death of a process, a rank that makes no product or one in another
    dtype) ends in an error of the backend, at the latest after the group's ``timeout``. Products
    cannot be differentiated (``record_gradients``), and ``torch.compile`` runs them as they are. A
    model in ``DistributedDataParallel`` is used without the wrapper, with or without ``"module."``
    in the names of ``params``.

    Raises:
        TypeError: If ``params`` is no dict of tensors, or the prediction is no tensor.
        ValueError: If names are unknown, the data are empty or can only be iterated once, or the
            loss has no ``reduction`` of ``"mean"`` or ``"sum"``.
        NotImplementedError: If the model uses operations that PyTorch cannot differentiate as the
            matrix needs it, or the loss has no formula that it needs; or if parameters are sharded
            (FSDP).
        RuntimeError: If the check finds that model or data are not deterministic; the message names
            the likely cause. If ranks do not agree, or another rank failed.
    """

    SELF_ADJOINT = True


class ModelLinearOperator(CurvatureLinearOperator):
    """A matrix that is multiplied by evaluating the model: it holds a risk, and no tensors."""

    _risk: EmpiricalRisk

    @property
    def risk(self) -> EmpiricalRisk:
        """The empirical risk whose curvature this is."""
        return self._risk

    @property
    def _loss(self) -> Loss:
        """The risk's loss entry."""
        assert self._risk.loss is not None
        return self._risk.loss

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
    def _theta(self) -> dict[str, Tensor]:
        """The parameters without requires_grad: plain autograd would record a second graph."""
        return {name: _without_overlap(p.detach()) for name, p in self._risk.params.items()}


def _without_overlap(p: Tensor) -> Tensor:
    """Clone an expanded tensor, which forward mode refuses."""
    return p.clone() if 0 in p.stride() else p


class RiskLinearOperator(ModelLinearOperator):
    """A square curvature matrix that is multiplied batch by batch; arguments as its base class.

    A subclass implements :meth:`_multiply_batch` and :meth:`_keep_batch`.
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
        keep_graph: bool = False,
        process_group: Any = None,
    ):
        """Build the risk; no product is computed yet."""
        collective = collective_of(process_group, device_of(params))
        with collective.together():
            loss, _ = loss_entry(loss_func)  # refuses None, which is for risks without a loss
            self._check_loss(loss)
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
            needs_fixed_order=self._needs_fixed_order,
            collective=collective,
            purpose=self._purpose(),
        )
        self._differentiator = Differentiator(self._risk, chunk_size)
        self._kept = KeptGraphs() if keep_graph else None
        shapes = [p.shape for p in self._risk.params.values()]
        # so that already the first product of a vector takes a single all-reduce
        collective.room = sum(shape.numel() for shape in shapes)
        super().__init__(shapes, shapes)

    @property
    def _out_names(self) -> list[str] | None:
        return list(self._risk.params)

    @property
    def _needs_fixed_order(self) -> bool:
        """Whether a product depends on the order of the data."""
        return False

    @property
    def _uses_forward_mode(self) -> bool:
        """Whether a product may use forward mode."""
        return True

    def _purpose(self) -> str:
        """Return what must be the same on all ranks, besides the arguments of the risk."""
        return type(self).__name__

    def _check_loss(self, loss: Loss) -> None:
        """Raise if the matrix does not exist for a loss."""

    def _terms(self, batch: Batch, theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return predictions of loss terms ``[m, C]``, and raw ones."""
        f = self._risk.predict(theta, batch.X, any_derivative=True)
        return self._loss.terms(f, batch.y)[0], f

    def _loss_hessian(self, F: Tensor, targets: Any, n: int) -> Callable[[Tensor], Tensor]:
        """Return the multiplication of ``[m, C]`` by the Hessian of a batch's loss."""
        loss = self._loss
        if loss.closed_form:
            return lambda V: loss.hess_vec(F, targets, V)
        return self._differentiator.hessian_of(lambda f: loss.value(f, targets, n), F)

    def _normalizer(self, batch: Batch, f: Tensor) -> Tensor | float:
        """Return a batch's normalizer of the loss, given raw predictions."""
        return self._loss.normalizer(*self._loss.terms(f, batch.y), batch.n)

    def _matmat(self, X: Columns) -> Columns:
        recording = torch.is_grad_enabled()
        if recording and not self._risk.collective.alone:
            raise NotImplementedError(RECORDING)
        # Counting through the terms of all ranks takes communication.
        counter = self._risk.term_counter() if self._needs_fixed_order else TermCounter()
        kept = None if recording or torch.compiler.is_compiling() else self._kept
        if kept is not None:
            kept.start(self._risk.dependencies())
        with torch.inference_mode(False), torch.set_grad_enabled(recording):
            copy = self._uses_forward_mode and kept is None
            X = [_with_own_columns(x, copy) for x in X]

        def multiply(batch: Batch) -> tuple[list[Tensor], Tensor | float]:
            product = None if kept is None else self._multiply_kept(kept, batch, X, counter)
            return product or self._multiply_batch(batch, X, counter, recording)

        return self._risk.sum_over_data(multiply, f"{self._formula()} product", like=X)

    def _multiply_kept(
        self, kept: KeptGraphs, batch: Batch, X: Columns, counter: TermCounter
    ) -> tuple[Columns, Tensor | float] | None:
        """Multiply with a batch's kept graph, made now if there is none; None if it cannot be."""
        graph = kept.find(batch.source, counter.position)
        if graph is None:
            if not kept.wanted:
                return None
            before = counter.position
            try:
                graph = self._keep_batch(batch, counter)
            except NotImplementedError as error:
                kept.give_up(f"{error}")
            if graph is None:
                counter.position = before
                return None
            kept.keep(batch.source, before, graph)
        else:
            counter.advance(graph.num_terms)
        with torch.no_grad():
            V = dict(zip(self._risk.params, X, strict=True))
            return self._differentiator.each(graph.multiply, V), graph.normalizer

    def _multiply_batch(
        self, batch: Batch, X: Columns, counter: TermCounter, recording: bool
    ) -> tuple[Columns, Tensor | float]:
        """Multiply a batch's matrix, summed over loss terms, onto tensors ``[*N_i, K]``.

        Returns the product and the batch's normalizer of the loss.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement _multiply_batch.")

    def _keep_batch(self, batch: Batch, counter: TermCounter) -> KeptGraph | None:
        """Return a graph that multiplies a batch's matrix; None where this does not pay.

        Raises ``NotImplementedError`` where an operation of the model has no second derivative.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement _keep_batch.")


def _with_own_columns(x: Tensor, copy: bool) -> Tensor:
    """Return a tensor ``[*N, K]`` whose columns are contiguous, for fast matrix products.

    ``copy`` says that it shall share no memory with others: forward mode copies such tangents, for
    each batch anew.
    """
    rows = x.movedim(-1, 0)
    rows = rows.clone(memory_format=torch.contiguous_format) if copy else rows.contiguous()
    return rows.movedim(0, -1)
