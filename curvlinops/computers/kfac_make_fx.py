"""KFAC's factors, gathered from a trace of the model's operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvlinops.computers._base import Key, KFACComputer, Statistic
from curvlinops.computers.containers import signature
from curvlinops.computers.flat_function import flat_function
from curvlinops.computers.make_fx import MakeFxCollector
from curvlinops.computers.tracing import HIDDEN, Trace, refuse_fixed, trace_model
from curvlinops.computers.usages import Usage
from curvlinops.kfac_utils import FisherType, KFACType, ParamGroup
from curvlinops.risk import Batch
from curvlinops.risk.data import TermCounter
from curvlinops.risk.model import ModelFunction, Predict, refuse_sharded


class MakeFxKFACComputer(KFACComputer):
    """Computes KFAC's factors from a graph of operations, for any model.

    The arguments are those of :class:`~curvlinops.KFACLinearOperator`. The model, an ``nn.Module``
    or a function ``(params, X) -> prediction``, is traced once for each shape of a batch; the
    layers are found among the operations. Inputs and output gradients of layers are turned into
    their second moments as soon as they exist, and no gradient of a weight is computed.

    Raises:
        NotImplementedError: If the derivative of the model is not that of its operations (custom
            autograd functions, hooks on gradients), or it uses transforms of ``torch.func``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = lambda p, X: nn.functional.linear(X, p["W"], p["b"])
        >>> params = {"W": torch.rand(2, 3), "b": torch.rand(2)}
        >>> data = [(torch.rand(4, 3), torch.rand(4, 2))]
        >>> computer = MakeFxKFACComputer(model, nn.MSELoss(), params, data)
        >>> inputs, gradients, mapping = computer.compute()
        >>> mapping
        [{'W': 'W'}, {'b': 'b'}]
        >>> inputs["W",].shape
        torch.Size([3, 3])
    """

    def __init__(self, *args: Any, **kwargs: Any):
        # with the tensors that the keys identify, lest others take their places
        self._traces: dict[Hashable, tuple[Trace, list[Any]]] = {}
        self._checked: Counter[Hashable] = Counter()  # how many batches the check has seen, by key
        super().__init__(*args, **kwargs)

    def _check_model(self, model_func: Any) -> None:
        """Raise if the backend cannot run the model."""
        refuse_sharded("backend='make_fx'", model_func, {})

    def _observe(
        self, X: Any, n: int, on_call: Callable[[Usage, int, Tensor], None]
    ) -> tuple[Tensor, Iterable[Usage], dict[str, str]]:
        """Evaluate the model; see the base class."""
        collector = MakeFxCollector(self._arrangements, on_call)
        trace = self._trace(X)
        prediction = collector.forward(trace, self.risk.params, X, n)
        self._note_hidden(trace, collector)
        return prediction.detach(), collector.calls, collector.other_uses

    def _predict(self, params: dict[str, Tensor], X: Any) -> Tensor:
        """Evaluate the model in the check, and trace it for the second batch of a shape.

        That saves the evaluation for a trace later. With the first, the check compares the model
        itself with the trace, in which whatever is not an operation happened once for all.
        """
        key, _ = self._key(X)
        self._checked[key] += 1
        if key in self._traces or self._checked[key] != 2:
            return self.risk.predict(params, X)
        predictions: list[Tensor] = []

        def predict(params: dict[str, Tensor], X: Any) -> Tensor:
            predictions.append(self.risk.predict(params, X))
            return predictions[0]

        self._trace(X, predict)
        return predictions[0]

    def _key(self, X: Any) -> tuple[Hashable, list[Any]]:
        """Return what batches with the same trace share, and the tensors that it identifies."""
        state = self.risk.dependencies()  # other tensors of the model, train/eval flags, autocast
        ids = (id(x) if isinstance(x, Tensor) else signature(x) for x in state)
        return (signature(X), *ids), state

    def _trace(self, X: Any, predict: Predict | None = None) -> Trace:
        """Return the trace for a batch.

        Args:
            X: Its input.
            predict: Evaluates the model, for those who want to know the prediction, too.
        """
        key, state = self._key(X)
        if key in self._traces:
            return self._traces[key][0]
        with self.risk.watching():
            trace = trace_model(predict or self.risk.predict, self.risk.params, X)
        if signature(X) is not None and trace.reusable:
            self._traces[key] = (trace, state)
        return trace

    def _run(self, statistic: Statistic, batch: Batch) -> tuple[Tensor, MakeFxCollector]:
        """Evaluate the model on a batch; see the base class."""
        collector = MakeFxCollector(
            self._arrangements, on_input=statistic.on_input, on_gradient=statistic.on_gradient
        )
        trace = self._trace(batch.X)
        prediction = collector.forward(trace, self._tensors, batch.X, batch.n)
        self._note_hidden(trace, collector)
        return prediction, collector

    def _note_hidden(self, trace: Trace, collector: MakeFxCollector) -> None:
        """Tell a collector of scripted modules' parameters that it did not see."""
        seen = {part.name for usage in collector.calls for part in usage.parts.values()}
        seen |= collector.other_uses.keys()
        hidden = {name: why for name, why in self._scripted.items() if name not in seen}
        # The gradients of the layers before are missing, too: diagonal blocks would not do.
        if trace.has_hidden_derivatives and (not hidden or self.unsupported == "diagonal"):
            raise NotImplementedError(HIDDEN)
        collector.other_uses |= hidden

    @property
    def _tensors(self) -> dict[str, Tensor]:
        """The parameters at which the trace is evaluated."""
        return self.risk.params


# --------------------------------------------------------------------------------------------------
# Functions of one batch
# --------------------------------------------------------------------------------------------------
class GivenNumbers:
    """A source of random numbers that returns those it was given.

    Args:
        uniforms: Uniforms on the open interval (0, 1), ``[m, draws]``; None to draw them from
            torch's global generator.
    """

    def __init__(self, uniforms: Tensor | None = None):
        self._given = uniforms
        #: The shape of the uniforms that were asked for; None if none were.
        self.shape: tuple[int, int] | None = None

    def uniforms(self, purpose: str, first_term: int, num_terms: int, draws: int) -> Tensor:
        """Return uniforms ``[num_terms, draws]``."""
        self.shape = (num_terms, draws)
        return open_uniforms(self.shape, None) if self._given is None else self._given

    def signs(self, purpose: str, first_term: int, num_terms: int, draws: int) -> Tensor:
        """Return signs ``[num_terms, draws]``: -1 where the uniform is below 1/2, else 1."""
        uniforms = self.uniforms(purpose, first_term, num_terms, draws)
        return (uniforms >= 0.5).to(torch.float64) * 2 - 1


def open_uniforms(shape: tuple[int, int], device: torch.device | None) -> Tensor:
    """Draw uniforms on the open interval (0, 1) from torch's global generator, in float64."""
    return torch.rand(shape, dtype=torch.float64, device=device).clamp(min=2.0**-54)


class OneBatch(KFACComputer):
    """Mixed into a computer: its passes are over one batch of given tensors.

    :meth:`given` sets them. The batch counts as all data.
    """

    _trace: Callable[..., Trace]

    @property
    def _tensors(self) -> dict[str, Tensor]:
        """The given parameters."""
        return self._params

    def set_up(self) -> None:
        """Find out how the model uses its parameters."""
        for batch in self.risk.batches(None):
            self._batch = batch
            self._params = self.risk.params
            self._look_first(batch)
            self._refusing(batch, partial(self._look_at_all_of, batch))
            refuse_fixed(self._trace(batch.X), self._params)
            self._look_no_more()
            return

    def _look_at_all_of(self, batch: Batch) -> None:
        """Note how the model uses its parameters for a whole batch, before that is traced."""
        prediction, usages, other_uses = self._observe(batch.X, batch.n, lambda *_: None)
        self._note(usages, other_uses)
        self._refuse_mistaken(prediction, batch)
        if self._keeps_terms_apart:
            self._where_in(prediction, batch)

    def given(self, params: dict[str, Tensor], X: Any, y: Any, uniforms: Tensor | None) -> None:
        """Set parameters, batch and random numbers."""
        self._params = params
        self._batch = Batch(X, y, self._batch.n)
        self._random = GivenNumbers(uniforms)  # type: ignore[assignment]

    def random_shape(self) -> tuple[int, int] | None:
        """Return the shape of the random numbers of the batch; None if it needs none."""
        prediction, *_ = self._observe(self._batch.X, self._batch.n, lambda *_: None)
        F, targets = self.loss.terms(prediction, self._batch.y)
        numbers = GivenNumbers()
        before, self._random = self._random, numbers  # type: ignore[assignment]
        next(self._vectors(self._batch, F, targets, TermCounter()), None)
        self._random = before
        return numbers.shape

    def _gather(self, statistic: Statistic, what: str, signs: str) -> Tensor | float:
        """Pass over the batch."""
        normalizer = self._visit(statistic, self._batch, TermCounter(), signs)
        return 1.0 if self.risk.reduction == "sum" else 1 / normalizer


class _OneBatchKFACComputer(OneBatch, MakeFxKFACComputer):
    """Computes KFAC's factors of one batch."""


def make_compute_kfac_batch(
    model_func: ModelFunction,
    loss_func: Callable[[Any, Any], Tensor],
    params: dict[str, Tensor],
    X: Any,
    y: Any,
    fisher_type: FisherType | str = FisherType.MC,
    mc_samples: int = 1,
    kfac_approx: KFACType | str = KFACType.EXPAND,
    separate_weight_and_bias: bool = True,
    **options: Any,
) -> tuple[
    Callable[..., tuple[dict[Key, Any], dict[Key, Any]]],
    list[ParamGroup],
]:
    r"""Return a function that computes KFAC's factors of a batch, one flat graph of operations.

    The factors are those of :class:`~curvlinops.KFACLinearOperator` with this batch as all the
    data,

    .. math::
        A_l = \frac{1}{S_\text{total}} \sum_{n, s} a_{n, s} a_{n, s}^\top, \qquad
        B_l = c \sum_m \sum_v \sum_s g_{m, v, s} g_{m, v, s}^\top.

    Forward pass, derivatives and products are operations of the graph, without Python code in
    between: ``torch.compile(fn, fullgraph=True)`` has no graph breaks.

    Args:
        model_func: An ``nn.Module``, or a function ``(params, X) -> prediction``. A module's other
            parameters and buffers are those it has now.
        loss_func: The loss function, with reduction ``"mean"`` or ``"sum"``.
        params: The parameters by name.
        X: Inputs of a batch like those that the function will get.
        y: Targets of the batch.
        fisher_type: Which vectors are back-propagated, see :class:`~curvlinops.FisherType`.
        mc_samples: Number of samples per loss term, for ``fisher_type="mc"``.
        kfac_approx: How positions are treated, see :class:`~curvlinops.KFACType`.
        separate_weight_and_bias: Whether the weight and bias of a layer have separate blocks.
        options: ``batch_size_fn``, ``num_per_example_loss_terms``, ``loss_terms`` and
            ``max_factor_size`` of :class:`~curvlinops.KFACLinearOperator`.

    Returns:
        ``fn`` and the list of groups. ``fn(params, X, y, uniforms=None)`` returns input covariances
        and gradient covariances, as :meth:`MakeFxKFACComputer.compute` does, for arguments of the
        same shapes. ``uniforms`` are numbers in (0, 1), float64 on the parameters' device: for
        ``"mc"`` those of the samples, ``[m, mc_samples * draws]`` for m loss terms; for
        ``"type-2"`` and ``"empirical"`` with several loss terms per example those of the random
        signs (-1 below 1/2, else 1), ``[m, num_vectors]``, where the vectors are the columns of the
        loss Hessian's root (one less than classes for cross-entropy), or the gradient. By default
        they come from torch's global random number generator. Otherwise there are none.

    Raises:
        NotImplementedError: If parameters are not in supported layers, or what the model computes
            depends on entries of tensors in other ways than by operations.
        ValueError: By ``fn``, for arguments of other shapes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(3, 2)
        >>> params = dict(model.named_parameters())
        >>> X, y = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
        >>> fn, mapping = make_compute_kfac_batch(model, nn.CrossEntropyLoss(), params, X, y)
        >>> inputs, gradients = fn(params, X, y)
        >>> inputs["weight",].shape, gradients["weight",].shape, gradients["bias",].shape
        (torch.Size([3, 3]), torch.Size([2, 2]), torch.Size([2, 2]))
    """
    computer = one_batch(
        _OneBatchKFACComputer,
        model_func,
        loss_func,
        params,
        X,
        y,
        fisher_type=fisher_type,
        mc_samples=mc_samples,
        kfac_approx=kfac_approx,
        separate_weight_and_bias=separate_weight_and_bias,
        **options,
    )

    def compute(
        params: dict[str, Tensor], X: Any, y: Any, uniforms: Tensor | None
    ) -> tuple[dict[Key, Any], dict[Key, Any]]:
        computer.given(params, X, y, uniforms)
        inputs, gradients, _ = computer.compute()
        return inputs, gradients

    call = batch_function(computer, compute, [])

    def fn(
        params: dict[str, Tensor], X: Any, y: Any, uniforms: Tensor | None = None
    ) -> tuple[dict[Key, Any], dict[Key, Any]]:
        """Return the input covariances and the gradient covariances of a batch."""
        result: tuple[dict[Key, Any], dict[Key, Any]] = call(params, X, y, uniforms)
        return result

    return fn, computer.mapping


def one_batch(
    kind: type[OneBatch],
    model_func: ModelFunction,
    loss_func: Callable[[Any, Any], Tensor],
    params: dict[str, Tensor],
    X: Any,
    y: Any,
    **options: Any,
) -> Any:
    """Return a computer of one batch that knows how the model uses its parameters."""
    computer = kind(
        model_func,
        loss_func,
        params,
        [(X, y)],
        check_deterministic=False,
        num_data=1,  # is not used: there is no pass over the data
        **options,
    )
    if options.get("unsupported", "raise") != "raise":
        raise ValueError("unsupported='diagonal' needs more than one pass: use the operator.")
    with computer.risk.undisturbed():
        computer.set_up()
    return computer


def batch_function(
    computer: OneBatch, compute: Callable[..., Any], further: list[tuple[str, Any]]
) -> Callable[..., Any]:
    """Return a function of parameters, batch and further arguments, and uniforms, as one graph.

    Args:
        computer: The computer of a batch, after :meth:`OneBatch.set_up`.
        compute: Computes results from parameters, X, y, further arguments and uniforms.
        further: Names and values of further arguments.

    Returns:
        The function, which draws the uniforms if they are None.
    """
    X, y = computer._batch.X, computer._batch.y
    detached = {name: p.detach() for name, p in computer.risk.params.items()}
    device = computer.risk.device
    with computer.risk.undisturbed():
        shape = computer.random_shape()
        uniforms = None if shape is None else open_uniforms(shape, device)
        call = flat_function(
            compute,
            ["params", "X", "y", *(name for name, _ in further), "uniforms"],
            [detached, X, y, *(value for _, value in further), uniforms],
        )

    def fn(params: dict[str, Tensor], X: Any, y: Any, *arguments: Any) -> Any:
        *others, uniforms = arguments
        if uniforms is not None:
            uniforms = uniforms.to(device, torch.float64)
        elif shape is not None:
            uniforms = open_uniforms(shape, device)
        return call(params, X, y, *others, uniforms)

    return fn


__all__ = ["MakeFxKFACComputer", "make_compute_kfac_batch"]
