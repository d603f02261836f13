"""The collector that runs the trace of a model, operation by operation, and listens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from curvlinops.computers.arrangement import BATCH_FIRST, Arrangements
from curvlinops.computers.containers import flattened
from curvlinops.computers.layers import read_operation
from curvlinops.computers.positions import Positions
from curvlinops.computers.selection import NAMES
from curvlinops.computers.tracing import Trace
from curvlinops.computers.usages import Parameters, Usage, check_widths, tensors_in


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
        >>> from curvlinops.computers.tracing import trace_model
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
        self._arrangements.begin_forward()
        self._arrangements.entries_matter |= not trace.reusable
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

    def on_selection(self, name: str, args: Any, kwargs: Any) -> None:
        """An operation that may select rows is called."""
        self._arrangements.note_function(name, args, kwargs, self._n)

    def on_call(self, usage: Usage, x: Tensor, output: Tensor) -> Tensor:
        """A layer was called; return its output."""
        index = self.calls.get(usage, 0)
        self.calls[usage] = index + 1
        if self._arrangements.refuses(usage, index):
            return output
        if not output.numel():  # a call for no rows adds nothing
            if self._on_call is not None:
                self._on_call(usage, index, x.detach())
            return output
        n, form = self._n, usage.format
        where = self._arrangements.of(usage, index, x.detach(), n)
        number = where.number(n)
        with torch.no_grad():
            if self._on_call is not None:
                self._on_call(usage, index, x.detach())
            if self._on_input is not None:
                inputs = where.examples_first(x.detach(), n)
                self._on_input(usage, index, form.positions(inputs, number, usage.label))
        if where.axis is None:
            output, where = self._arrangements.spread(output, n), BATCH_FIRST
        if self._on_gradient is None:
            return output

        def on_gradient(gradient: Tensor) -> None:
            with torch.no_grad():
                gradient = where.examples_first(gradient, n)
                shared = form.gradients(gradient, number, usage.label).unsqueeze(0)
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
        if not involved and name in NAMES:
            self._collector.on_selection(name, args, kwargs)
        if not involved or name == "detach" or not torch.is_grad_enabled():
            self._note_constants(output)
        elif call is not None and usage is not None and (usage.weight or usage.bias):
            check_widths(usage, call, output)
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
        self._constants |= {id(x): x for x in self._params.sharing(output)}

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


__all__ = ["MakeFxCollector"]
