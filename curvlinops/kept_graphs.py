"""Graphs of batches that are kept between products, and when they are out of date."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from curvlinops._formats import Columns


@dataclass
class KeptGraph:
    """A batch's graph.

    Attributes:
        multiply: Maps a dict of tensors ``[*N_i]`` to the product, a list of tensors ``[*N_i]``.
        normalizer: The batch's normalizer of the loss.
        num_terms: The batch's number of loss terms.
    """

    multiply: Callable[[dict[str, Tensor]], Columns]
    normalizer: Tensor | float
    num_terms: int


@dataclass
class _Entry:
    """A kept graph and what it was made from."""

    data: list[Any]  # held, so that no other tensor gets the memory of one that it was made from
    marks: list[Any]
    first_term: int
    graph: KeptGraph


class KeptGraphs:
    """The kept graphs of all batches, in their order in the data.

    A copy is empty: graphs cannot be copied or saved.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._made_from: list[Any] = []
        self._marks: list[Any] = []
        self._index = 0
        self._replaced = 0
        self.wanted = True

    def __deepcopy__(self, memo: Any) -> KeptGraphs:
        return KeptGraphs()

    def __reduce__(self) -> Any:
        return KeptGraphs, ()

    def __len__(self) -> int:
        return len(self._entries)

    def start(self, dependencies: list[Any]) -> None:
        """Begin a pass over the data; forget all graphs if something that all depend on changed.

        Args:
            dependencies: Tensors and plain values that all graphs depend on.
        """
        marks = [mark(x) for x in dependencies]
        if not _same(marks, self._marks) or any(i >= self._index for i in self._entries):
            self._entries.clear()
        self._made_from, self._marks = dependencies, marks
        self._index = 0

    def find(self, element: Any, first_term: int) -> KeptGraph | None:
        """Return the graph of the next batch, if it is up to date.

        Args:
            element: The element of the data.
            first_term: Index of the batch's first loss term.
        """
        index = self._index
        self._index += 1
        entry = self._entries.get(index)
        if entry is None:
            return None
        data = list(_leaves(element))
        marks = [mark(x) for x in data]
        if _same(marks, entry.marks) and entry.first_term == first_term:
            self._replaced = 0
            return entry.graph
        pairs = zip(data, entry.data, strict=False)
        self._replaced += any(a is not b for a, b in pairs if isinstance(a, Tensor))
        if self._replaced > len(self._entries):  # in two passes, one after the other
            self.give_up("the data give new tensors in each pass. Pass a list of batches")
            return None
        del self._entries[index]
        return None

    def keep(self, element: Any, first_term: int, graph: KeptGraph) -> None:
        """Keep the graph of the batch that :meth:`find` was last asked for.

        Args:
            element: The element of the data.
            first_term: Index of the batch's first loss term.
            graph: The batch's graph.
        """
        data = list(_leaves(element))
        self._entries[self._index - 1] = _Entry(data, [mark(x) for x in data], first_term, graph)

    def give_up(self, reason: str) -> None:
        """Keep nothing from now on, and warn.

        Args:
            reason: Why graphs cannot be kept.
        """
        self._entries.clear()
        self.wanted = False
        warn(f"keep_graph=True has no effect: {reason.removesuffix('.')}.", stacklevel=2)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what nested mappings, lists, and tuples hold."""
    if isinstance(value, Mapping):
        for key in value:
            yield key
            yield from _leaves(value[key])
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def mark(value: Any) -> Any:
    """Return something that is equal for two looks at the same, unchanged value only."""
    if not isinstance(value, Tensor):
        plain = isinstance(value, (str, bytes, int, float, bool, type(None)))
        return value if plain else _Identity(value)
    if value.is_inference():
        return object()  # has no version: it is never known to be unchanged
    try:
        pointer = value.data_ptr()
    except RuntimeError:  # sparse
        pointer = id(value)
    stride = value.stride() if value.layout is torch.strided else ()
    return pointer, value._version, value.shape, stride, value.dtype, value.requires_grad


class _Identity:
    """Equal for the same object only."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._value is other._value

    __hash__ = None  # type: ignore[assignment]


def _same(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists of marks are equal."""
    return len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True))
