"""The collector that traces a model into a graph of operations, and listens while it runs that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from curvlinops.computers.arrangement import BATCH_FIRST, Arrangements, spread
from curvlinops.computers.layers import read_operation
from curvlinops.computers.positions import Positions
from curvlinops.computers.usages import Parameters, Usage, tensors_in
from curvlinops.diag import DiagonalLinearOperator

aten = torch.ops.aten


# --------------------------------------------------------------------------------------------------
# Nested containers of tensors
# --------------------------------------------------------------------------------------------------
def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to all tensors in nested mappings, lists, tuples and diagonal operators.

    Args:
        value: A tensor, a container, or anything else.
        function: The function.

    Returns:
        The value with new tensors. Containers are copied and keep their type; anything else is
        returned as it is.

    Example:
        >>> mapped({"a": [torch.zeros(2), 1]}, lambda t: t.shape)
        {'a': [torch.Size([2]), 1]}
    """
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is dict:  # apart: this can be traced by torch.compile
        return {key: mapped(entry, function) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)([mapped(entry, function) for entry in value])
    if isinstance(value, DiagonalLinearOperator):
        return DiagonalLinearOperator([function(entry) for entry in value.tensors()])
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(entry, function) for entry in value))
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        for key in list(result):
            result[key] = mapped(result[key], function)
        return result
    return value


def flattened(value: Any) -> list[Tensor]:
    """Return the tensors in a nested container, in a fixed order.

    Args:
        value: What :func:`mapped` takes.

    Returns:
        The tensors.

    Example:
        >>> flattened({"a": [torch.zeros(2), 1], "b": torch.ones(1)})
        [tensor([0., 0.]), tensor([1.])]
    """
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, keep)
    return found


def refilled(value: Any, tensors: Sequence[Any]) -> Any:
    """Put other tensors into a nested container.

    Args:
        value: What :func:`mapped` takes.
        tensors: As many tensors as :func:`flattened` returns.

    Returns:
        A copy of the container with these tensors.

    Example:
        >>> refilled({"a": [torch.zeros(2), 1]}, [torch.ones(1)])
        {'a': [tensor([1.]), 1]}
    """
    position = 0

    def following(_: Tensor) -> Any:
        nonlocal position
        position += 1
        return tensors[position - 1]

    return mapped(value, following)


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, slice)


def signature(value: Any, layout: bool = True) -> Hashable | None:
    """Return what a trace depends on, besides the tensors' entries.

    Args:
        value: What :func:`mapped` takes.
        layout: Whether the tensors' strides, and whether they require gradients, belong to it.

    Returns:
        Something that is equal for containers of the same structure, with tensors of the same
        shapes, dtypes and devices; None if the container holds an object that may hold anything.

    Example:
        >>> X = {"a": torch.zeros(2), "b": 3}
        >>> signature(X) == signature({"a": torch.ones(2), "b": 3})
        True
        >>> signature(X) == signature({"a": torch.ones(2), "b": 4})
        False
    """
    if isinstance(value, Tensor):
        basic = (tuple(value.shape), value.dtype, value.device)
        return (*basic, value.stride(), value.requires_grad) if layout else basic
    if isinstance(value, DiagonalLinearOperator):
        children, keys = value.tensors(), None
    elif isinstance(value, MutableMapping):
        children, keys = list(value.values()), tuple(value.keys())
    elif isinstance(value, (list, tuple)):
        children, keys = list(value), None
    else:
        return ("constant", type(value), value) if isinstance(value, _PLAIN) else None
    parts = [signature(child, layout) for child in children]
    return None if None in parts else (type(value), keys, *parts)


def _reordered(value: Any, like: Any) -> Any:
    """Return a dictionary with its keys in the order of another one, if they are the same."""
    if type(value) is not dict or type(like) is not dict or set(value) != set(like):
        return value
    return {key: value[key] for key in like}


# --------------------------------------------------------------------------------------------------
# Traces
# --------------------------------------------------------------------------------------------------
@dataclass
class Trace:
    """A traced model.

    Attributes:
        graph: Operations of a function of the parameters, in order, and the tensors of X.
        reusable: Whether it is that of all batches with the same :func:`signature`: not if a
            Python number, a shape or a constant depends on the entries of a tensor.
    """

    graph: GraphModule
    reusable: bool


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

    def forward(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors[: len(names)], strict=True))
        with guard:
            prediction = predict(given, refilled(X, tensors[len(names) :]))
        _refuse_custom_functions(prediction)
        return prediction

    # Tensors require gradients, so that custom autograd functions show in the prediction's graph.
    tensors = [p.detach().requires_grad_() for p in params.values()]
    tensors += [_cloned(x) for x in flattened(X)]
    with torch.enable_grad(), _one_fake_mode():
        tracer = make_fx(
            forward, tracing_mode="real", pre_dispatch=True, _error_on_data_dependent_ops=False
        )
        graph = tracer(*tensors)
    reusable = not guard.reads_entries and not any(map(_reads_entries, graph.graph.nodes))
    return Trace(graph, reusable)


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
        raise NotImplementedError(_READS_ENTRIES)
    nodes = [node for node in trace.graph.graph.nodes if node.op == "get_attr"]
    fixed = Parameters(params).involved([getattr(trace.graph, str(node.target)) for node in nodes])
    if fixed:
        raise NotImplementedError(
            f"The model reads the parameters {sorted(fixed)} elsewhere than from those it is given."
        )


def _cloned(x: Tensor) -> Tensor:
    """Return a copy that autograd treats as it does the tensor."""
    return x.detach().clone().requires_grad_(x.requires_grad)


@contextmanager
def _one_fake_mode() -> Iterator[None]:
    """Let all nodes of a graph share what describes their results: a third of the time to trace."""
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        yield


def _reads_entries(node: Node) -> bool:
    """Return whether a number or a shape that a node returns depends on entries of tensors."""
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


_READS_ENTRIES = (
    "The model's numbers, shapes or constants depend on the entries of tensors, so there is no "
    "graph of operations for all batches of this shape."
)
_NOT_TRACED = "The backend 'make_fx' sees a model's operations only, but the model {}"

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
            self._recording = args[0]
            return func(*args, **kwargs)
        name, owner = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if getattr(owner, "__name__", "") == "data" and name == "__get__":
            return args[0].detach()  # the same, but traced
        if func is torch.autograd.grad:
            return self._differentiate(args, kwargs)
        self.reads_entries |= name in ("tolist", "numpy", "__array__")
        if name in _REFUSED or (getattr(owner, "__name__", "") == "data" and name == "__set__"):
            raise NotImplementedError(_NOT_TRACED.format(f"calls {_REFUSED.get(name, 'data')}."))
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(_NOT_TRACED.format("uses a transform of torch.func."))
        if self._recording and not torch.is_grad_enabled():
            return self._call_unrecorded(func, args, kwargs)
        return func(*args, **kwargs)

    def _differentiate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Differentiate in the forward pass, if the result is a constant."""
        if kwargs.get("create_graph") or (len(args) > 4 and args[4]):
            raise NotImplementedError(_NOT_TRACED.format("calls autograd.grad with create_graph."))
        # What was saved for the backward pass is in the trace as a constant: right for this batch.
        self.reads_entries = True
        with torch.no_grad():  # is traced
            return torch.autograd.grad(*args, **kwargs)

    def _call_unrecorded(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function where gradients are disabled in ways that are not traced."""
        if not torch.is_inference_mode_enabled():
            if any(x.requires_grad for x in tensors_in([args, kwargs])):
                raise _custom_function("")
            return func(*args, **kwargs)
        torch._C._set_grad_enabled(False)  # is traced
        try:
            return func(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)
            with torch._C.DisableTorchFunction():  # is not traced
                torch._C._set_grad_enabled(False)


def _custom_function(name: str) -> NotImplementedError:
    """Return the error for a function with a derivative of its own."""
    described = f"uses a custom autograd function{name and f' ({name})'}. Use backend='hooks'."
    return NotImplementedError(_NOT_TRACED.format(described))


def _refuse_custom_functions(prediction: Tensor) -> None:
    """Raise if there is a custom autograd function in the graph of a prediction."""
    seen, todo = set(), [prediction.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(type(node), "_forward_cls", None)
        if function is not None:
            raise _custom_function(function.__name__)
        todo.extend(following for following, _ in node.next_functions)


# --------------------------------------------------------------------------------------------------
# The collector
# --------------------------------------------------------------------------------------------------
class MakeFxCollector:
    """Runs a traced model; reports the inputs of layers, and the gradients of their outputs.

    A layer is an operation that is called with parameters: see
    :mod:`curvlinops.computers.layers`. Weights need no gradients: the graph of derivatives starts
    at the layers' outputs. A layer that is called without recording gradients does not count as a
    use of its parameters.

    Args:
        arrangements: Where the examples are, if not along the first axis.
        on_call: Called with a usage, the number of the call in this batch (a layer can be called
            repeatedly), and the layer's input as it is.
        on_input: Called with a usage, the number of the call, and the positions.
        on_gradient: Called with a usage, the number of the call, and the output gradients of V loss
            vectors ``[V, n, S, d_out]``. Layers that the prediction does not depend on have none.

    Example:
        >>> params = {"W": torch.ones(1, 2)}
        >>> X = torch.ones(3, 2)
        >>> predict = lambda p, x: torch.nn.functional.linear(x, p["W"])
        >>> gradients = []
        >>> collector = MakeFxCollector(
        ...     Arrangements(), on_gradient=lambda *event: gradients.append(event[2])
        ... )
        >>> prediction = collector.forward(trace_model(predict, params, X), params, X, n=3)
        >>> collector.backward(prediction, torch.ones(3, 1))
        >>> [gradient.shape for gradient in gradients]
        [torch.Size([1, 3, 1, 1])]
    """

    def __init__(
        self,
        arrangements: Arrangements,
        on_call: Callable[[Usage, int, Tensor], None] | None = None,
        on_input: Callable[[Usage, int, Positions], None] | None = None,
        on_gradient: Callable[[Usage, int, Tensor], None] | None = None,
    ):
        self._arrangements = arrangements
        self._on_call = on_call
        self._on_input = on_input
        self._on_gradient = on_gradient
        self._root = torch.empty(0)
        self._n = 0
        #: How often each usage occurred in this batch.
        self.calls: dict[Usage, int] = {}
        #: Parameters that are used in other ways in this batch, and how.
        self.other_uses: dict[str, str] = {}

    def forward(self, trace: Trace, params: dict[str, Tensor], X: Any, n: int) -> Tensor:
        """Evaluate a traced model.

        Args:
            trace: The trace, for inputs like X.
            params: The tensors at which the model is evaluated.
            X: Inputs of a batch.
            n: The number of examples.

        Returns:
            The prediction.

        Raises:
            ValueError: If a layer's inputs cannot be divided among the examples.
        """
        self._n = n
        self.calls, self.other_uses = {}, {}
        device = next(iter(params.values())).device
        self._root = torch.empty(0, device=device, requires_grad=True)
        detached = {name: p.detach() for name, p in params.items()}
        runner = _Runner(trace.graph, self, Parameters(detached))
        with torch.enable_grad():
            prediction: Tensor = runner.run(*detached.values(), *flattened(X))
        return prediction

    def backward(self, F: Tensor, vector: Tensor, last: bool = False) -> None:
        """Back-propagate a loss vector to the layers' outputs.

        Args:
            F: Predictions ``[m, C]`` of the forward pass before.
            vector: Loss vector ``[m, C]``.
            last: Whether the graph can be freed.
        """
        if not F.requires_grad:
            return  # the prediction depends on none of the layers
        torch.autograd.grad(F, self._root, vector, retain_graph=not last, allow_unused=True)

    def on_call(self, usage: Usage, x: Tensor, output: Tensor) -> Tensor:
        """A layer was called; return its output."""
        index = self.calls.get(usage, 0)
        self.calls[usage] = index + 1
        n, form = self._n, usage.format
        where = self._arrangements.of(usage, index, x.detach(), n)
        with torch.no_grad():
            if self._on_call is not None:
                self._on_call(usage, index, x.detach())
            if self._on_input is not None:
                inputs = where.examples_first(x.detach(), n)
                self._on_input(usage, index, form.positions(inputs, n, usage.label))
        if where.axis is None:
            output, where = spread(output, n).clone(), BATCH_FIRST
        if self._on_gradient is None:
            return output

        def on_gradient(gradient: Tensor) -> None:
            with torch.no_grad():
                gradient = where.examples_first(gradient, n)
                shared = form.gradients(gradient, n, usage.label).unsqueeze(0)
                assert self._on_gradient is not None
                self._on_gradient(usage, index, shared)

        heard: Tensor = _Report.apply(output, self._root, on_gradient)
        return heard


class _Report(torch.autograd.Function):
    """The identity, which depends on a root, too, and reports its gradient.

    An edge of the graph of derivatives would not do: the one at a view, such as the output of a
    linear layer can be, is left aside if an activation changes the view in place.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, root: Tensor, on_gradient: Callable[[Tensor], None]
    ) -> Tensor:
        """Return the output itself, so that in-place activations may change it."""
        ctx.on_gradient = on_gradient
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Report the gradient; the root gets none."""
        ctx.on_gradient(gradient)
        return gradient, None, None


class _Runner(Interpreter):
    """Runs a traced model operation by operation, and tells the collector of layers."""

    def __init__(self, graph: GraphModule, collector: MakeFxCollector, params: Parameters):
        super().__init__(graph)
        self.extra_traceback = False  # which would lengthen error messages
        self._collector = collector
        self._params = params
        self._constants: dict[int, Tensor] = {}  # views of parameters that are detached

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call an operation."""
        involved = self._involved(args, kwargs)
        call = read_operation(target, args, kwargs) if involved else None
        usage = None if call is None else self._params.usage(call)
        output = super().call_function(target, args, kwargs)
        name = _name(target)
        if not involved or name == "detach" or not torch.is_grad_enabled():
            self._note_constants(output)
        elif call is not None and usage is not None and (usage.weight or usage.bias):
            output = self._collector.on_call(usage, call.x, output)
        elif self._depends(name, args, output):
            for parameter in involved:
                self._collector.other_uses.setdefault(parameter, f"used by {name}")
        return output

    def _involved(self, *values: Any) -> set[str]:
        """Return the parameters among arguments that are not detached."""
        tensors = [x for x in tensors_in(values) if id(x) not in self._constants]
        return self._params.involved(tensors)

    def _note_constants(self, output: Any) -> None:
        """Note the detached views among results; they are held, so that their ids stay theirs."""
        for x in tensors_in([output]):
            if self._params.owners(x):
                self._constants[id(x)] = x

    def _depends(self, name: str, args: Any, result: Any) -> bool:
        """Return whether an operation's result depends on parameters in a differentiable way.

        A view of a parameter does not count: what matters is how the view is used.
        """
        if name.startswith("new_") or name.endswith("_like"):
            return False
        if (name == "to" or name.endswith("_as")) and not self._involved(args[:1]):
            return False  # brings something to the dtype, ... of a parameter
        results = [x for x in tensors_in([result]) if x.is_floating_point() or x.is_complex()]
        return not all(self._params.owners(x) for x in results)


def _name(target: Any) -> str:
    """Return the name of an operation without its overload."""
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet))


# --------------------------------------------------------------------------------------------------
# Functions as flat graphs
# --------------------------------------------------------------------------------------------------
def flat_function(
    function: Callable[..., Any], names: Sequence[str], arguments: Sequence[Any]
) -> Callable[..., Any]:
    """Turn a function of tensors in nested containers into a flat graph of operations.

    Derivatives taken inside are operations of the graph, so that ``torch.compile`` can compile it
    as a whole.

    Args:
        function: The function. What it does must not depend on the tensors' entries.
        names: What errors call the arguments.
        arguments: Arguments to trace it with, as :func:`mapped` takes them.

    Returns:
        The function for arguments of the same structures and shapes. It raises ``ValueError`` for
        others.

    Raises:
        NotImplementedError: If a number or a shape depends on the tensors' entries.

    Example:
        >>> double = flat_function(lambda x: {"twice": 2 * x}, ["x"], [torch.ones(2)])
        >>> double(torch.zeros(2))
        {'twice': tensor([0., 0.])}
    """
    arguments = list(arguments)
    expected = [signature(argument, layout=False) for argument in arguments]
    if None in expected:
        name = names[expected.index(None)]
        raise NotImplementedError(f"{name} holds objects that cannot be traced: use tensors only.")
    shapes = [mapped(argument, lambda t: list(t.shape)) for argument in arguments]
    template: Any = None

    def flat(*tensors: Tensor) -> list[Tensor]:
        nonlocal template
        results = function(*refilled(arguments, tensors))
        template = mapped(results, lambda t: torch.empty(0))
        return flattened(results)

    with torch.enable_grad(), _one_fake_mode():
        tracer = make_fx(flat, tracing_mode="real", _error_on_data_dependent_ops=False)
        graph = tracer(*flattened(arguments))
    if any(map(_reads_entries, graph.graph.nodes)):
        raise NotImplementedError(_READS_ENTRIES)

    def call(*given: Any) -> Any:
        given = tuple(map(_reordered, given, arguments))
        for name, argument, wanted, shape in zip(names, given, expected, shapes, strict=True):
            if signature(argument, layout=False) != wanted:
                got = mapped(argument, lambda t: list(t.shape))
                raise ValueError(
                    f"{name} must have the structure, shapes, dtypes and devices that the function "
                    f"was made for, {shape}, but has {got}."
                )
        with torch.no_grad():  # derivatives are operations of the graph
            results = graph(*flattened(list(given)))
        return refilled(template, results)

    return call


__all__ = [
    "MakeFxCollector",
    "Trace",
    "flat_function",
    "flattened",
    "mapped",
    "refilled",
    "refuse_fixed",
    "signature",
    "trace_model",
]
