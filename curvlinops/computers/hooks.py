"""The collector that listens to a module's layers with hooks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from curvlinops.computers.layers import LayerRule
from curvlinops.computers.positions import Positions


class HooksCollector:
    """Reports the inputs of layers in the forward pass and the gradients of their outputs.

    Gradients are reported as the backward pass reaches a layer and not kept. Weights need no
    gradients: the graph starts at the layers' outputs, which are made to depend on a root. A layer
    that the model calls without recording gradients does not count as a use of its parameters.

    Args:
        layers: Module and rule of each layer, by name.
        on_input: Called with a layer's name, the number of the call in this batch (a layer can be
            called repeatedly), and the positions.
        on_gradient: Called with a layer's name, the number of the call, and the output gradients of
            V loss vectors ``[V, n, S, d_out]``.
    """

    def __init__(
        self,
        layers: dict[str, tuple[nn.Module, LayerRule]],
        on_input: Callable[[str, int, Positions], None],
        on_gradient: Callable[[str, int, Tensor], None],
    ):
        self._layers = layers
        self._on_input = on_input
        self._on_gradient = on_gradient
        self._root = torch.empty(0)
        self._calls: dict[str, int] = {}

    @contextmanager
    def listening(self, params: dict[str, Tensor], n: int) -> Iterator[None]:
        """Listen to a forward pass of n examples.

        Args:
            params: The tensors at which the model is evaluated, without gradients. Their use
                outside of the layers, which hooks do not see, is an error.
            n: The number of examples.
        """
        device = next(iter(params.values())).device
        self._root = torch.empty(0, device=device, requires_grad=True)
        self._calls = {}
        watch = _ParameterWatch(params)
        handles: list[RemovableHandle] = []
        try:
            for name, (module, rule) in self._layers.items():
                # the user's hooks are outside: last before the layer, and first after it, so that
                # the hook sees the layer's own output
                handles.append(module.register_forward_pre_hook(watch.enter))
                hook = self._forward_hook(name, rule, n, watch)
                handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
            with watch:
                yield
        finally:
            for handle in handles:
                handle.remove()

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

    def _forward_hook(
        self, name: str, rule: LayerRule, n: int, watch: _ParameterWatch
    ) -> Callable[..., Tensor | None]:
        """Return the hook for one layer."""

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            watch.leave()
            if _is_checkpointed():
                raise NotImplementedError(
                    f"Layer {name!r} is inside of torch.utils.checkpoint, where hooks do not see "
                    "its gradients: disable activation checkpointing while factors are computed."
                )
            if not torch.is_grad_enabled():
                return None  # the prediction's derivative does not see this call
            usage = self._calls.get(name, 0)
            self._calls[name] = usage + 1
            (x,) = (*args, *kwargs.values())
            with torch.no_grad():
                self._on_input(name, usage, rule.positions(module, x.detach(), n, name))

            def on_gradient(gradient: Tensor) -> None:
                with torch.no_grad():
                    shared = rule.gradients(gradient, n, name).unsqueeze(0)
                    self._on_gradient(name, usage, shared)

            return _Listen.apply(output, self._root, on_gradient)

        return hook


def _is_checkpointed() -> bool:
    """Return whether the caller runs inside of activation checkpointing."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


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


class _ParameterWatch(TorchFunctionMode):
    """Raises if a parameter is used outside of its layer's forward pass."""

    def __init__(self, params: dict[str, Tensor]):
        super().__init__()
        self._names = {id(tensor): name for name, tensor in params.items()}
        self._depth = 0

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """A layer's forward pass begins."""
        self._depth += 1

    def leave(self) -> None:
        """A layer's forward pass is over."""
        self._depth -= 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._depth == 0 and _differentiable(func, result):
            for arg in _tensors(args[:1] if _converts(func) else (*args, *kwargs.values())):
                if id(arg) in self._names:
                    raise NotImplementedError(
                        f"The parameter {self._names[id(arg)]!r} is used outside of the forward "
                        f"pass of its layer (by {getattr(func, '__name__', func)}), where hooks "
                        "do not see it. Leave it out of params, or call the layer instead."
                    )
        return result


def _differentiable(func: Any, result: Any) -> bool:
    """Return whether a function's result depends on its arguments in a differentiable way."""
    name = getattr(func, "__name__", "")
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    if name == "detach" or name.startswith("new_") or name.endswith("_like"):
        return False
    if name == "__get__" and owner in ("data", "grad"):
        return False
    return any(tensor.is_floating_point() for tensor in _tensors([result]))


def _converts(func: Any) -> bool:
    """Return whether a function brings its first argument to the dtype, ... of another one."""
    name = getattr(func, "__name__", "")
    return name == "to" or name.endswith("_as")


def _tensors(items: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested lists, tuples and dicts."""
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _tensors(item)
        elif isinstance(item, dict):
            yield from _tensors(item.values())
