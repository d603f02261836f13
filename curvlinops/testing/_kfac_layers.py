"""The layers that a model calls, as matrices of parameters that multiply rows of inputs.

Nothing here is shared with the computers of Kronecker factors. The rows are read off by calling a
layer with other weights, whose only non-zero entries are ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from curvlinops.testing._check import wide


@dataclass
class LayerCall:
    """One call of a layer for one example.

    Attributes:
        weight: Where the entries of W are in the parameter vector ``[d_out, d_in]``; None for a
            constant.
        bias: The same for the bias ``[d_out]``.
        inputs: The rows a ``[S, G, d_in]``, for each of G channel groups.
        rows: Brings a tensor of the output's shape, behind a leading axis, to ``[P, S, d_out]``.
        jacobian: Derivatives of all entries of the prediction by the outputs ``[P, S, d_out]``.
    """

    weight: Tensor | None
    bias: Tensor | None
    inputs: Tensor
    rows: Callable[[Tensor], Tensor]
    jacobian: Tensor = field(default_factory=lambda: torch.empty(0))


#: Functions that are linear in a weight: where input, weight and bias are among their arguments.
_MATRIX: dict[Any, tuple[int, int, int | None]] = {
    functional.linear: (0, 1, 2),
    torch.addmm: (1, 2, 0),
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), (0, 1, None)
    ),
}
_CONVOLUTIONS = {getattr(functional, f"conv{d}d"): d for d in (1, 2, 3)}
_TRANSPOSED = {getattr(functional, f"conv_transpose{d}d"): d for d in (1, 2, 3)}
_NORMS = (
    functional.layer_norm,
    functional.rms_norm,
    functional.group_norm,
    functional.batch_norm,
)
_NAMES = ("input", "weight", "bias")
#: Attention in a copy of its module where it does not ask for modes.
_open_attention = FunctionType(
    functional.multi_head_attention_forward.__code__,
    {**vars(functional), "has_torch_function": lambda tensors: False},
    argdefs=functional.multi_head_attention_forward.__defaults__,
)


class Recorder(TorchFunctionMode):
    """Sees the layers that a model calls with parameters, and lets their outputs be differentiated.

    Args:
        leaves: The parameters, contiguous.
        places: Where their entries are in the parameter vector.
    """

    def __init__(self, leaves: Mapping[str, Tensor], places: Mapping[str, Tensor]):
        super().__init__()
        #: The calls, and zeros that were added to their outputs.
        self.calls: list[tuple[LayerCall, Tensor]] = []
        #: The names of parameters of normalisation layers.
        self.norms: set[str] = set()
        self._names = {id(leaf): name for name, leaf in leaves.items()}
        self._parameter_places = places

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            with self:  # what it calls is hidden from modes otherwise
                return _open_attention(*args, **kwargs)
        output = func(*args, **kwargs)
        if func in _NORMS:
            for value in (*args, *kwargs.values()):
                if self._owner(value) is not None:
                    self.norms.add(str(self._owner(value)))
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output
        call = self._read(func, args, kwargs, output)
        if call is None or (call.weight is None and call.bias is None):
            return output
        shift = torch.zeros_like(output, requires_grad=True)
        self.calls.append((call, shift))
        return output + shift

    def _owner(self, tensor: Any) -> str | None:
        """Return the parameter that a tensor is, or is a view of."""
        if not isinstance(tensor, Tensor):
            return None
        return self._names.get(id(tensor if tensor._base is None else tensor._base))

    def _places(self, tensor: Tensor | None) -> Tensor | None:
        """Return where the entries of a parameter, or of a view, are in the parameter vector."""
        name = self._owner(tensor)
        if tensor is None or name is None:
            return None
        places = self._parameter_places[name]
        entries = torch.arange(len(places))
        return places[entries.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())]

    def _read(self, func: Any, args: tuple[Any, ...], kwargs: Any, y: Tensor) -> LayerCall | None:
        """Return a function's call as that of a layer, if it is one that is known."""
        if func in _MATRIX:
            where = _MATRIX[func]
            x, weight, bias = (_argument(args, kwargs, *pair) for pair in zip(where, _NAMES))  # noqa: B905
            if not isinstance(x, Tensor) or weight is None or weight.ndim != 2 or not x.ndim:
                return None
            places = self._places(weight)
            if func is not functional.linear and places is not None:
                places = places.T
            inputs = wide(x).reshape(-1, 1, x.shape[-1]).clone()  # it may be changed in place
            return LayerCall(places, self._places(bias), inputs, _rows(-1))
        if func is functional.embedding:
            tokens, weight = (_argument(args, kwargs, i, _NAMES[i]) for i in (0, 1))
            padding = _argument(args, kwargs, 2, "padding_idx")
            inputs = functional.one_hot(tokens.flatten().long(), len(weight))
            if padding is not None:  # whose row is a constant
                inputs[:, padding] = 0
            places = self._places(weight)
            places = None if places is None else places.T
            return LayerCall(places, None, wide(inputs).unsqueeze(1), _rows(-1))
        if func in _CONVOLUTIONS or func in _TRANSPOSED:
            return self._convolution(func, args, kwargs, y)
        return None

    def _convolution(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, y: Tensor
    ) -> LayerCall | None:
        """Return the call of a convolution."""
        x, weight, bias = (_argument(args, kwargs, i, name) for i, name in enumerate(_NAMES))
        groups = _argument(args, kwargs, 6, "groups") or 1
        spatial = _TRANSPOSED[func] if func in _TRANSPOSED else _CONVOLUTIONS[func]
        order = torch.arange(weight.numel()).reshape(weight.shape)
        matrix = order.flatten(1)  # [C_out, C_in / G · K]
        if func in _TRANSPOSED:  # [C_in, C_out / G, K]
            matrix = order.reshape(groups, -1, weight.shape[1], prod(weight.shape[2:]))
            matrix = matrix.transpose(1, 2).flatten(2).flatten(0, 1)
        rest = {name: value for name, value in kwargs.items() if name not in _NAMES}
        rows = _rows(-1 - spatial)
        height, width = len(matrix) // groups, matrix.shape[1]
        parts = []
        for start in range(0, width, height):  # as many entries at once as there are outputs
            size = min(height, width - start)
            ones = torch.zeros(weight.numel(), dtype=x.dtype, device=x.device)
            diagonal = matrix.reshape(groups, height, width)[:, :size, start : start + size]
            ones[diagonal.diagonal(dim1=1, dim2=2).flatten().to(x.device)] = 1
            with torch.no_grad():
                seen = func(x.detach(), ones.reshape(weight.shape), None, *args[3:], **rest)
            seen = rows(wide(seen).unsqueeze(0))[0].unflatten(-1, (groups, height))
            parts.append(seen[..., :size])
        places = self._places(weight)
        if places is not None:
            places = places.reshape(-1)[matrix]
        return LayerCall(places, self._places(bias), torch.cat(parts, dim=-1), rows)


def _argument(args: tuple[Any, ...], kwargs: Any, index: int | None, name: str) -> Any:
    """Return an argument of a function, None if it is not given."""
    if index is None:
        return None
    return args[index] if index < len(args) else kwargs.get(name)


def _rows(axis: int) -> Callable[[Tensor], Tensor]:
    """Return what brings the axis of outputs to the end, and flattens those between."""
    return lambda t: t.movedim(axis, -1).flatten(1, -2) if t.ndim > 2 else t.unsqueeze(1)


__all__ = ["LayerCall", "Recorder"]
