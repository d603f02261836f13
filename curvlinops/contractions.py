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
from contextlib import AbstractContextManager, contextmanager
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
        self.skipping = self.transposing = self.cutting = False

    def without_parameter_gradients(self) -> AbstractContextManager[None]:
        """Take zero for gradients of layers' parameters inside; their derivatives stay right."""
        return self._switched_on("skipping")

    def constant_layers(self) -> AbstractContextManager[None]:
        """Record inside how gradients depend on those of the output, and on nothing else."""
        return self._switched_on("transposing")

    def without_graphs_of_tangents(self) -> AbstractContextManager[None]:
        """Let layers evaluated inside not record how their tangents depend on anything."""
        return self._switched_on("cutting")

    @contextmanager
    def _switched_on(self, switch: str) -> Iterator[None]:
        """Switch on one of the attributes inside."""
        setattr(self, switch, True)
        try:
            yield
        finally:
            setattr(self, switch, False)

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
    """A trilinear form of g, x and W, and a bias, which have the given shapes."""

    def __init__(
        self, mode: Contractions, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        self.mode = mode
        self.shapes = {X: x.shape, W: weight.shape}
        self.bias_shape = torch.Size() if bias is None else bias.shape
        # Derivatives of what a parameter depends on may need the value of its gradient.
        self.leaves = weight.is_leaf and (bias is None or bias.is_leaf)

    def contract(self, missing: int, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the derivative by one argument, given the other two in their order."""
        raise NotImplementedError(f"{type(self).__name__} does not implement contract.")

    def spread(self, bias: Tensor) -> Tensor:
        """Return a bias in the shape that is broadcast to that of g."""
        raise NotImplementedError(f"{type(self).__name__} does not implement spread.")

    def sum(self, g: Tensor) -> Tensor:
        """Return the gradient of the bias."""
        raise NotImplementedError(f"{type(self).__name__} does not implement sum.")

    def add(self, total: Tensor, missing: int, a: Tensor, b: Tensor) -> Tensor:
        """Add what ``contract`` returns, in place."""
        return total.add_(self.contract(missing, a, b))

    def __call__(self, missing: int, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Contract; autograd records it, if it is enabled, as a contraction."""
        if _recording():
            result: Tensor = _Contraction.apply(self, missing, a, b, bias)
            return result
        return self.contract(missing, a, b, bias)

    def gradients(
        self, missing: int, c: Tensor, a: Tensor, b: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return those of the inner product of c and a contraction, by a, b, and the bias."""
        if _recording():
            result: tuple[Tensor | None, ...] = _Gradients.apply(self, missing, c, a, b, needed)
            return result
        return self.contract_both(missing, c, a, b, needed)

    def contract_both(
        self, missing: int, c: Tensor, a: Tensor, b: Tensor, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return what ``gradients`` does, without a graph."""
        i, j = _OTHERS[missing]
        for_a, for_b, for_bias = needed
        return (
            self.contract(i, *_ordered(missing, c, j, b)) if for_a else None,
            self.contract(j, *_ordered(missing, c, i, a)) if for_b else None,
            self.sum(c) if for_bias else None,
        )

    def tangent(
        self,
        missing: int,
        a: Tensor,
        b: Tensor,
        da: Tensor | None,
        db: Tensor | None,
        dbias: Tensor | None,
        shape: torch.Size,
    ) -> Tensor:
        """Return the derivative of a contraction by a, b, and the bias, in given directions.

        Args:
            missing: The argument by which the form was differentiated.
            a: The first of the other two.
            b: The second.
            da: The direction of a; there is one at least.
            db: That of b.
            dbias: That of the bias.
            shape: The contraction's shape.
        """
        if db is None:
            if da is not None:
                return self(missing, da, b, dbias)
            assert dbias is not None
            return self.spread(dbias).expand(shape).contiguous()
        total = self(missing, a, db, dbias)
        if da is None:
            return total
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            # vmap has no rule for addmm_
            return total + self(missing, da, b)
        return self.add(total, missing, da, b)


class _Linear(_Form):
    """The form of a linear layer: g ``[..., O]``, x ``[..., I]``, W ``[O, I]``."""

    def contract(self, missing: int, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        if missing == G:
            return functional.linear(a, b, bias)
        if missing == X:
            return a @ b
        return _rows(a).T @ _rows(b)

    def spread(self, bias: Tensor) -> Tensor:
        return bias

    def sum(self, g: Tensor) -> Tensor:
        return _rows(g).sum(0)

    def add(self, total: Tensor, missing: int, a: Tensor, b: Tensor) -> Tensor:
        if missing == W:
            return total.addmm_(_rows(a).T, _rows(b))
        if not total.is_contiguous():
            return super().add(total, missing, a, b)
        _rows(total).addmm_(_rows(a), b.T if missing == G else b)
        return total


class _Convolution(_Form):
    """The form of a convolution: g ``[N, O, *]``, x ``[N, I, *]``, W ``[O, I / groups, *]``."""

    def __init__(
        self, mode: Contractions, x: Tensor, weight: Tensor, bias: Tensor | None, options: Any
    ) -> None:
        super().__init__(mode, x, weight, bias)
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
        result = form.contract(missing, a, b, bias)
        ctx.form, ctx.missing, ctx.shape = form, missing, result.shape
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx: Any, c: Tensor | None) -> tuple[Tensor | None, ...]:
        if c is None:
            return (None,) * 5
        form: _Form = ctx.form
        a, b = ctx.saved_tensors
        if form.mode.transposing:
            a, b = a.detach(), b.detach()
        return None, None, *form.gradients(ctx.missing, c, a, b, ctx.needs_input_grad[2:])

    @staticmethod
    def jvp(
        ctx: Any, _: None, __: None, da: Tensor | None, db: Tensor | None, dbias: Tensor | None
    ) -> Tensor:
        a, b = ctx.saved_tensors
        form: _Form = ctx.form
        with torch.set_grad_enabled(torch.is_grad_enabled() and not form.mode.cutting):
            return form.tangent(ctx.missing, a, b, da, db, dbias, ctx.shape)


class _Gradients(torch.autograd.Function):
    """The gradients of the inner product of c and a contraction of a and b, and of its bias.

    The derivative by c, in directions of the gradients, is that of the contraction by a and b.
    """

    @staticmethod
    def forward(
        ctx: Any,
        form: _Form,
        missing: int,
        c: Tensor,
        a: Tensor,
        b: Tensor,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        ctx.form, ctx.missing = form, missing
        ctx.save_for_backward(c, a, b)
        ctx.set_materialize_grads(False)
        if missing == W or not (form.leaves and form.mode.skipping):
            return form.contract_both(missing, c, a, b, needed)
        needs_a, needs_weight, needs_bias = needed
        for_a, *_ = form.contract_both(missing, c, a, b, (needs_a, False, False))
        zero = c.new_zeros(())
        return (
            for_a,
            zero.expand(form.shapes[W]) if needs_weight else None,
            zero.expand(form.bias_shape) if needs_bias else None,
        )

    @staticmethod
    def backward(
        ctx: Any, da: Tensor | None, db: Tensor | None, dbias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if da is None and db is None and dbias is None:
            return (None,) * 6
        form, missing, (i, j) = ctx.form, ctx.missing, _OTHERS[ctx.missing]
        c, a, b = ctx.saved_tensors
        for_c, for_a, for_b = ctx.needs_input_grad[2:5]
        return (
            *(None, None),
            form.tangent(missing, a, b, da, db, dbias, c.shape) if for_c else None,
            form(i, *_ordered(missing, c, j, db)) if for_a and db is not None else None,
            form(j, *_ordered(missing, c, i, da)) if for_b and da is not None else None,
            None,
        )


def _recording() -> bool:
    """Whether autograd records contractions."""
    # vmap has no rule for custom functions: PyTorch's derivatives are right, too.
    return torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


def _ordered(i: int, x: Tensor, j: int, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the arguments i and j of a form in their order."""
    return (x, y) if i < j else (y, x)


def _rows(x: Tensor) -> Tensor:
    """Return a tensor ``[..., D]`` as ``[n, D]``, a view if it is contiguous."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _linear(
    mode: Contractions, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    """Evaluate ``functional.linear``, unless there is something special about it."""
    if is_special(input, weight, bias) or weight.ndim != 2:
        return None
    return _Linear(mode, input, weight, bias)(G, input, weight, bias)


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
    form = _Convolution(mode, input, weight, bias, (*lists, False, [0] * d, groups))
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
    return _Convolution(mode, input, weight, bias, options)(G, input, weight, bias)


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
