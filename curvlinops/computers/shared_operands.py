"""Gives examples copies of parameters that are added to what belongs to them, or multiply it.

Examples of such parameters are embeddings of positions and scales of channels. They are in no
layer, and have no Kronecker factors. But the gradients for the copies are those of the examples.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvlinops.computers.formats import Format
from curvlinops.computers.group_statistic import fits
from curvlinops.computers.hooks import HooksCollector
from curvlinops.computers.usages import Parameters, Part, Usage

_FUNCTIONS = {
    getattr(owner, name)
    for owner, names in (
        (torch, ("add", "sub", "mul", "div")),
        (Tensor, ("add", "sub", "mul", "div", "__add__", "__sub__", "__mul__", "__truediv__")),
        (Tensor, ("add_", "sub_", "mul_", "div_", "__radd__", "__rsub__", "__rmul__")),
        (Tensor, ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__rtruediv__")),
    )
    for name in names
}


class SharedOperands(TorchFunctionMode):
    """Reports each example's gradient of such parameters to a collector, as those of biases.

    It is entered inside of :meth:`~curvlinops.computers.hooks.HooksCollector.listening`. Examples
    are taken to be in the first axis; who listens verifies that.

    Args:
        collector: The collector.
        params: The tensors at which the model is evaluated.
        names: The parameters that may get copies.
        n: The number of examples.
    """

    def __init__(
        self, collector: HooksCollector, params: dict[str, Tensor], names: Set[str], n: int
    ) -> None:
        super().__init__()
        self._collector = collector
        self._tensors = params
        self._params = Parameters(params)
        self._names = names
        self._n = n

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _FUNCTIONS and len(args) == 2 and all(isinstance(x, Tensor) for x in args):
            first, second = args
            args = self._own(first, second), self._own(second, first)
        return func(*args, **(kwargs or {}))

    def _own(self, operand: Tensor, other: Tensor) -> Tensor:
        """Return an operand, or copies of it: one for each example of the other."""
        with torch._C.DisableTorchFunction():
            if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
                return operand
            names = self._params.owners(operand)
            if len(names) != 1 or names[0] not in self._names or self._params.owners(other):
                return operand
            (name,) = names
            whole, n = self._tensors[name], self._n
            shape, stride = list(operand.shape), list(operand.stride())
            if operand.ndim == other.ndim and operand.shape[0] == 1:
                del shape[0], stride[0]
            axes = other.ndim - 1 - len(shape)
            if axes < 0 or other.shape[0] != n or not whole.is_contiguous():
                return operand
            if operand.dtype != whole.dtype or not fits(n * whole.numel()):
                return operand
            copies = whole.detach().reshape(1, -1).expand(n, -1).clone()
        size = whole.numel()
        usage = Usage(Format(), None, Part(name, 0, size, size))
        copies = self._collector.on_call(usage, copies, copies)
        with torch._C.DisableTorchFunction():
            start = operand.storage_offset() - whole.storage_offset()
            own = copies.as_strided((n, *[1] * axes, *shape), (size, *[0] * axes, *stride), start)
            # where the parameter's own gradient is wanted, it is not that of a detached view
            return own + (operand - operand.detach()) if operand.requires_grad else own


__all__ = ["SharedOperands"]
