"""Where a model uses its parameters: which layers read which parts of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvlinops.computers.formats import Format
from curvlinops.computers.layers import Call


@dataclass(frozen=True)
class Part:
    """A parameter, or contiguous rows of it, as a layer reads it.

    Attributes:
        name: The parameter's name.
        start: The first row, in canonical form.
        stop: The row behind the last one.
        whole: The number of rows of the whole parameter.
        transposed: Whether the parameter stores the transpose of what the layer reads.
    """

    name: str
    start: int
    stop: int
    whole: int
    transposed: bool = False


@dataclass(frozen=True)
class Usage:
    """A way in which a model uses parameters: a format, and a weight, a bias, or both.

    A parameter that is a constant is None.
    """

    format: Format
    weight: Part | None
    bias: Part | None

    def __hash__(self) -> int:
        """Return what is computed once: usages are keys of all that is known of layers."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.format, self.weight, self.bias))

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone: hashes differ between processes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def parts(self) -> dict[str, Part]:
        """The parts of parameters that are used, by role: ``"W"``, ``"b"``."""
        roles = {"W": self.weight, "b": self.bias}
        return {role: part for role, part in roles.items() if part is not None}

    def part(self, role: str) -> Part:
        """Return the part of the parameter in a role, ``"W"`` or ``"b"``."""
        return self.parts[role]

    def rows(self, role: str) -> tuple[int, int]:
        """Return the first row of the part in a role, and the row behind its last one."""
        part = self.part(role)
        return part.start, part.stop

    @property
    def joint(self) -> bool:
        """Whether weight and bias can be approximated together: their rows are the same."""
        weight, bias = self.weight, self.bias
        if weight is None or bias is None:
            return False
        return (weight.start, weight.stop, weight.whole) == (bias.start, bias.stop, bias.whole)

    @property
    def label(self) -> str:
        """What messages call it."""
        names = [part.name for part in self.parts.values()]
        return f"The layer of {' and '.join(map(repr, names))}"


def check_widths(usage: Usage, call: Call, output: Tensor) -> None:
    """Raise if a call's input, parameters and output do not fit together.

    PyTorch refuses such calls, but what reads a function's arguments may have read others. Factors
    would be cut, or filled up with zeros.

    Args:
        usage: How the call uses parameters.
        call: The call.
        output: What it returned.

    Raises:
        ValueError: If one has another width than the weight's shape, or the output, says.
    """
    form = call.format
    num_outputs = form.output_width(output.shape)
    if usage.weight is not None:
        assert call.weight is not None
        d_out, d_in = form.widths(call.weight.shape)
        d_in = d_out if form.is_norm else d_in * form.groups
        num_inputs = form.input_width(call.x.shape)
        if (num_inputs, num_outputs) != (d_in, d_out) or d_out % form.groups:
            groups = f" and {form.groups} groups" if form.groups > 1 else ""
            raise ValueError(
                f"{usage.label} was read as {form.name} with a weight of shape "
                f"{list(call.weight.shape)}{groups}, for inputs of width {d_in} and outputs of "
                f"width {d_out}. Its input of shape {list(call.x.shape)} has width {num_inputs}, "
                f"its output of shape {list(output.shape)} has width {num_outputs}. {_CHECK}"
            )
    if usage.bias is not None:
        assert call.bias is not None
        if call.bias.numel() != num_outputs:
            raise ValueError(
                f"{usage.label} was read as {form.name} with a bias of shape "
                f"{list(call.bias.shape)}, which must have an entry for each of the {num_outputs} "
                f"of its output of shape {list(output.shape)}. {_CHECK}"
            )


_CHECK = "Check what reads its arguments: the entry that was added with register_layer."


class Parameters:
    """Tensors that stand for a model's parameters, and views of them, are recognised.

    Args:
        params: The tensors by name.
    """

    def __init__(self, params: dict[str, Tensor]):
        self._params = params
        self._by_storage: dict[int, list[str]] = {}
        for name, p in params.items():
            self._by_storage.setdefault(_storage(p), []).append(name)

    def owners(self, tensor: Tensor) -> list[str]:
        """Return the parameters that a tensor shares memory with."""
        while _is_wrapped(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        names = self._by_storage.get(_storage(tensor), _NOBODY)
        if len(names) <= 1:
            return names
        first, last = _extent(tensor)
        return [
            name
            for name in names
            if max(first, _extent(self._params[name])[0])
            <= min(last, _extent(self._params[name])[1])
        ]

    def involved(self, *values: Any) -> set[str]:
        """Return the parameters that arguments of a function share memory with."""
        return {name for tensor in tensors_in(values) for name in self.owners(tensor)}

    def sharing(self, *values: Any) -> list[Tensor]:
        """Return the tensors among arguments that share memory with parameters."""
        return [tensor for tensor in tensors_in(values) if self.owners(tensor)]

    def usage(self, call: Call) -> Usage | None:
        """Return how a call uses the parameters, or None if it uses them in another way.

        A call that uses none is a usage without weight and bias.
        """
        if self.involved(call.x):
            return None
        weight = bias = None
        if call.weight is not None and self.owners(call.weight):
            weight = self._weight_part(call.weight, call.format)
            if weight is None:
                return None
        if call.bias is not None and self.owners(call.bias):
            bias = self._vector_part(call.bias)
            if bias is None:
                return None
        return Usage(call.format, weight, bias)

    def _weight_part(self, tensor: Tensor, form: Format) -> Part | None:
        """Return which part of a parameter a weight is."""
        names = self.owners(tensor)
        if len(names) != 1:
            return None
        (name,) = names
        p = self._params[name]
        if form.is_norm:
            same = tensor.shape == p.shape and tensor.storage_offset() == p.storage_offset()
            size = p.numel()
            return Part(name, 0, size, size) if same and _same_layout(tensor, p) else None
        if p.ndim < 2:
            return None
        rows, _ = form.widths(p.shape)
        if _same_layout(tensor, p) and tensor.storage_offset() == p.storage_offset():
            return Part(name, 0, rows, rows)
        if tensor.ndim != 2 or type(form) is not Format:
            return None
        matrix = p if p.ndim == 2 else p.detach().flatten(1) if p.is_contiguous() else None
        if matrix is None or p.ndim < 2:
            return None
        for transposed, candidate in ((False, matrix), (True, matrix.T)):
            part = _row_slice(tensor, candidate)
            if part is not None:
                return Part(name, *part, len(candidate), transposed)
        return None

    def _vector_part(self, tensor: Tensor) -> Part | None:
        """Return which part of a parameter a bias is."""
        names = self.owners(tensor)
        if len(names) != 1 or tensor.ndim > self._params[names[0]].ndim:
            return None
        p = self._params[names[0]]
        if _same_layout(tensor, p) and tensor.storage_offset() == p.storage_offset():
            return Part(names[0], 0, p.numel(), p.numel())
        if p.ndim != 1 or tensor.ndim != 1:
            return None
        part = _row_slice(tensor.unsqueeze(1), p.detach().unsqueeze(1))
        return None if part is None else Part(names[0], *part, len(p))


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_NOBODY: list[str] = []


def _row_slice(tensor: Tensor, matrix: Tensor) -> tuple[int, int] | None:
    """Return start and stop if a tensor is a view of rows of a matrix."""
    rows, columns = tensor.shape
    if columns != matrix.shape[1] or rows > matrix.shape[0]:
        return None
    distance = tensor.storage_offset() - matrix.storage_offset()
    step = matrix.stride(0)
    start = distance // step if step else 0
    if start < 0 or start + rows > matrix.shape[0] or start * step != distance:
        return None
    return (start, start + rows) if _same_layout(tensor, matrix[start : start + rows]) else None


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, and strides where these matter."""
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True) if a.shape == b.shape else None
    return pairs is not None and all(size == 1 or s == t for size, s, t in pairs)


def _storage(tensor: Tensor) -> int:
    """Return what identifies a tensor's memory; a number for no other if it has none."""
    if tensor.layout is not torch.strided:
        return -id(tensor)
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return -id(tensor)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first and last place of a tensor in its memory."""
    first = int(tensor.storage_offset())
    if not tensor.numel():
        return first, first
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return first, first + int(sum((size - 1) * step for size, step in steps))


def tensors_in(items: Iterable[Any]) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple, dict)) and item:
            found += tensors_in(item.values() if isinstance(item, dict) else item)
    return found


__all__ = ["Parameters", "Part", "Usage", "check_widths", "tensors_in"]
