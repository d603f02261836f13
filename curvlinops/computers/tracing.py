"""Traces: the operations that a model calls, as a graph, and what such a graph would miss."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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
    guard = _Guard()
    names = list(params)
    hidden = False

    def forward(*tensors: Tensor) -> Tensor:
        nonlocal hidden
        given = dict(zip(names, tensors[: len(names)], strict=True))
        with guard:
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
    reusable = not guard.reads_entries and not any(map(reads_entries, graph.graph.nodes))
    return Trace(graph, reusable, hidden)


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
    nodes = [node for node in trace.graph.graph.nodes if node.op == "get_attr"]
    fixed = Parameters(params).involved([getattr(trace.graph, str(node.target)) for node in nodes])
    if fixed:
        raise NotImplementedError(
            f"The model reads the parameters {sorted(fixed)} elsewhere than from those it is given."
            " Use an operator with backend='hooks', or leave them out of params."
        )


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
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    if any(tag in node.target.tags for tag in tags) or node.target is aten.item.default:
        return node.target is not aten.index.Tensor or _has_mask(node)
    return node.target is aten.index.Tensor and _has_mask(node)


def _has_mask(node: Node) -> bool:
    """Return whether an indexing operation selects the places where a mask is true."""
    indices = [x for x in node.args[1] if isinstance(x, Node)]  # type: ignore[union-attr]
    described = [x.meta.get("val") for x in indices]
    return any(val is None or val.dtype in (torch.bool, torch.uint8) for val in described)


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
        self.reads_entries |= name in ("tolist", "numpy", "__array__")
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
