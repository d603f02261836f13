r"""Functions whose derivatives PyTorch computes in more steps than they need.

- Softmax and layer normalisation in forward mode. The Jacobian of softmax, and that of a
  normalisation without weight and bias, are symmetric: tangents are what the fused backward kernels
  compute.
- Second derivatives of GELU.
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
_layer_norm_backward: Any = _aten.native_layer_norm_backward


class Mode(Protocol):
    """What the functions follow: ``transposing`` if only gradients of outputs are variables."""

    transposing: bool


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
        ctx: Any, x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.save_for_forward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 5
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs_x, _, *needs, _ = ctx.needs_input_grad
        dx, dweight, dbias = _layer_norm_backward(
            g, x, ctx.shape, mean, rstd, weight, bias, (needs_x, *needs)
        )
        return dx, None, dweight, dbias, None

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, _: None, dweight: Tensor | None, dbias: Tensor | None, __: None
    ) -> Tensor:
        x, weight, _bias, mean, rstd = ctx.saved_tensors
        parts: list[Tensor] = []
        if dx is not None:
            only_x = (True, False, False)
            part = _layer_norm_backward(dx, x, ctx.shape, mean, rstd, None, None, only_x)[0]
            parts.append(part if weight is None else part * weight)
        if dweight is not None:
            parts.append((x - mean) * rstd * dweight)
        if dbias is not None:
            parts.append(dbias.expand_as(x))
        return sum(parts[1:], start=parts[0])


class _Gelu(torch.autograd.Function):
    """GELU, without approximation."""

    @staticmethod
    def forward(ctx: Any, mode: Mode, x: Tensor) -> Tensor:
        ctx.mode = mode
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if g is None:
            return None, None
        if not torch.is_grad_enabled():
            return None, _aten.gelu_backward(g, x)
        return None, _GeluBackward.apply(g, x.detach() if ctx.mode.transposing else x)


class _GeluBackward(torch.autograd.Function):
    r"""The gradient of GELU, :math:`g (\Phi(x) + x \varphi(x))`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x)
        product: Tensor = _aten.gelu_backward(g, x)
        return product

    @staticmethod
    def backward(ctx: Any, c: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        if c is None:
            return None, None
        for_g = _aten.gelu_backward(c, x)
        if not ctx.needs_input_grad[1]:
            return for_g, None
        # c g (2 - x²) φ(x)
        scale, square = 1 / math.sqrt(2 * math.pi), x * x
        if torch.is_grad_enabled():
            return for_g, c * g * (2 - square) * torch.exp(-square / 2) * scale
        density = (square * -0.5).exp_()
        second = square.mul_(-scale).add_(2 * scale).mul_(density)
        return for_g, second * g * c  # under vmap, c may have an axis that the others lack


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
    return not is_special(*tensors) and all(x is None or x.dtype in _DTYPES for x in tensors)


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
    """Evaluate ``functional.layer_norm`` in forward mode."""
    if forward_ad._current_level < 0 or not _is_plain(input, weight, bias):
        return None
    result: Tensor = _LayerNorm.apply(input, normalized_shape, weight, bias, eps)
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


_DTYPES = (torch.float32, torch.float64)

#: Functions, and what evaluates them in a mode; where that returns None, PyTorch does.
FUNCTIONS: dict[Any, Callable[..., Tensor | None]] = {
    functional.layer_norm: _layer_norm,
    functional.gelu: _gelu,
    **dict.fromkeys((functional.softmax, torch.softmax, Tensor.softmax), _softmax),
    **{
        getattr(owner, name): _with_number(getattr(_aten, name).Scalar)
        for name in ("add", "sub", "mul", "div")
        for owner in (torch, Tensor)
    },
}
