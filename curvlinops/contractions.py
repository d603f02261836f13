r"""Linear layers and convolutions as trilinear forms, whose derivatives of any order are cheap.

A linear layer or convolution :math:`B(x, W)` belongs to the trilinear form
:math:`t(g, x, W) = \langle g, B(x, W) \rangle`. The derivatives of t by one argument, its
contractions with the other two, are the layer itself, the gradient of its input, and that of its
weight; every derivative of a contraction is another of them.

So it is known what each costs, and what can be left out. A Hessian differentiates the gradient of a
weight, but never needs its value, a third of the work of a gradient. PyTorch, moreover, takes an
expensive way to second derivatives of convolutions, and in forward mode multiplies the zero tangent
of a network's input by the weight of its first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from curvlinops.formulas import FUNCTIONS, is_special

#: The arguments of a trilinear form.
G, X, W = range(3)
_OTHERS = ((X, W), (G, W), (G, X))

_convolution_backward: Any = torch.ops.aten.convolution_backward.default


class Contractions(TorchFunctionMode):
    """Computes linear layers and convolutions as contractions of trilinear forms."""

    def __init__(self) -> None:
        super().__init__()
        self.skipping = self.transposing = False

    @contextmanager
    def without_weight_gradients(self) -> Iterator[None]:
        """Take zero for the gradients of weights inside; their derivatives are not affected."""
        self.skipping = True
        try:
            yield
        finally:
            self.skipping = False

    @contextmanager
    def constant_layers(self) -> Iterator[None]:
        """Record inside how gradients depend on those of the output, and on nothing else."""
        self.transposing = True
        try:
            yield
        finally:
            self.transposing = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        evaluate = _LAYERS.get(func) or FUNCTIONS.get(func)
        if evaluate is not None:
            result = evaluate(self, *args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


class _Form:
    """A trilinear form of g, x and W, which have the given shapes."""

    def __init__(self, mode: Contractions, x: Tensor, weight: Tensor) -> None:
        self.mode = mode
        # Derivatives of what a weight depends on may need the value of its gradient.
        self.leaf = weight.is_leaf
        self.shapes = {X: x.shape, W: weight.shape}

    def contract(self, missing: int, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the derivative by one argument, given the other two in their order."""
        raise NotImplementedError(f"{type(self).__name__} does not implement contract.")

    def spread(self, bias: Tensor) -> Tensor:
        """Return a bias in the shape that is broadcast to that of g."""
        raise NotImplementedError(f"{type(self).__name__} does not implement spread.")

    def sum(self, g: Tensor) -> Tensor:
        """Return the gradient of the bias."""
        raise NotImplementedError(f"{type(self).__name__} does not implement sum.")

    def __call__(self, missing: int, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Contract; autograd records it, if it is enabled, as a contraction."""
        # vmap has no rule for custom functions: PyTorch's derivatives are right, too.
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            result: Tensor = _Contraction.apply(self, missing, a, b, bias)
            return result
        return self.contract(missing, a, b, bias)


class _Linear(_Form):
    """The form of a linear layer: g ``[..., O]``, x ``[..., I]``, W ``[O, I]``."""

    def contract(self, missing: int, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        if missing == G:
            return functional.linear(a, b, bias)
        if missing == X:
            return a @ b
        return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])

    def spread(self, bias: Tensor) -> Tensor:
        return bias

    def sum(self, g: Tensor) -> Tensor:
        return g.reshape(-1, g.shape[-1]).sum(0)


class _Convolution(_Form):
    """The form of a convolution: g ``[N, O, *]``, x ``[N, I, *]``, W ``[O, I / groups, *]``."""

    def __init__(self, mode: Contractions, x: Tensor, weight: Tensor, options: Any) -> None:
        super().__init__(mode, x, weight)
        self.options = options

    def contract(self, missing: int, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        if missing == G:
            return torch.convolution(a, b, bias, *self.options)
        # The tensor that is missing gives its shape only. (An expanded number would be copied.)
        empty = a.new_empty(self.shapes[missing])
        x, weight = (empty, b) if missing == X else (b, empty)
        mask = (missing == X, missing == W, False)
        gradients = _convolution_backward(a, x, weight, None, *self.options, mask)
        result: Tensor = gradients[missing - 1]
        return result

    def spread(self, bias: Tensor) -> Tensor:
        return bias.reshape(-1, *[1] * len(self.options[0]))

    def sum(self, g: Tensor) -> Tensor:
        return g.sum([0, *range(2, g.ndim)])


class _Contraction(torch.autograd.Function):
    """The derivative of a trilinear form by one argument, as a function of the other two."""

    @staticmethod
    def forward(
        ctx: Any, form: _Form, missing: int, a: Tensor, b: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.form, ctx.missing = form, missing
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)
        if missing == W and form.leaf and form.mode.skipping:
            return a.new_zeros(()).expand(form.shapes[W])
        result = form.contract(missing, a, b, bias)
        ctx.shape = result.shape
        return result

    @staticmethod
    def backward(ctx: Any, c: Tensor | None) -> tuple[Tensor | None, ...]:
        if c is None:
            return (None,) * 5
        form, others = ctx.form, _OTHERS[ctx.missing]
        saved = ctx.saved_tensors
        if form.mode.transposing:
            saved = [x.detach() for x in saved]
        known = {ctx.missing: c, **dict(zip(others, saved, strict=True))}
        *_, needs_a, needs_b, needs_bias = ctx.needs_input_grad
        # First: then its derivative, a broadcast bias, is the last that autograd adds up, in place.
        # Else the sum would be a copy, whose order of axes is that of the bias.
        bias = form.sum(c) if needs_bias else None
        a, b = (
            form(i, *[known[j] for j in _OTHERS[i]]) if needed else None
            for i, needed in zip(others, (needs_a, needs_b), strict=True)
        )
        return None, None, a, b, bias

    @staticmethod
    def jvp(
        ctx: Any, _: None, __: None, da: Tensor | None, db: Tensor | None, dbias: Tensor | None
    ) -> Tensor:
        a, b = ctx.saved_tensors
        form, missing = ctx.form, ctx.missing
        if db is not None:
            tangent = form.contract(missing, a, db, dbias)
            return tangent if da is None else tangent + form.contract(missing, da, b)
        if da is not None:
            return form.contract(missing, da, b, dbias)
        assert dbias is not None  # or there is no tangent at all
        return form.spread(dbias).expand(ctx.shape).contiguous()


def _linear(
    mode: Contractions, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    """Evaluate ``functional.linear``, unless there is something special about it."""
    if is_special(input, weight, bias) or weight.ndim != 2:
        return None
    return _Linear(mode, input, weight)(G, input, weight, bias)


def _convolution(
    mode: Contractions,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """Evaluate ``functional.conv*d``, unless there is something special about it."""
    d = weight.ndim - 2
    if is_special(input, weight, bias) or input.ndim != weight.ndim or isinstance(padding, str):
        return None
    lists = [_repeat(x, d) for x in (stride, padding, dilation)]
    form = _Convolution(mode, input, weight, (*lists, False, [0] * d, groups))
    return form(G, input, weight, bias)


def _transposed_convolution(
    mode: Contractions,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor | None:
    """Evaluate ``functional.conv_transpose*d``, unless there is something special about it."""
    d = weight.ndim - 2
    if is_special(input, weight, bias) or input.ndim != weight.ndim:
        return None
    stride, padding, output_padding, dilation = (
        _repeat(x, d) for x in (stride, padding, output_padding, dilation)
    )
    options = (stride, padding, dilation, True, output_padding, groups)
    return _Convolution(mode, input, weight, options)(G, input, weight, bias)


def _repeat(x: Any, d: int) -> list[int]:
    """Return an option of a convolution, one number or one for each dimension, as a list."""
    numbers = list(x) if isinstance(x, (tuple, list)) else [x]
    return numbers * d if len(numbers) == 1 else numbers


_LAYERS: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), _convolution),
    **dict.fromkeys(
        (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
        _transposed_convolution,
    ),
}
