r"""The empirical risk: the only loop over the data, and the only place of the scale."""

from __future__ import annotations

import operator
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from curvlinops.distributed import Collective, Share, add_shares
from curvlinops.risk.data import Batch, BatchSource, TermCounter
from curvlinops.risk.determinism import (
    PassRecord,
    advance_rng,
    compare_passes,
    preserved_rng,
    refuse_random_layers,
)
from curvlinops.risk.losses import Loss, loss_entry, loss_state
from curvlinops.risk.model import (
    FunctionalModel,
    ModelFunction,
    ModelTraits,
    Predict,
    autograd_ready,
)
from curvlinops.risk.ranks import compare_operators, compare_params


class EmpiricalRisk:
    r"""The loss of a model on a data set, as a function of the parameters.

    .. math::
        L(\theta) = c \sum_m \ell_m(\theta)\,,\qquad
        c = \begin{cases}
            1 & \text{for the reduction "sum"} \\
            1 / \sum_b n_b & \text{for the reduction "mean"}
        \end{cases}

    There is one loss term :math:`\ell_m` per pair of a prediction vector and a target. Batch
    :math:`b` adds :math:`n_b` to the denominator (:meth:`Loss.normalizer`): without options, the
    number of its loss terms for cross-entropy and of their entries for the square loss. All data
    count together, so results do not depend on how they are batched.

    Anything that is linear in the loss terms, such as the product of a curvature matrix and a
    vector, is a :meth:`sum_over_data`.

    On several ranks, each has a part of the data (or none), and sums and counts are those of all.
    All make the same calls in the same order; each pass ends in one all-reduce. An exception on one
    rank is one on all, see :meth:`~curvlinops.distributed.Collective.together`.

    At construction, there are two passes over the data with ``check_deterministic=True`` (one with
    ``confirm_later``), else one if ``num_data`` is not given (the model is not evaluated), else
    none. Neither construction nor any pass changes the state of the global random generators, or
    the user's module.

    Args:
        model_func: An ``nn.Module``, or a function ``(params, X) -> prediction``.
        loss_func: A loss function with reduction ``"mean"`` or ``"sum"``; see :func:`loss_entry`.
            Each pass reads its options as they are then. None if only predictions are of interest:
            then :math:`c = 1`.
        params: The parameters by name, as in ``dict(model.named_parameters())``, on one device and
            of one dtype. A module's other parameters are constants.
        data: Batches ``(X, y)``, as a list or a ``DataLoader``. ``X`` is a tensor or a mapping.
        progressbar: Whether to show a progress bar for each pass over the data.
        check_deterministic: Whether to check that the risk is the same function in each pass.
        num_data: Number of examples in the data (on all ranks).
        batch_size_fn: Number of examples in an ``X``. Default: ``X.shape[0]``, for tensors only.
        needs_fixed_order: Whether the check is also for a fixed order of the data.
        confirm_later: Whether the check makes one of its two passes only. The other one is the next
            pass over the data whose predictions are all handed to :meth:`confirm`; there, the check
            may raise.
        collective: Communication with other processes. Default: there are none.
        purpose: What the risk is for, such as an operator and its options. It must be the same on
            all ranks.
        predict: Evaluates the model in the check's first pass, for those who listen to it.

    Raises:
        TypeError: If ``params`` is not a dictionary of tensors, or a prediction not a tensor.
        ValueError: If arguments do not fit together, or the data are empty or can be iterated only
            once.
        RuntimeError: If the check finds that the risk is not deterministic; if ranks do not agree
            on parameters, loss or options; if another rank failed.
        NotImplementedError: If an embedding has ``max_norm`` or ``scale_grad_by_freq``.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> params = {"weight": torch.tensor([[1.0, 2.0]])}
        >>> data = [(torch.eye(2), torch.zeros(2, 1)), (torch.ones(1, 2), torch.zeros(1, 1))]
        >>> risk = EmpiricalRisk(net, nn.MSELoss(), params, data)
        >>> loss, (gradient,) = risk.loss_and_gradient()
        >>> round(loss.item(), 4)  # (1 + 4 + 9) / 3
        4.6667
        >>> risk.num_data
        3
    """

    def __init__(
        self,
        model_func: ModelFunction,
        loss_func: Callable[[Any, Any], Tensor] | None,
        params: dict[str, Tensor],
        data: Iterable[Any],
        *,
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        needs_fixed_order: bool = False,
        confirm_later: bool = False,
        collective: Collective | None = None,
        purpose: str = "",
        predict: Predict | None = None,
    ) -> None:
        self.collective = Collective() if collective is None else collective
        self.loss: Loss | None = None
        self.reduction = "sum"
        self._loss_func = loss_func
        self._loss_state: list[Any] | None = None
        with self.collective.together():
            if num_data is not None and operator.index(num_data) <= 0:
                raise ValueError(f"num_data must be positive, got {num_data}.")
            self._functional = FunctionalModel(model_func, params)
            self._source = BatchSource(data, self._functional.device, batch_size_fn)
            self._follow_loss()
            may_have_data = self._source.length != 0
        self.progressbar = progressbar
        #: Number of examples in the data of all ranks; None until a pass has counted them.
        self.num_data = num_data
        #: Number of loss terms on this rank; None unless the check has counted them.
        self.num_terms: int | None = None
        #: Number of loss terms of each batch, likewise.
        self.batch_terms: list[int] | None = None
        #: Shape of each batch's prediction, likewise.
        self.prediction_shapes: list[torch.Size] | None = None

        self._needs_fixed_order = needs_fixed_order
        #: A pass until another one has been compared with it: the check's first, or see repeat.
        self._unconfirmed: PassRecord | None = None
        self._confirming = PassRecord()
        #: Whether passes are recorded of which others may be repetitions.
        self.records_passes = False
        #: Number of loss terms on the ranks before this one; None until they are counted.
        self._terms_before: int | None = 0 if self.collective.alone else None

        compare_operators(
            self.collective,
            self._functional.params,
            {
                "operators": purpose,
                "losses": None if self.loss is None else (self.loss.name, self.reduction),
                "check_deterministic": (check_deterministic, needs_fixed_order),
                "num_data": num_data,
            },
        )
        if not self.collective.any(may_have_data):
            raise ValueError(_EMPTY)
        self._fixed_data = type(data) in (list, tuple)
        # A list cannot draw random numbers, and the check finds a model whose predictions depend on
        # those of NumPy or Python. Then products need not copy these states, which is slow.
        self._torch_rng_only = check_deterministic and self._fixed_data
        if check_deterministic:
            with preserved_rng(), autograd_ready(), torch.no_grad():
                self._check_deterministic(confirm_later, predict)
        elif num_data is None:
            with self.collective.together(), self.undisturbed():
                counted = sum(batch.n for batch in self.batches("Counting data"))
            self._verify_size(self._summed(counted))

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters by name, usable for autograd outside of inference mode."""
        return self._functional.params

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._functional.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return self._functional.dtype

    @property
    def model(self) -> nn.Module | None:
        """The module, or None for a function."""
        return self._functional.module

    @property
    def sharded(self) -> bool:
        """Whether parameters are shards, which FSDP gathers while the module is evaluated."""
        return self._functional.sharded

    def unsharded(self) -> dict[str, Tensor]:
        """Return the tensors that FSDP gathers the parameters into, whenever they are used."""
        return self._functional.unsharded()

    @property
    def inner_module(self) -> nn.Module | None:
        """The user's module, inside of wrappers that name parameters; None for a function."""
        return self._functional.inner_module

    def dependencies(self) -> list[Any]:
        """Return tensors and flags, besides the data, that the loss of a batch depends on."""
        autocast = torch.is_autocast_enabled(self.device.type)
        return [
            *self._functional.dependencies(),
            *self.loss_dependencies(),
            autocast and torch.get_autocast_dtype(self.device.type).itemsize,
        ]

    def loss_dependencies(self) -> list[Any]:
        """Return tensors and plain values, besides predictions and data, that losses depend on."""
        self._follow_loss()
        options = [] if self.loss is None else list(vars(self.loss).values())
        return [*loss_state(self._loss_func), *options]

    @property
    def forward_mode_ok(self) -> bool:
        """Whether forward-mode derivatives of the model are right, see ``FunctionalModel``."""
        return self._functional.forward_mode_ok

    @property
    def likely_traits(self) -> ModelTraits:
        """What the model was seen to do; before it was seen, a guess from its layers."""
        return self._functional.likely_traits

    def watching(self) -> AbstractContextManager[None]:
        """Return a context that looks at what the model does in the predictions made inside."""
        return self._functional.watching()

    def predict(self, params: dict[str, Tensor], X: Any, any_derivative: bool = False) -> Tensor:
        """Evaluate the model.

        Args:
            params: Parameters by name.
            X: Inputs of a batch.
            any_derivative: Whether derivatives in both modes and of second order are needed.

        Returns:
            The prediction.

        Raises:
            TypeError: If the model returns something else than a tensor.
        """
        return self._functional.predict(params, X, any_derivative)

    def evaluate(self, X: Any) -> Tensor:
        """Evaluate the model at its parameters, without a graph.

        Args:
            X: Inputs of a batch.
        """
        return self._functional.evaluate(X)

    def batches(self, desc: str | None) -> Iterator[Batch]:
        """Pass over the data, with a progress bar if wanted; use inside of :meth:`undisturbed`.

        Args:
            desc: What the progress bar says; None for no bar, if only a few batches are wanted.

        Returns:
            Iterator over the batches, on the device of the parameters.
        """
        return map(self._source.batch, self._elements(desc))

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Enable gradients, and keep the global random generators as they are."""
        torch_only = self._torch_rng_only and self._unconfirmed is None
        with preserved_rng(torch_only), autograd_ready():
            yield

    def confirm(self, batch: Batch, prediction: Tensor) -> None:
        """Note a prediction of a pass, which is compared with that of the check's first pass.

        Args:
            batch: The batch.
            prediction: The model's prediction.
        """
        if self._records:
            with torch.no_grad():
                self._confirming.add(batch, prediction.detach(), self.loss)

    def repeat(self) -> None:
        """Let the next pass be compared with the last one; the order must be the same, too.

        Both hand their predictions to :meth:`confirm`, and :attr:`records_passes` was set before.
        Data in a list have a fixed order.
        """
        if self.records_passes and not self._fixed_data:
            self._unconfirmed, self._needs_fixed_order = self._confirming, True

    @property
    def _records(self) -> bool:
        """Whether a pass is recorded."""
        return self._unconfirmed is not None or (self.records_passes and not self._fixed_data)

    def term_counter(self) -> TermCounter:
        """Return a new counter for the indices of the loss terms in a pass.

        On several ranks, the terms of all ranks are counted through, in the order of the ranks. The
        number of terms of each is known after the check for determinism. Without it, the first call
        evaluates the model on all data, once.
        """
        if self._terms_before is None:
            _uncompiled(self._count_terms)()
        assert self._terms_before is not None
        return TermCounter(self._terms_before)

    def for_each_batch(
        self, fn: Callable[[Batch], Tensor | float], desc: str = "Data"
    ) -> Tensor | float:
        """Pass over the data once.

        Args:
            fn: Called with each batch; returns the batch's :meth:`Loss.normalizer` (any number for
                the reduction ``"sum"``). Gradients are enabled inside.
            desc: What the progress bar says.

        Returns:
            The scale c, for sums over all data (of all ranks).

        Raises:
            ValueError: If there are no data, or not as many as before.
        """
        if not self.collective.alone:
            return _uncompiled(self._visit_on_all_ranks)(fn, desc, _Sum(False), [])[0]
        if torch.compiler.is_compiling():  # the states of generators cannot be traced
            with torch.inference_mode(False), torch.enable_grad():
                return self._scale(self._visit(fn, desc)[1])
        self._follow_loss()
        with self.undisturbed():
            n, normalizer = self._visit(fn, desc)
            self._verify_size(n)
            return self._scale(normalizer)

    def visit(self, element: Any, fn: Callable[[Batch], Any]) -> None:
        """Do with one batch that is not among the data what a pass does with each of them.

        Args:
            element: A pair ``(X, y)``.
            fn: Called with the batch on the device of the parameters. Gradients are enabled inside.
        """
        self._follow_loss()
        with self.undisturbed():
            fn(self._source.batch(element))

    def has_examples(self, X: Any, n: int) -> bool:
        """Return whether an input is one of n examples, as the user counts them."""
        try:
            return self._source.batch_size(X) == n
        except Exception:  # whatever the user's function does with a part of an input
            return False

    def sum_over_data(
        self,
        fn: Callable[[Batch], tuple[list[Tensor], Tensor | float]],
        desc: str = "Data",
        scaled: bool = True,
        like: list[Tensor] | None = None,
    ) -> list[Tensor]:
        r"""Sum something linear in the loss terms over all data, and multiply by the scale c.

        Args:
            fn: Called with each batch; returns sums over the batch's loss terms, not averaged, and
                the batch's :meth:`Loss.normalizer` (any number for the reduction ``"sum"``).
                Gradients are enabled inside.
            desc: What the progress bar says.
            scaled: Whether to multiply by c; else c is taken for 1.
            like: Tensors of the shapes and dtypes of the result, which a rank without data cannot
                know otherwise. Needed on several ranks. Other sizes on one of them are an error on
                all; other dtypes end in one of the backend.

        Returns:
            :math:`c \sum_b f(b)`, for each of the tensors that ``fn`` returns; detached if the
            caller has disabled gradients.

        Raises:
            ValueError: If there are no data, or not as many as before.
            NotImplementedError: If gradients would have to be recorded through several ranks.
            RuntimeError: If another rank failed.
        """
        recording = torch.is_grad_enabled()
        total = _Sum(recording)

        def add(batch: Batch) -> Tensor | float:
            summands, normalizer = fn(batch)
            recorded = recording and any(t.requires_grad for t in summands)
            if recorded and not self.collective.alone:
                raise NotImplementedError(RECORDING)
            total.add(summands)
            return normalizer

        if self.collective.alone:
            scale, sums = self.for_each_batch(add, desc), total.tensors
        else:
            if like is None:
                raise ValueError(
                    "like is needed on several ranks: one without data does not know the shapes."
                )
            scale, sums = _uncompiled(self._visit_on_all_ranks)(add, desc, total, like)
            total.dtypes, total.owned = [t.dtype for t in like], True
        scale = scale if scaled else 1.0
        with torch.inference_mode(False), torch.set_grad_enabled(recording):
            scaled_sums = [t.mul_(scale) if total.owned else scale * t for t in sums]
            return [t.to(dtype) for t, dtype in zip(scaled_sums, total.dtypes, strict=True)]

    def loss_and_gradient(self) -> tuple[Tensor, list[Tensor]]:
        r"""Evaluate the loss and its gradient by reverse-mode differentiation.

        Returns:
            :math:`L`, and the list of its gradients in the order of ``params``.

        Raises:
            ValueError: If there is no loss function.
        """
        loss = self.loss
        if loss is None:
            raise ValueError("There is no loss function to evaluate: pass loss_func.")

        def loss_and_gradient(batch: Batch) -> tuple[list[Tensor], Tensor | float]:
            params = {name: p.detach().requires_grad_() for name, p in self.params.items()}
            with self.watching():
                prediction = self.predict(params, batch.X)
            F, targets = loss.terms(prediction, batch.y)
            value = loss.value(F, targets, batch.n)
            gradient = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
            return [value.detach(), *gradient], loss.normalizer(F, targets, batch.n)

        with torch.inference_mode(False):
            like = [torch.empty((), dtype=self.dtype), *self.params.values()]
        L, *gradient = self.sum_over_data(loss_and_gradient, "Loss and gradient", like=like)
        return L, gradient

    def _elements(self, desc: str | None) -> Iterable[Any]:
        """Return the data, or a progress bar that iterates them."""
        # One bar is enough: ranks wait for one another.
        shown = self.progressbar and self.collective.rank == 0 and desc is not None
        if not shown or torch.compiler.is_compiling():
            return self._source.data
        return tqdm(self._source.data, desc=desc, total=self._source.length)

    def _follow_loss(self) -> None:
        """Read the loss function, unless it holds what it held when it was read before."""
        if self._loss_func is None:
            return
        state, before = loss_state(self._loss_func), self._loss_state
        if before is None or list(map(id, state)) != list(map(id, before)):
            self.loss, self.reduction = loss_entry(self._loss_func)
            self._loss_state = state

    def _visit(
        self, fn: Callable[[Batch], Tensor | float], desc: str
    ) -> tuple[int, Tensor | float]:
        """Pass over the data of this rank; return its number of examples and the normalizer."""
        n = 0
        normalizer: Tensor | float = 0.0
        self._begin_check()
        for element in self._elements(desc):
            batch = self._source.batch(element)
            normalizer = normalizer + _widened(fn(batch))
            n += batch.n
        self._end_check(n)
        return n, normalizer

    def _visit_on_all_ranks(
        self,
        fn: Callable[[Batch], Tensor | float],
        desc: str,
        total: _Sum,
        like: list[Tensor],
    ) -> tuple[Tensor | float, list[Tensor]]:
        """Pass over the data of all ranks; return the scale c and the sums of all ranks.

        The sums of this rank are those that ``fn`` adds to ``total``. One all-reduce is made, also
        if there is an exception on this rank, or two, see :mod:`curvlinops.distributed.shares`.
        """
        share = Share()
        try:
            self._follow_loss()
            with self.undisturbed():
                n, normalizer = self._visit(fn, desc)
            shapes = [t.shape for t in total.tensors]
            if n and shapes != [t.shape for t in like]:
                raise ValueError(f"Sums must have the shapes of like, got {shapes}.")
            share = Share(total.tensors, n, float(normalizer))
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):  # frees what the pass holds
                traceback.clear_frames(error.__traceback__)
            share.error = error
            total.tensors.clear()
        with torch.inference_mode(False), torch.no_grad():
            shapes, dtypes = [t.shape for t in like], [t.dtype for t in like]
            everybody = add_shares(self.collective, share, shapes, dtypes, self.device)
            self._verify_size(everybody.num_examples)
            denominator = torch.tensor(everybody.normalizer, dtype=torch.float64)
            return self._scale(denominator.to(self.device)), everybody.tensors

    def _scale(self, normalizer: Tensor | float) -> Tensor | float:
        """Return the scale c, given the normalizer of all data."""
        if self.reduction == "sum":
            return 1.0
        if not isinstance(normalizer, Tensor):
            normalizer = torch.tensor(normalizer, dtype=torch.float64)
        return 1 / normalizer  # a tensor: no terms give NaN, as in PyTorch, and not an exception

    def _summed(self, count: int) -> int:
        """Add a count over all ranks."""
        return sum(n for (n,) in self.collective.exchange([count]))

    def _verify_size(self, counted: int) -> None:
        """Compare the number of examples in a pass (of all ranks) with what is known."""
        if counted == 0:
            raise ValueError(_EMPTY)
        if self.num_data is None:
            self.num_data = counted
        elif self.num_data != counted:
            raise ValueError(
                f"A pass over the data had {counted} examples, but num_data is {self.num_data}. "
                "Correct num_data, or batch_size_fn; and do not change the data of an operator."
            )

    def _count_terms(self) -> None:
        """Find out the number of loss terms on the ranks before this one."""
        if self.loss is None or not self.loss.closed_form:  # has no terms that could be counted
            self._terms_before = 0
            return
        if self.num_terms is None:
            counted = 0
            with self.collective.together(), self.undisturbed():
                for batch in self.batches("Counting loss terms"):
                    counted += self.loss.terms(self.evaluate(batch.X), batch.y)[0].shape[0]
            self.num_terms = counted
        self._terms_before = self.collective.prefix(self.num_terms)

    def _check_deterministic(self, confirm_later: bool, predict: Predict | None) -> None:
        """Compare two passes over the data, and on several ranks the parameters' values."""
        compare_params(self.collective, self.params)
        with self.collective.together():
            if self.model is not None:
                refuse_random_layers(self.model)
            if confirm_later:  # a pass whose random generators begin where this one's do
                advance_rng()
            desc = f"Determinism check{'' if confirm_later else ' (1/2)'}"
            first = self._record(desc, predict)
        self._verify_size(self._summed(first.num_examples))
        if confirm_later:
            self._unconfirmed = first
        else:
            with self.collective.together():
                self._compare(first, self._record("Determinism check (2/2)"))
        if self.loss is not None and self.loss.closed_form:
            self.num_terms, self.batch_terms = sum(first.num_terms), first.num_terms
            if not self.collective.alone:
                self._count_terms()
        self.prediction_shapes = first.shapes

    def _begin_check(self) -> None:
        """Begin to note the predictions of a pass, if one is to be compared with the check's."""
        if self._records:
            self._confirming = self._new_record()

    def _end_check(self, n: int) -> None:
        """Compare a pass over n examples with one before, if all were handed over."""
        first, second = self._unconfirmed, self._confirming
        if first is not None and second.num_examples == n:
            self._unconfirmed = None
            self._compare(first, second)

    def _compare(self, first: PassRecord, second: PassRecord) -> None:
        """Raise if two passes over this rank's data differ."""
        traits = self._functional.traits
        if not first.sizes or traits is None:
            return
        verdict = compare_passes(
            first,
            second,
            needs_fixed_order=self._needs_fixed_order,
            eps=traits.eps,
            draws_random=traits.random,
            drop_last=bool(getattr(self._source.data, "drop_last", False)),
        )
        if verdict is not None:
            raise RuntimeError(verdict)

    def _new_record(self) -> PassRecord:
        """Return an empty record of a pass."""
        return PassRecord(fixed_data=self._fixed_data)

    def _record(self, desc: str, predict: Predict | None = None) -> PassRecord:
        """Pass over the data with forward evaluations."""
        record = self._new_record()
        for batch in self.batches(desc):
            # The first batch is inspected: the watched prediction is the one that is recorded.
            first = self._functional.traits is None
            X = batch.X
            look = self._functional.inspect if first else self._functional.evaluate
            prediction = look(X, predict)
            record.add(batch, prediction, self.loss)
        return record


class _Sum:
    """Sums of lists of tensors; half precision is accumulated in float32.

    Unless gradients are recorded, summands are detached, lest the graphs of all batches stay alive,
    and added in place.
    """

    def __init__(self, recording: bool) -> None:
        self.tensors: list[Tensor] = []
        self.dtypes: list[torch.dtype] = []
        self.owned = False  # the first summands may be views of something else
        self._recording = recording

    def add(self, summands: list[Tensor]) -> None:
        """Add one summand to each tensor."""
        if not self._recording:
            summands = [t.detach() for t in summands]
        if not self.tensors:
            self.dtypes = [t.dtype for t in summands]
            self.tensors = [t.float() if t.itemsize < 4 else t for t in summands]
        else:
            for i, (total, t) in enumerate(zip(self.tensors, summands, strict=True)):
                self.tensors[i] = total.add_(t) if self.owned else total + t
            self.owned = not self._recording


def _widened(normalizer: Tensor | float) -> Tensor | float:
    """Convert a normalizer to the widest floating point type of its device."""
    if not isinstance(normalizer, Tensor):
        return float(normalizer)
    return normalizer.to(torch.float32 if normalizer.device.type == "mps" else torch.float64)


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that communicates such that no part of it is compiled.

    In a graph, it is refused; where the compiler may break the graph, it then runs what is refused.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "Products over several ranks (process_group) cannot be compiled as one graph: compile "
            "with fullgraph=False, which runs them without compilation, or do not compile them."
        )
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it takes long
        return torch.compiler.disable(function)
    return function


#: Why a product over several ranks does not record gradients.
RECORDING = (
    "Products over several ranks (process_group) cannot be differentiated: record_gradients is not "
    "supported. Build the operator without process_group, differentiate on each rank, and add the "
    "gradients of all ranks."
)
_EMPTY = "data is empty: there is no batch. (Or it can be iterated only once: pass a list.)"

__all__ = ["RECORDING", "EmpiricalRisk"]
