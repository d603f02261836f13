"""Traces: the operations that a model calls, as a graph, and what such a graph would miss."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.module_tracker
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from curvlinops.computers.callers import called_by
from curvlinops.computers.containers import flattened, refilled
from curvlinops.computers.usages import Parameters, tensors_in

aten = torch.ops.aten


@dataclass
class Trace:
    """A traced model.

    Attributes:
        graph: Operations of a function of the parameters, in order, and the tensors of X.
        reusable: Whether it is that of all batches with the same :func:`signature`: not if a
            Python number, a shape or a constant depends on the entries of a tensor.
        has_hidden_derivatives: Whether derivatives of the prediction are missing: ``torch.jit``
            computes some itself, and then its operations are traced with detached tensors.
    """

    graph: GraphModule
    reusable: bool
    has_hidden_derivatives: bool = False


def trace_model(
    predict: Callable[[dict[str, Tensor], Any], Tensor], params: dict[str, Tensor], X: Any
) -> Trace:
    """Trace a model.

    The graph has the operations that the model calls, before they are taken apart: layers such as
    ``aten.linear`` and ``aten.conv2d`` are single operations, and ``no_grad`` is a part of it. The
    model's other parameters and buffers are tensors of the graph.

    Args:
        predict: Evaluates the model.
        params: The parameters.
        X: Inputs of a batch. They are cloned: a model that changes them does no harm.

    Returns:
        The trace.

    Raises:
        NotImplementedError: If the derivative of the model is not that of its operations: it uses
            custom autograd functions, hooks on gradients, or transforms of ``torch.func``.

    Example:
        >>> params = {"W": torch.ones(1, 2)}
        >>> trace = trace_model(lambda p, x: x @ p["W"].T, params, torch.ones(3, 2))
        >>> [str(node.target) for node in trace.graph.graph.nodes if node.op == "call_function"]
        ['aten.numpy_T.default', 'aten.matmul.default']
    """
    guard, inner = _Guard(), _InnerOperations()
    names = list(params)
    hidden = False

    def forward(*tensors: Tensor) -> Tensor:
        nonlocal hidden
        given = dict(zip(names, tensors[: len(names)], strict=True))
        with guard, inner:
            prediction = predict(given, refilled(X, tensors[len(names) :]))
        derivatives = _derivatives(prediction)
        _refuse_custom_functions(derivatives)
        hidden = any("DifferentiableGraph" in node.name() for node in derivatives)
        return prediction

    # Tensors require gradients, so that custom autograd functions show in the prediction's graph.
    tensors = [p.detach().requires_grad_() for p in params.values()]
    tensors += [_cloned(x) for x in flattened(X)]
    with torch.enable_grad(), one_fake_mode(), _compiled_functions_traced():
        tracer = make_fx(
            forward, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False
        )
        graph = tracer(*tensors)
    reads = guard.reads_entries or inner.read_entries or any(map(reads_entries, graph.graph.nodes))
    # as_subclass, for one, returns a tensor that the trace takes for a constant
    inputs = Parameters({str(i): x for i, x in enumerate(tensors[len(names) :])})
    reads |= bool(inputs.involved(_constants(graph)))
    return Trace(graph, not reads, hidden)


def refuse_fixed(trace: Trace, params: dict[str, Tensor]) -> None:
    """Raise if a trace is wrong for other parameters, or other inputs of the same shape.

    Args:
        trace: The trace.
        params: The parameters.

    Raises:
        NotImplementedError: If the model reads parameters elsewhere than from its arguments, or if
            a number, a shape or a constant in the trace depends on entries of tensors.
    """
    if not trace.reusable:
        raise NotImplementedError(READS_ENTRIES)
    fixed = Parameters(params).involved(_constants(trace.graph))
    if fixed:
        raise NotImplementedError(
            f"The model reads the parameters {sorted(fixed)} elsewhere than from those it is given."
            " Use an operator with backend='hooks', or leave them out of params."
        )


def _constants(graph: GraphModule) -> list[Any]:
    """Return the constants of a traced graph."""
    nodes = [node for node in graph.graph.nodes if node.op == "get_attr"]
    return [getattr(graph, str(node.target)) for node in nodes]


def _cloned(x: Tensor) -> Tensor:
    """Return a copy that autograd treats as it does the tensor."""
    return x.detach().clone().requires_grad_(x.requires_grad)


@contextmanager
def one_fake_mode() -> Iterator[None]:
    """Let all nodes of a graph share what describes their results: a third of the time to trace.

    To be used around ``make_fx``.
    """
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        yield


def _compiled_functions_traced() -> AbstractContextManager[Any]:
    """Return a context in which what ``torch.compile`` returned is traced as it was before."""
    dynamo = sys.modules.get("torch._dynamo")  # to import it takes long, and nothing is compiled
    return dynamo.config.patch(error_on_nested_fx_trace=False) if dynamo else nullcontext()


def reads_entries(node: Node) -> bool:
    """Return whether a number or a shape that a node returns depends on entries of tensors.

    A trace with such a node is right for the tensors it was made with only.

    Args:
        node: A node of a traced graph.
    """
    func = node.target
    return isinstance(func, torch._ops.OpOverload) and _reads_entries(func, node.args)


def _reads_entries(func: torch._ops.OpOverload, args: Any) -> bool:
    """Return whether a number or a shape that an operation returns depends on entries."""
    if func is aten.index.Tensor:
        return any(_is_mask(x) for x in args[1] if x is not None)
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in func.tags for tag in tags) or func in _UNTAGGED


#: Operations that lack these tags, and read entries where no other operation shows it.
_UNTAGGED = {
    # lengths of sequences
    aten._pack_padded_sequence.default,
    aten.gru.data,
    aten.lstm.data,
    aten.rnn_relu.data,
    aten.rnn_tanh.data,
    # where entries are not zero, or are at the same place
    aten._to_sparse.default,
    aten._to_sparse.sparse_dim,
    aten._to_sparse_bsc.default,
    aten._to_sparse_bsr.default,
    aten._to_sparse_csc.default,
    aten._to_sparse_csr.default,
    aten._coalesce.default,
    aten._nested_tensor_from_mask.default,
    # how integers stand for numbers
    aten.q_scale.default,
    aten.q_zero_point.default,
}


def _is_mask(index: Any) -> bool:
    """Return whether an index selects the places where it is true."""
    described = index.meta.get("val") if isinstance(index, Node) else index
    return described is None or described.dtype in (torch.bool, torch.uint8)


class _InnerOperations(TorchDispatchMode):
    """Sees the operations that those in a trace are composed of, and whether they read entries."""

    def __init__(self) -> None:
        super().__init__()
        self.read_entries = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.read_entries |= _reads_entries(func, args)
        return func(*args, **(kwargs or {}))


#: The error for a trace that is right for some entries only.
READS_ENTRIES = (
    "The model's numbers, shapes or constants depend on the entries of tensors, so there is no "
    "graph of operations for all batches of this shape. Use an operator with backend='hooks'."
)
#: The error for a trace that lacks derivatives.
HIDDEN = (
    "The backend 'make_fx' sees a model's operations only, but torch.jit computes derivatives of "
    "scripted parts of the model itself. Use backend='hooks'."
)
_NOT_TRACED = (
    "The backend 'make_fx' sees a model's operations only, but the model {}. Use backend='hooks'."
)

#: Functions whose effects are not operations.
_REFUSED = {
    "backward": "backward",
    "register_hook": "register_hook, for hooks on gradients",
    "register_multi_grad_hook": "register_multi_grad_hook, for hooks on gradients",
}


#: Functions that return entries of a tensor so that no operation shows it.
_READING = ("tolist", "numpy", "__array__", "__dlpack__")
#: Functions that do, if they are given tensors in a sequence.
_MAKING = ("tensor", "as_tensor", "asarray", "new_tensor")


def _made_of_tensors(*args: Any) -> bool:
    """Return whether a tensor's entries are given as a sequence of tensors."""
    return any(isinstance(x, Sequence) and bool(tensors_in([x])) for x in args)


class _Guard(TorchFunctionMode):
    """Sees the functions that a model calls; puts into the trace, or refuses, what it misses."""

    def __init__(self) -> None:
        super().__init__()
        self._recording = True  # whether the traced operations record gradients
        #: Whether entries of tensors were read.
        self.reads_entries = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            return self._set_recording(*args, **kwargs)
        name, owner = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if getattr(owner, "__name__", "") == "data" and name == "__get__":
            return args[0].detach()  # the same, but traced
        if func is torch.autograd.grad:
            return self._differentiate(args, kwargs)
        self.reads_entries |= name in _READING or (name in _MAKING and _made_of_tensors(*args))
        if name == "register_hook" and called_by(torch.utils.module_tracker):
            return func(*args, **kwargs)  # that of a tool, which counts operations: it only listens
        if name in _REFUSED or (getattr(owner, "__name__", "") == "data" and name == "__set__"):
            raise NotImplementedError(_NOT_TRACED.format(f"calls {_REFUSED.get(name, 'data')}"))
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(_NOT_TRACED.format("uses a transform of torch.func"))
        if not torch._C._is_fwd_grad_enabled() and self._recording:
            return self._call_unrecorded(func, args, kwargs)
        if torch._C._is_fwd_grad_enabled() and torch.is_grad_enabled() != self._recording:
            self._set_recording(torch.is_grad_enabled())  # by inference_mode(False) in no_grad
        return func(*args, **kwargs)

    def _set_recording(self, enabled: bool) -> None:
        """Enable or disable gradients, and put that into the trace, unless it has no effect."""
        if not torch._C._is_fwd_grad_enabled():
            # In inference mode, and in custom autograd functions, nothing is recorded either way.
            # That they end is not traced, so that the trace would be left as this call leaves it.
            _set_grad_enabled_untraced(enabled)
            return
        self._recording = enabled
        torch._C._set_grad_enabled(enabled)  # is traced

    def _differentiate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Differentiate in the forward pass, if the result is a constant."""
        if kwargs.get("create_graph") or (len(args) > 4 and args[4]):
            raise NotImplementedError(_NOT_TRACED.format("calls autograd.grad with create_graph"))
        # What was saved for the backward pass is in the trace as a constant: right for this batch.
        self.reads_entries = True
        with self._unrecorded():
            return torch.autograd.grad(*args, **kwargs)

    def _call_unrecorded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function where gradients are disabled in ways that are not traced."""
        if not torch.is_inference_mode_enabled():
            if any(x.requires_grad for x in tensors_in([args, kwargs])):
                raise _custom_function("")
            return func(*args, **kwargs)
        with self._unrecorded():
            return func(*args, **kwargs)

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """Trace what is called inside as in ``no_grad``."""
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # is traced
        try:
            yield
        finally:
            torch._C._set_grad_enabled(self._recording)  # is traced
            _set_grad_enabled_untraced(before)


def _set_grad_enabled_untraced(enabled: bool) -> None:
    """Enable or disable gradients without an operation in the trace."""
    with torch._C.DisableTorchFunction():
        torch._C._set_grad_enabled(enabled)


def _custom_function(name: str) -> NotImplementedError:
    """Return the error for a function with a derivative of its own."""
    described = f"uses a custom autograd function{name and f' ({name})'}"
    return NotImplementedError(_NOT_TRACED.format(described))


def _derivatives(prediction: Tensor) -> list[Any]:
    """Return the functions in autograd's graph of a prediction, from its end."""
    seen: dict[Any, None] = {}
    todo = [prediction.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen[node] = None
        todo.extend(following for following, _ in node.next_functions)
    return list(seen)


def _refuse_custom_functions(derivatives: list[Any]) -> None:
    """Raise if there is a custom autograd function in the graph of a prediction."""
    for node in derivatives:
        function = getattr(type(node), "_forward_cls", None)
        if function is not None:
            raise _custom_function(function.__name__)


__all__ = [
    "HIDDEN",
    "READS_ENTRIES",
    "Trace",
    "one_fake_mode",
    "reads_entries",
    "refuse_fixed",
    "trace_model",
]
