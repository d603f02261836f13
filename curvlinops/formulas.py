r"""Functions whose derivatives PyTorch computes in more steps than they need.

- Softmax and layer normalisation in forward mode. The Jacobian of softmax, and that of a
  normalisation without weight and bias, are symmetric: tangents are what the fused backward kernels
  compute.
- Second derivatives of layer normalisation and GELU.
- Derivatives of ``masked_fill``.
- Numbers in forward mode: in :math:`2 x`, PyTorch takes the number for a tensor with a tangent of
  zeros, and finds out in Python that this changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn import functional

_aten: Any = torch.ops.aten
_layer_norm_backward: Any = _aten.native_layer_norm_backward.default
_gelu_backward: Any = _aten.gelu_backward.default


class Mode(Protocol):
    """What the functions follow.

    Attributes:
        transposing: Whether only gradients of outputs are variables.
        skipping: Whether zeros are taken for gradients of parameters.
    """

    transposing: bool
    skipping: bool


class _Softmax(torch.autograd.Function):
    """Softmax."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        y = x.softmax(dim)
        ctx.dim = dim
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y)
        ctx.save_for_forward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        return None if g is None else _softmax_product(ctx, g), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> Tensor:
        return _softmax_product(ctx, dx)


def _softmax_product(ctx: Any, v: Tensor) -> Tensor:
    """Multiply by the Jacobian of softmax, which is symmetric."""
    (y,) = ctx.saved_tensors
    product: Tensor = torch._softmax_backward_data(v, y, ctx.dim, y.dtype)
    return product


class _LayerNorm(torch.autograd.Function):
    """Layer normalisation of x ``[..., *shape]``, with weight and bias ``[*shape]``."""

    @staticmethod
    def forward(
        ctx: Any,
        mode: Mode,
        x: Tensor,
        shape: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.mode, ctx.shape, ctx.eps = mode, shape, eps
        ctx.leaves = all(t is None or t.is_leaf for t in (weight, bias))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.save_for_forward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 6
        x, weight, bias, mean, rstd = ctx.saved_tensors
        _, needs_x, _, *needs, _ = ctx.needs_input_grad
        mask = (needs_x, *needs)
        if torch.is_grad_enabled():
            x, weight = (
                t.detach() if t is not None and ctx.mode.transposing else t for t in (x, weight)
            )
            skipping = ctx.leaves and ctx.mode.skipping
            gradients = _LayerNormGradient.apply(
                *(g, x, weight, bias, mean, rstd, ctx.shape, ctx.eps, mask, skipping)
            )
        else:
            gradients = _layer_norm_backward(g, x, ctx.shape, mean, rstd, weight, bias, mask)
        dx, dweight, dbias = gradients
        return None, dx, None, dweight, dbias, None

    @staticmethod
    def jvp(
        ctx: Any,
        _: None,
        dx: Tensor | None,
        __: None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        ___: None,
    ) -> Tensor:
        x, weight, _bias, mean, rstd = ctx.saved_tensors
        parts: list[Tensor] = []
        if dx is not None:
            part = _project(dx, x, ctx.shape, mean, rstd)
            parts.append(part if weight is None else part * weight)
        if dweight is not None:
            parts.append((x - mean) * rstd * dweight)
        if dbias is not None:
            parts.append(dbias.expand_as(x))
        return sum(parts[1:], start=parts[0])


class _LayerNormGradient(torch.autograd.Function):
    r"""The gradients of layer normalisation by x, weight and bias; those in a mask.

    With the normalised input :math:`\hat x`, the inverse standard deviation r and d entries of each
    row, that by x is :math:`J (g \odot w)`, where
    :math:`J = r (I - 1 1^\top / d - \hat x \hat x^\top / d)` is the Jacobian of :math:`\hat x`. Its
    product with c has the gradient
    :math:`-\frac{r}{d} [(c^\top J \hat g) \hat x + (\hat g^\top \hat x) J c
    + (c^\top \hat x) J \hat g]` by x, with :math:`\hat g = g \odot w`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        shape: Any,
        eps: float,
        mask: tuple[bool, bool, bool],
        skipping: bool,
    ) -> tuple[Tensor | None, ...]:
        computed = (mask[0], False, False) if skipping else mask
        gradients = _layer_norm_backward(g, x, shape, mean, rstd, weight, bias, computed)
        if skipping:
            zero = x.new_zeros(())
            zeros = [None if t is None else zero.expand_as(t) for t in (weight, bias)]
            gradients = gradients[0], *zeros
        dx, dweight, dbias = (each if m else None for each, m in zip(gradients, mask, strict=True))
        ctx.shape, ctx.eps = shape, eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, weight, mean, rstd, dx)
        return dx, dweight, dbias

    @staticmethod
    def backward(
        ctx: Any, c: Tensor | None, c_weight: Tensor | None, c_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, rstd, dx = ctx.saved_tensors
        _, needs_x, needs_weight, *_ = ctx.needs_input_grad
        cotangents = (c, c_weight, c_bias)
        if torch.is_grad_enabled():
            found = _layer_norm_third(g, x, weight, ctx.shape, ctx.eps, cotangents)
            return (*found, *[None] * 7)
        axes = list(range(x.ndim - len(ctx.shape), x.ndim))
        normalized = (x - mean).mul_(rstd)
        for_g, for_x, for_weight = None, None, None
        if c is not None:
            product = _project(c, x, ctx.shape, mean, rstd)
            for_g = product if weight is None else product * weight
            if needs_weight:
                for_weight = (
                    (g * product).flatten(0, axes[0] - 1).sum(0) if axes[0] else g * product
                )
            if needs_x:
                scaled = g if weight is None else g * weight
                for_x = normalized * (c * dx).sum(axes, keepdim=True)
                for_x.addcmul_(product, (scaled * normalized).sum(axes, keepdim=True))
                for_x.addcmul_(dx, (c * normalized).sum(axes, keepdim=True))
                for_x.mul_(rstd / -math.prod(ctx.shape))
        if c_weight is not None:
            part = c_weight * normalized
            for_g = part if for_g is None else for_g.add_(part)
            if needs_x:
                part = _project(g * c_weight, x, ctx.shape, mean, rstd)
                for_x = part if for_x is None else for_x.add_(part)
        if c_bias is not None:
            for_g = c_bias.expand_as(g) if for_g is None else for_g.add_(c_bias)
        return for_g, for_x, for_weight, *[None] * 7


def _project(v: Tensor, x: Tensor, shape: Any, mean: Tensor, rstd: Tensor) -> Tensor:
    """Multiply by the Jacobian of layer normalisation without weight, which is symmetric."""
    only_x = (True, False, False)
    product: Tensor = _layer_norm_backward(v, x, shape, mean, rstd, None, None, only_x)[0]
    return product


def _layer_norm_third(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    shape: Any,
    eps: float,
    cotangents: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Multiply by the transposed Jacobian of the gradients of layer normalisation.

    In steps that can be differentiated any number of times, unlike PyTorch's.

    Returns:
        The products for g, x and the weight.
    """
    # g may depend on x: other nodes of the graph, for partial derivatives
    inputs = [None if t is None else t.view_as(t) for t in (g, x, weight)]
    g, x, weight = inputs  # type: ignore[assignment]
    axes = list(range(x.ndim - len(shape), x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    rstd = (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    normalized = centred * rstd
    scaled = g if weight is None else g * weight
    part = (scaled * normalized).mean(axes, keepdim=True)
    dx = rstd * (scaled - scaled.mean(axes, keepdim=True) - normalized * part)
    outputs = [
        None if c is None else (c * output).sum()
        for c, output in zip(cotangents, (dx, g * normalized, g), strict=True)
    ]
    total = _sum([each for each in outputs if each is not None])
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if total is None or not wanted:
        return [None] * 3
    found = iter(torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _sum(parts: list[Tensor]) -> Tensor | None:
    """Return the sum; None for nothing."""
    return sum(parts[1:], start=parts[0]) if parts else None


class _MaskedFill(torch.autograd.Function):
    """A number in place of the entries in a mask; the others are kept, see ``_cleared``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, kept: Tensor, value: float) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept)
        ctx.save_for_forward(kept)
        return torch.where(mask, value, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        return None if g is None else _cleared(g, *ctx.saved_tensors), None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        return _cleared(dx, *ctx.saved_tensors)


class _Cleared(torch.autograd.Function):
    """Zeros in place of the entries in a mask: a linear map, which is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept)
        return (x.view(kept.dtype) & kept).view(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:
        return None if g is None else _cleared(g, *ctx.saved_tensors), None


def _cleared(x: Tensor, kept: Tensor) -> Tensor:
    """Return zeros where no bits are kept, on CPUs in an eighth of the time of ``masked_fill``.

    Args:
        x: A tensor.
        kept: Integers of the size of its entries, with all bits or none.
    """
    if torch._C._are_functorch_transforms_active():
        return x.masked_fill(kept == 0, 0)
    result: Tensor = _Cleared.apply(x, kept)
    return result


class _Gelu(torch.autograd.Function):
    """GELU, without approximation."""

    @staticmethod
    def forward(ctx: Any, mode: Mode, x: Tensor) -> Tensor:
        ctx.mode, ctx.slope = mode, None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if g is None:
            return None, None
        if not torch.is_grad_enabled():
            return None, _gelu_backward(g, x) if ctx.slope is None else g * ctx.slope
        if ctx.slope is None:  # it takes longer than all else; a product needs it three times
            with torch.no_grad():
                ctx.slope = _gelu_backward(x.new_ones(()).expand_as(x), x)
        x = x.detach() if ctx.mode.transposing else x
        return None, _GeluBackward.apply(g, x, ctx.slope)


class _GeluBackward(torch.autograd.Function):
    r"""The gradient of GELU, :math:`g s(x)` with the slope :math:`s = \Phi(x) + x \varphi(x)`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, slope: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, slope)
        return g * slope

    @staticmethod
    def backward(ctx: Any, c: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, slope = ctx.saved_tensors
        if c is None:
            return None, None, None
        # the slope that is kept is a constant
        for_g = _gelu_backward(c, x) if torch.is_grad_enabled() else c * slope
        if not ctx.needs_input_grad[1]:
            return for_g, None, None
        # c g (2 - x²) φ(x)
        scale, square = 1 / math.sqrt(2 * math.pi), x * x
        if torch.is_grad_enabled():
            return for_g, c * g * (2 - square) * torch.exp(-square / 2) * scale, None
        density = (square * (-0.5 / math.log(2))).exp2_()  # takes less time than exp
        second = square.neg_().add_(2).mul_(density).mul_(scale).mul_(g)
        if torch._C._are_functorch_transforms_active():
            # under vmap, c may have an axis that the others lack
            return for_g, second * c, None
        return for_g, second.mul_(c), None


def is_special(*tensors: Tensor | None) -> bool:
    """Whether something else takes part in a function, or would have to know of it.

    Args:
        tensors: The tensors that the function is called with.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or _saving_is_hooked()
        or any(
            type(x) not in (Tensor, nn.Parameter)
            or not x.is_floating_point()
            or x.layout is not torch.strided
            or torch.is_autocast_enabled(x.device.type)
            for x in tensors
            if x is not None
        )
    )


def _saving_is_hooked() -> bool:
    """Whether tensors that autograd saves go through hooks."""
    try:
        with disable_saved_tensors_hooks("Only newer versions of PyTorch tell it otherwise."):
            return False
    except RuntimeError:
        return True


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether formulas are for these tensors."""
    return not is_special(*tensors) and all(x is None or x.dtype in _INTEGERS for x in tensors)


def _softmax(
    mode: Mode, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor | None:
    """Evaluate softmax in forward mode."""
    usual = isinstance(dim, int) and dtype is None
    if not usual or forward_ad._current_level < 0 or not _is_plain(input):
        return None
    result: Tensor = _Softmax.apply(input, dim)
    return result


def _layer_norm(
    mode: Mode,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """Evaluate ``functional.layer_norm``."""
    shaped = isinstance(normalized_shape, (list, tuple))
    if not shaped or not _is_plain(input, weight, bias):
        return None
    result: Tensor = _LayerNorm.apply(mode, input, normalized_shape, weight, bias, eps)
    return result


def _masked_fill(mode: Mode, input: Tensor, mask: Tensor, value: Any) -> Tensor | None:
    """Evaluate ``masked_fill`` with a number and one mask for several examples."""
    if not isinstance(value, (int, float)) or not _is_plain(input) or not isinstance(mask, Tensor):
        return None
    sizes = input.shape[input.ndim - mask.ndim :]
    fits = mask.ndim <= input.ndim and all(
        m in (1, n) for m, n in zip(mask.shape, sizes, strict=True)
    )
    if not fits or mask.dtype != torch.bool or 4 * mask.numel() > input.numel():
        return None
    kept = mask.logical_not().to(_INTEGERS[input.dtype]).neg_()
    result: Tensor = _MaskedFill.apply(input, mask, kept, value)
    return result


def _gelu(mode: Mode, input: Tensor, approximate: str = "none") -> Tensor | None:
    """Evaluate ``functional.gelu``, except in forward mode."""
    if approximate != "none" or forward_ad._current_level >= 0 or not _is_plain(input):
        return None
    result: Tensor = _Gelu.apply(mode, input)
    return result


def _with_number(function: Any) -> Callable[..., Tensor | None]:
    """Return the evaluation, in forward mode, of a function of a tensor and a number."""

    def evaluate(mode: Mode, *args: Any, **options: Any) -> Tensor | None:
        if len(args) != 2 or options or not isinstance(args[1], (int, float)):
            return None
        if forward_ad._current_level < 0 or not isinstance(args[0], Tensor):
            return None
        result: Tensor | None = function(*args) if _is_plain(args[0]) else None
        return result

    return evaluate


_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}

#: Functions, and what evaluates them in a mode; where that returns None, PyTorch does.
FUNCTIONS: dict[Any, Callable[..., Tensor | None]] = {
    functional.layer_norm: _layer_norm,
    functional.gelu: _gelu,
    **dict.fromkeys((torch.masked_fill, Tensor.masked_fill), _masked_fill),
    **dict.fromkeys((functional.softmax, torch.softmax, Tensor.softmax), _softmax),
    **{
        getattr(owner, name): _with_number(getattr(_aten, name).Scalar)
        for name in ("add", "sub", "mul", "div")
        for owner in (torch, Tensor)
    },
}
