"""The table of layers that KFAC supports: one entry per function says all there is to know of it.

Collectors see functions of PyTorch and their arguments, wherever a model calls them: in a module of
PyTorch, in one of the user's, or without any module. They ask this table only. A new kind of layer
is a new entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from curvlinops.computers.formats import (
    ChannelNormFormat,
    ConvolutionFormat,
    EmbeddingFormat,
    Format,
    NormFormat,
    TransposedConvolutionFormat,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """A call of a layer: its input, its parameters (or parts or transposes of them), its format."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    format: Format


#: Takes a function's arguments; returns None for a call that is not that of a layer.
Parser = Callable[..., Call | None]


@dataclass(frozen=True)
class LayerType:
    """What KFAC must know of a kind of layer.

    Attributes:
        name: Its name in messages.
        functions: The functions of PyTorch that compute it, as ``__torch_function__`` sees them,
            each with what reads its arguments.
        operations: The same for the operations that ``make_fx`` traces.
    """

    name: str
    functions: dict[Any, Parser]
    operations: dict[Any, Parser]


# --------------------------------------------------------------------------------------------------
# How arguments are read
# --------------------------------------------------------------------------------------------------
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
    """Read ``functional.linear``."""
    if weight.ndim != 2 or (bias is not None and bias.numel() != len(weight)):
        return None  # a bias can be one number for all outputs, or one for each example
    return Call(input, weight, bias, Format())


def _matmul(input: Tensor, other: Tensor) -> Call | None:
    """Read a product whose right factor is a weight, stored as ``[d_in, d_out]``."""
    if not all(isinstance(x, Tensor) for x in (input, other)) or other.ndim != 2 or input.ndim == 0:
        return None
    return Call(input, other.T, None, Format())


def _mm(input: Tensor, mat2: Tensor) -> Call | None:
    """Read ``torch.mm``."""
    return _matmul(input, mat2)


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Call | None:
    """Read ``torch.addmm``, with which the Conv1D of transformers computes."""
    if alpha != 1 or beta != 1 or input.shape != mat2.shape[1:]:
        return None
    return Call(mat1, mat2.T, input, Format())


def _tuple(value: Any, d: int) -> tuple[int, ...]:
    """Return an option of a convolution, one number or one for each axis, for d axes."""
    numbers = tuple(value) if isinstance(value, Sequence) else (value,)
    return numbers * d if len(numbers) == 1 else numbers


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Call:
    """Read ``functional.conv*d``."""
    kernel_size = tuple(weight.shape[2:])
    d = len(kernel_size)
    dilations = _tuple(dilation, d)
    if isinstance(padding, str):
        same = padding == "same"
        totals = [i * (k - 1) * same for i, k in zip(dilations, kernel_size, strict=True)]
        sides = tuple((total // 2, total - total // 2) for total in totals)
    else:
        sides = tuple((p, p) for p in _tuple(padding, d))
    form = ConvolutionFormat(groups, kernel_size, _tuple(stride, d), sides, dilations)
    return Call(input, weight, bias, form)


def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Call:
    """Read ``functional.conv_transpose*d``."""
    kernel_size = tuple(weight.shape[2:])
    options = [_tuple(x, len(kernel_size)) for x in (stride, padding, output_padding, dilation)]
    return Call(input, weight, bias, TransposedConvolutionFormat(groups, kernel_size, *options))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call:
    """Read ``functional.embedding``."""
    size = weight.shape[0]
    if padding_idx is not None and padding_idx < 0:
        padding_idx += size
    form = EmbeddingFormat(size=size, padding_idx=padding_idx, dtype=weight.dtype)
    return Call(input, weight, None, form)


def _embedding_operation(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call:
    """Read ``aten.embedding``, where -1 stands for no padding."""
    return _embedding(indices, weight, None if padding_idx < 0 else padding_idx)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Call:
    """Read ``functional.layer_norm``."""
    return Call(input, weight, bias, NormFormat(1, "LayerNorm", tuple(normalized_shape), eps))


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Call:
    """Read ``functional.rms_norm``."""
    return Call(input, weight, None, NormFormat(1, "RMSNorm", tuple(normalized_shape), eps))


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Call:
    """Read ``functional.group_norm``."""
    return Call(input, weight, bias, ChannelNormFormat(1, "GroupNorm", num_groups, eps))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Call | None:
    """Read ``functional.batch_norm``: a layer in evaluation mode only."""
    if training or running_mean is None or running_var is None:
        return None
    form = ChannelNormFormat(1, "BatchNorm", 1, eps, (running_mean, running_var))
    return Call(input, weight, bias, form)


def _batch_norm_operation(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Call | None:
    """Read ``aten.batch_norm``."""
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------
def _both(names: Sequence[str], parser: Parser) -> tuple[dict[Any, Parser], dict[Any, Parser]]:
    """Return functions and operations of the same names and arguments."""
    functions = {getattr(functional, name): parser for name in names}
    operations = {
        getattr(getattr(aten, name), overload): parser
        for name in names
        for overload in getattr(aten, name).overloads()
        if overload in ("default", "padding", "input")
    }
    return functions, operations


LAYERS: list[LayerType] = [
    LayerType(
        "Linear",
        {
            functional.linear: _linear,
            **dict.fromkeys((torch.matmul, Tensor.matmul), _matmul),
            **dict.fromkeys((torch.mm, Tensor.mm), _mm),
            Tensor.__matmul__: _matmul,
            torch.addmm: _addmm,
        },
        {
            aten.linear.default: _linear,
            aten.matmul.default: _matmul,
            aten.mm.default: _mm,
            aten.addmm.default: _addmm,
        },
    ),
    *(LayerType(f"Conv{d}d", *_both([f"conv{d}d"], _convolution)) for d in (1, 2, 3)),
    *(
        LayerType(f"ConvTranspose{d}d", *_both([f"conv_transpose{d}d"], _transposed_convolution))
        for d in (1, 2, 3)
    ),
    LayerType(
        "Embedding",
        {functional.embedding: _embedding},
        {aten.embedding.default: _embedding_operation},
    ),
    LayerType("LayerNorm", *_both(["layer_norm"], _layer_norm)),
    LayerType("RMSNorm", *_both(["rms_norm"], _rms_norm)),
    LayerType("GroupNorm", *_both(["group_norm"], _group_norm)),
    LayerType(
        "BatchNorm",
        {functional.batch_norm: _batch_norm},
        {aten.batch_norm.default: _batch_norm_operation},
    ),
]


def read_function(func: Any, args: Any, kwargs: Any) -> Call | None:
    """Return a function's call as that of a layer, if it is one."""
    for layer in LAYERS:
        if func in layer.functions:
            return _read(layer.name, layer.functions[func], args, kwargs)
    return None


def read_operation(operation: Any, args: Any, kwargs: Any) -> Call | None:
    """Return a traced operation as the call of a layer, if it is one."""
    for layer in LAYERS:
        if operation in layer.operations:
            return _read(layer.name, layer.operations[operation], args, kwargs)
    return None


def _read(name: str, parser: Parser, args: Any, kwargs: Any) -> Call | None:
    """Read arguments; those that the entry does not know are not those of a layer."""
    try:
        call = parser(*args, **kwargs)
    except Exception as error:
        if isinstance(error, TypeError) and not _takes(parser, args, kwargs):
            return None
        raise RuntimeError(
            f"What reads the arguments of the layer {name!r}, {_name(parser)}, failed with "
            f"{type(error).__name__} ({error}). Correct it, or let it return None for a call that "
            "is not that of a layer."
        ) from error
    _check_call(name, parser, call)
    return call


def _check_call(name: str, parser: Parser, call: Any) -> None:
    """Raise unless what was read is None, or a call of tensors in a format."""
    if call is None:
        return
    if not isinstance(call, Call):
        wrong = f"something of type {type(call).__name__}"
    elif not isinstance(call.x, Tensor):
        wrong = f"a Call whose x has type {type(call.x).__name__}"
    elif not isinstance(call.weight, (Tensor, NoneType)):
        wrong = f"a Call whose weight has type {type(call.weight).__name__}"
    elif not isinstance(call.bias, (Tensor, NoneType)):
        wrong = f"a Call whose bias has type {type(call.bias).__name__}"
    elif not isinstance(call.format, Format):
        wrong = f"a Call whose format has type {type(call.format).__name__}"
    else:
        return
    raise TypeError(
        f"What reads the arguments of the layer {name!r}, {_name(parser)}, returned {wrong}. It "
        "must return a Call with a tensor x, a weight and a bias that are tensors or None, and an "
        "instance of Format; or None for a call that is not that of a layer."
    )


def _takes(parser: Parser, args: Any, kwargs: Any) -> bool:
    """Return whether a function can be called with arguments."""
    try:
        signature(parser).bind(*args, **kwargs)
    except (TypeError, ValueError):  # or it has no signature
        return False
    return True


def _name(parser: Parser) -> str:
    """Return what messages call a function."""
    return getattr(parser, "__qualname__", repr(parser))


def register_layer(layer: LayerType) -> None:
    """Add a kind of layer to those that KFAC and its relatives support.

    Args:
        layer: Its entry. Its functions are read as it says, also if earlier entries have them. It
            replaces an entry of the same name that was registered before.

    Raises:
        TypeError: If it is not a :class:`LayerType`, with a name and two dicts of functions.
    """
    if not isinstance(layer, LayerType):
        raise TypeError(f"register_layer takes a LayerType, got {type(layer).__name__}.")
    if not isinstance(layer.name, str):
        raise TypeError(f"The name of a LayerType must be a string, got {layer.name!r}.")
    for field in ("functions", "operations"):
        _check_readers(layer.name, field, getattr(layer, field))
    # layers of the library stay, even if a user calls some others like them
    kept = [old for old in LAYERS if old.name != layer.name or old in _OWN]
    LAYERS[:] = [layer, *kept]


_OWN = tuple(LAYERS)


def _check_readers(name: str, field: str, readers: Any) -> None:
    """Raise unless a field of an entry is a dict from functions to functions."""
    if not isinstance(readers, dict):
        wrong = type(readers).__name__
    elif not all(callable(x) for item in readers.items() for x in item):
        wrong = repr(readers)
    else:
        return
    raise TypeError(
        f"The {field} of the LayerType {name!r} must be a dict from functions to what reads their "
        f"arguments, also a function; got {wrong}."
    )


__all__ = ["LAYERS", "Call", "LayerType", "read_function", "read_operation", "register_layer"]
