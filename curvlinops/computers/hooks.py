"""The collector that listens to a model's layers while it runs, with hooks on their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from curvlinops.computers.arrangement import BATCH_FIRST, Arrangements
from curvlinops.computers.callers import called_by
from curvlinops.computers.layers import read_function
from curvlinops.computers.positions import Positions
from curvlinops.computers.selection import NAMES
from curvlinops.computers.usages import Parameters, Usage, check_widths, tensors_in


class HooksCollector:
    """Reports the inputs of layers in the forward pass and the gradients of their outputs.

    A layer is a function of PyTorch that the model calls with parameters: see
    :mod:`curvlinops.computers.layers`. Gradients are reported as the backward pass reaches a layer
    and not kept. Weights need no gradients: the graph starts at the layers' outputs, which are made
    to depend on a root. A layer that the model calls without recording gradients does not count as
    a use of its parameters.

    Args:
        arrangements: Where the examples are in the calls of layers, if not in the first axis. The
            output of a layer whose input is the same for all examples is made one for each.
        on_call: Called with a usage, the number of the call, and the layer's input.
        on_input: Called with a usage, the number of the call in this batch (a layer can be called
            repeatedly), and the positions.
        on_gradient: Called with a usage, the number of the call, and the output gradients of V loss
            vectors ``[V, n, S, d_out]``.
        unviews: Whether an output that is a view may be replaced by a view of another tensor, which
            saves time, unless somebody else has hooks on outputs that are changed in place.
    """

    def __init__(
        self,
        arrangements: Arrangements,
        on_call: Callable[[Usage, int, Tensor], None] | None = None,
        on_input: Callable[[Usage, int, Positions], None] | None = None,
        on_gradient: Callable[[Usage, int, Tensor], None] | None = None,
        unviews: bool = True,
    ):
        self._unviews = unviews
        self._arrangements = arrangements
        self._on_call = on_call
        self._on_input = on_input
        self._on_gradient = on_gradient
        self._root = torch.empty(0)
        self._n = 0
        self._listening = False
        #: How often each usage occurred in this batch.
        self.calls: dict[Usage, int] = {}
        #: Parameters that are used in other ways in this batch, and by which function.
        self.other_uses: dict[str, str] = {}

    @contextmanager
    def listening(self, params: dict[str, Tensor], n: int) -> Iterator[None]:
        """Listen to a forward pass of n examples.

        Args:
            params: The tensors at which the model is evaluated, without gradients.
            n: The number of examples.
        """
        device = next(iter(params.values())).device
        self._root = torch.empty(0, device=device, requires_grad=True)
        self._n = n
        self._arrangements.begin_forward()
        self.calls, self.other_uses = {}, {}
        self._listening = True
        try:
            with _Watch(self, Parameters(params)):
                yield
        finally:
            self._listening = False

    def backward(self, F: Tensor, vector: Tensor, last: bool) -> None:
        """Back-propagate a loss vector to the layers' outputs.

        Args:
            F: Predictions ``[m, C]`` of the forward pass listened to.
            vector: Loss vector ``[m, C]``.
            last: Whether the graph can be freed.
        """
        if not F.requires_grad:
            return  # the prediction depends on none of the layers
        torch.autograd.grad(F, self._root, vector, retain_graph=not last, allow_unused=True)

    def on_selection(self, name: str, args: Any, kwargs: Any) -> None:
        """A function that may select rows is called."""
        self._arrangements.note_function(name, args, kwargs, self._n)

    def on_call(self, usage: Usage, x: Tensor, output: Tensor) -> Tensor:
        """A layer was called; return its output."""
        if called_by(torch.utils.checkpoint):
            raise NotImplementedError(
                f"{usage.label} is inside of torch.utils.checkpoint, where hooks do not see its "
                "gradients: disable activation checkpointing while factors are computed."
            )
        index = self.calls.get(usage, 0)
        self.calls[usage] = index + 1
        if self._arrangements.refuses(usage, index):
            return output
        if not output.numel():  # a call for no rows adds nothing
            if self._on_call is not None:
                self._on_call(usage, index, x.detach())
            return output
        n, form = self._n, usage.format
        with torch.no_grad(), _unseen():
            x = x.detach()
            where = self._arrangements.of(usage, index, x, n)
            number = where.number(n)
            if self._on_call is not None:
                self._on_call(usage, index, x)
            if self._on_input is not None:
                inputs = where.examples_first(x, n)
                self._on_input(usage, index, form.positions(inputs, number, usage.label))
        if where.axis is None:
            output, where = self._arrangements.spread(output, n), BATCH_FIRST

        def on_gradient(gradient: Tensor) -> None:
            if self._listening:
                raise NotImplementedError(
                    f"The model differentiates {usage.label.lower()} in its forward pass, which "
                    "hooks cannot tell from the backward pass: use backend='make_fx'."
                )
            with torch.no_grad():
                gradient = where.examples_first(gradient.reshape(shape), n)
                shared = form.gradients(gradient, number, usage.label).unsqueeze(0)
                assert self._on_gradient is not None
                self._on_gradient(usage, index, shared)

        if self._on_gradient is None:
            return output
        shape, whole = output.shape, _unviewed(output) if self._unviews else output
        listened: Tensor = _Listen.apply(whole, self._root, on_gradient)
        # No further view: one that an activation changes in place loses the hooks on it.
        return listened if listened.shape == shape else listened.reshape(shape)


def _unviewed(output: Tensor) -> Tensor:
    """Return what a tensor is a view of, if it has the same entries in the same order.

    The identity in place is expensive for views: autograd cuts them out of the whole, and back.
    """
    whole = output._base
    if whole is None or whole.numel() != output.numel():
        return output
    return whole if whole.is_contiguous() and output.is_contiguous() else output


class _Listen(torch.autograd.Function):
    """The identity, which depends on the root too and reports its gradient."""

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


class _Watch(TorchFunctionMode):
    """Sees the functions that a model calls."""

    def __init__(self, collector: HooksCollector, params: Parameters):
        super().__init__()
        self._collector = collector
        self._params = params
        self._constants: dict[int, Tensor] = {}  # views of parameters that are detached

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            with self:  # what it calls is hidden from modes otherwise
                return _open_attention(*args, **kwargs)
        with _unseen():
            touched = self._params.sharing(args, kwargs)
        if not touched:  # nor can the result share memory with a parameter
            name = getattr(func, "__name__", "")
            if name in NAMES:
                self._collector.on_selection(name, args, kwargs)
            return func(*args, **kwargs)
        with _unseen():
            involved = self._params.involved([x for x in touched if id(x) not in self._constants])
        if not involved:
            output = func(*args, **kwargs)
            self._note_constants(output)
            return output
        if not torch.is_grad_enabled() and torch._C._is_fwd_grad_enabled():  # in no_grad
            output = func(*args, **kwargs)
            self._note_constants(output)
            return output
        hidden = _hidden()
        with _unseen():
            call = None if hidden else read_function(func, args, kwargs)
            usage = None if call is None else self._params.usage(call)
        output = func(*args, **kwargs)
        if _detaches(func):
            self._note_constants(output)
            return output
        if usage is not None and (usage.weight or usage.bias):
            assert call is not None
            with _unseen():
                check_widths(usage, call, output)
            return self._collector.on_call(usage, call.x, output)
        if self._depends(func, args, output):
            for name in involved:
                reason = f"used by {getattr(func, '__name__', func)}{hidden}"
                self._collector.other_uses.setdefault(name, reason)
        return output

    def _note_constants(self, output: Any) -> None:
        """Note the detached views among results; they are held, so that their ids stay theirs."""
        with _unseen():
            self._constants |= {id(x): x for x in self._params.sharing(output)}

    def _depends(self, func: Any, args: Any, result: Any) -> bool:
        """Return whether a function's result depends on parameters in a differentiable way.

        A view of a parameter does not count: what matters is how the view is used.
        """
        name = getattr(func, "__name__", "")
        if name.startswith("new_") or name.endswith("_like"):
            return False
        if name == "to" or name.endswith("_as"):
            first = [x for x in self._params.sharing(*args[:1]) if id(x) not in self._constants]
            if not first:
                return False  # brings something to the dtype, ... of a parameter
        results = [x for x in tensors_in([result]) if x.is_floating_point() or x.is_complex()]
        return not all(self._params.owners(x) for x in results)


#: Other modes, which see all functions of the model, need not see what this one does.
_unseen = torch._C.DisableTorchFunction

# The function itself, in a copy of its module where it does not ask for modes.
_open_attention = FunctionType(
    functional.multi_head_attention_forward.__code__,
    {**vars(functional), "has_torch_function": lambda tensors: False},
    argdefs=functional.multi_head_attention_forward.__defaults__,
)


def _hidden() -> str:
    """Return in what derivatives of a function are not those of its layer, or nothing."""
    if torch._C._are_functorch_transforms_active():
        return " inside of a transform of torch.func"
    # no_grad leaves the latter enabled
    neither = not torch.is_grad_enabled() and not torch._C._is_fwd_grad_enabled()
    if neither and not called_by(torch.utils.checkpoint):  # that has an error of its own
        return " inside of a custom autograd function"
    return ""


def _detaches(func: Any) -> bool:
    """Return whether a function returns its argument as a constant."""
    name = getattr(func, "__name__", "")
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return name == "detach" or (name == "__get__" and owner in ("data", "grad"))


__all__ = ["HooksCollector"]
