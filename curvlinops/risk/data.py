"""Batches of a data set: what the data may be, the size of a batch, and moving it to a device."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """One batch on the device of the parameters.

    Attributes:
        X: Inputs, a tensor or a mapping.
        y: Targets.
        n: Number of examples.
        source: The element of the data that it was made from.
    """

    X: Any
    y: Any
    n: int
    source: Any = None


class TermCounter:
    """Indices of the loss terms in the data, as the batches go by.

    Args:
        start: Index of the first term of the first batch.

    Example:
        >>> counter = TermCounter()
        >>> counter.advance(5), counter.advance(3), counter.advance(5)
        (0, 5, 8)
    """

    def __init__(self, start: int = 0) -> None:
        self.position = start

    def advance(self, num_terms: int) -> int:
        """Pass over a batch.

        Args:
            num_terms: Number of loss terms of the batch.

        Returns:
            Index of its first loss term.
        """
        first_term = self.position
        self.position += num_terms
        return first_term


class BatchSource:
    """Data that can be iterated again and again, and how its elements become batches.

    Args:
        data: Iterable of pairs ``(X, y)``. ``X`` is a tensor or a mapping (``dict``, ``UserDict``,
            ``BatchEncoding``, ...).
        device: Where the tensors are moved. The user's objects stay as they are: mappings are
            copied (shallow, they keep their type).
        batch_size_fn: Number of examples in an ``X``. Default: ``X.shape[0]``, for tensors only.

    Raises:
        ValueError: If ``data`` can be iterated only once, or cannot be iterated.

    Example:
        >>> source = BatchSource([(torch.zeros(3, 2), torch.zeros(3))], torch.device("cpu"))
        >>> [batch.n for batch in map(source.batch, source.data)]
        [3]
    """

    def __init__(
        self,
        data: Iterable[Any],
        device: torch.device,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        # Not `iter(data) is data`: iter(...) of a DataLoader would start its workers.
        if isinstance(data, Iterator):
            raise ValueError(
                f"data is a {type(data).__name__}, which can be iterated only once, but every pass "
                "over the data needs a new iteration. Pass a list of batches or a DataLoader, e.g. "
                "data=list(data)."
            )
        if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
            raise ValueError(
                "data must be an iterable of batches (X, y), such as a list or a DataLoader, got "
                f"{type(data).__name__}."
            )
        self.data = data
        self.device = device
        self.batch_size_fn = batch_size_fn

    @property
    def length(self) -> int | None:
        """Number of batches, or None where the data cannot tell."""
        try:
            return len(self.data)  # type: ignore[arg-type]
        except TypeError:
            return None

    def batch(self, element: Any) -> Batch:
        """Turn an element of the data into a batch on the device.

        Args:
            element: A pair ``(X, y)``, tuple or list.

        Returns:
            The batch.

        Raises:
            ValueError: If the element is not a pair, if its ``X`` is neither a tensor nor a
                mapping, or if its size is not known or not a positive integer.
        """
        if not isinstance(element, (tuple, list)) or len(element) != 2:
            got = type(element).__name__
            if isinstance(element, (tuple, list)):
                got += f" of length {len(element)}"
            raise ValueError(
                f"Each element of data must be a pair (X, y) of inputs and targets, got a {got}."
            )
        X, y = element
        if not isinstance(X, (Tensor, Mapping)):
            raise ValueError(
                "The inputs X of a batch must be a tensor or a mapping (dict, UserDict, "
                f"BatchEncoding), got {type(X).__name__}."
            )
        X = to_device(X, self.device)
        return Batch(X, to_device(y, self.device), self.batch_size(X), element)

    def batch_size(self, X: Any) -> int:
        """Count the examples of a batch."""
        if self.batch_size_fn is None:
            if not isinstance(X, Tensor):
                raise ValueError(
                    f"The inputs X of a batch are a {type(X).__name__}, so the number of examples "
                    "is not known. Pass batch_size_fn, e.g. "
                    "batch_size_fn=lambda X: X['input_ids'].shape[0]."
                )
            if X.ndim == 0:
                raise ValueError("The inputs X of a batch are a scalar. Add a batch dimension.")
            n, origin = X.shape[0], "X.shape[0]"
        else:
            origin = "batch_size_fn(X)"
            result = self.batch_size_fn(X)
            try:
                n = operator.index(result)
            except TypeError:
                raise ValueError(f"{origin} must be an integer, got {result!r}.") from None
        if n <= 0:
            raise ValueError(f"Batches must have at least one example, got {origin} = {n}.")
        return n


class NoData:
    """The data of a risk whose batches come one by one from outside: a pass over them is empty."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def without_inference(tensor: Tensor) -> Tensor:
    """Clone an inference tensor, which autograd refuses; to be called outside of inference mode.

    Other tensors are returned as they are.
    """
    # torch.compile cannot ask, and refuses inference tensors itself.
    inference = not torch.compiler.is_compiling() and tensor.is_inference()
    return tensor.clone() if inference else tensor


def fresh_mapping(value: Any) -> Any:
    """Copy a mapping (shallow, of the same type); return anything else as it is."""
    if type(value) is dict:  # apart: this can be traced by torch.compile
        return dict(value)
    return copy.copy(value) if isinstance(value, MutableMapping) else value


def to_device(value: Any, device: torch.device) -> Any:
    """Move all tensors in nested mappings, lists, and tuples to a device.

    Containers are copied and keep their type; anything else is returned as it is. Inference tensors
    are cloned, because autograd refuses them.

    Args:
        value: A tensor, a container, or anything else.
        device: The device.

    Returns:
        The value with moved tensors.
    """
    if isinstance(value, Tensor):
        return without_inference(value.to(device))
    if isinstance(value, MutableMapping):
        result = fresh_mapping(value)
        for key in list(result):
            result[key] = to_device(result[key], device)
        return result
    if type(value) in (list, tuple):
        return type(value)([to_device(entry, device) for entry in value])
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(entry, device) for entry in value))
    return value


__all__ = [
    "Batch",
    "BatchSource",
    "NoData",
    "TermCounter",
    "fresh_mapping",
    "to_device",
    "without_inference",
]
