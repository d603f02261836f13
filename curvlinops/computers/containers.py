"""Nested containers of tensors: the inputs of a model, and the results of functions of a batch.

They are those that data may consist of (:func:`~curvlinops.risk.data.to_device`), and diagonal
operators. ``torch.utils._pytree`` would take the mappings of other libraries, which are found by
what they do and not by their type, for leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvlinops.diag import DiagonalLinearOperator


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to all tensors in nested mappings, lists, tuples and diagonal operators.

    Args:
        value: A tensor, a container, or anything else.
        function: The function.

    Returns:
        The value with new tensors. Containers are copied and keep their type; anything else is
        returned as it is.

    Example:
        >>> mapped({"a": [torch.zeros(2), 1]}, lambda t: t.shape)
        {'a': [torch.Size([2]), 1]}
    """
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is dict:  # apart: this can be traced by torch.compile
        return {key: mapped(entry, function) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)([mapped(entry, function) for entry in value])
    if isinstance(value, DiagonalLinearOperator):
        return DiagonalLinearOperator([function(entry) for entry in value.tensors()])
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(entry, function) for entry in value))
    if isinstance(value, MutableMapping):
        result = copy.copy(value)
        for key in list(result):
            result[key] = mapped(result[key], function)
        return result
    return value


def flattened(value: Any) -> list[Tensor]:
    """Return the tensors in a nested container, in a fixed order.

    Args:
        value: What :func:`mapped` takes.

    Returns:
        The tensors.

    Example:
        >>> flattened({"a": [torch.zeros(2), 1], "b": torch.ones(1)})
        [tensor([0., 0.]), tensor([1.])]
    """
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, keep)
    return found


def refilled(value: Any, tensors: Sequence[Any]) -> Any:
    """Put other tensors into a nested container.

    Args:
        value: What :func:`mapped` takes.
        tensors: As many tensors as :func:`flattened` returns.

    Returns:
        A copy of the container with these tensors.

    Example:
        >>> refilled({"a": [torch.zeros(2), 1]}, [torch.ones(1)])
        {'a': [tensor([1.]), 1]}
    """
    position = 0

    def following(_: Tensor) -> Any:
        nonlocal position
        position += 1
        return tensors[position - 1]

    return mapped(value, following)


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, slice)


def signature(value: Any, layout: bool = True) -> Hashable | None:
    """Return what a trace depends on, besides the tensors' entries.

    Args:
        value: What :func:`mapped` takes.
        layout: Whether the tensors' strides, and whether they require gradients, belong to it.

    Returns:
        Something that is equal for containers of the same structure, with tensors of the same
        shapes, dtypes and devices; None if the container holds an object that may hold anything.

    Example:
        >>> X = {"a": torch.zeros(2), "b": 3}
        >>> signature(X) == signature({"a": torch.ones(2), "b": 3})
        True
        >>> signature(X) == signature({"a": torch.ones(2), "b": 4})
        False
    """
    if isinstance(value, Tensor):
        basic = (tuple(value.shape), value.dtype, value.device)
        return (*basic, value.stride(), value.requires_grad) if layout else basic
    if isinstance(value, DiagonalLinearOperator):
        children, keys = value.tensors(), None
    elif isinstance(value, MutableMapping):
        children, keys = list(value.values()), tuple(value.keys())
    elif isinstance(value, (list, tuple)):
        children, keys = list(value), None
    else:
        return ("constant", type(value), value) if isinstance(value, _PLAIN) else None
    parts = [signature(child, layout) for child in children]
    return None if None in parts else (type(value), keys, *parts)


def reordered(value: Any, like: Any) -> Any:
    """Return a dictionary with its keys in the order of another one, if they are the same.

    Args:
        value: A dictionary, or anything else.
        like: The other one.

    Returns:
        A new dictionary; what is none, or has other keys, is returned as it is.

    Example:
        >>> reordered({"b": 1, "a": 2}, {"a": 0, "b": 0})
        {'a': 2, 'b': 1}
    """
    if type(value) is not dict or type(like) is not dict or set(value) != set(like):
        return value
    return {key: value[key] for key in like}


__all__ = ["flattened", "mapped", "refilled", "reordered", "signature"]
