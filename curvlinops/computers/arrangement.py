"""Where the examples of a batch are in the tensors inside of a model.

Layers see examples along the first axis, along another one (attention puts positions first), inside
of an axis (positions and examples flattened together), or not at all (an embedding of positions is
the same for all examples). A look at two small batches tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Arrangement:
    """Where the examples are in a layer's input and output.

    Attributes:
        axis: The axis; None if the tensor is the same for all examples.
        inner: Whether they run fastest in it: positions are slower.
    """

    axis: int | None = 0
    inner: bool = False

    def examples_first(self, tensor: Tensor, n: int) -> Tensor:
        """Bring the n examples to the first axis; the same tensor for each where there are none."""
        if self.axis is None:
            return spread(tensor, n)
        if self.axis == 0 and not self.inner:
            return tensor
        if tensor.ndim <= self.axis or tensor.shape[self.axis] % n:
            return tensor  # an error follows
        sizes = (-1, n) if self.inner else (n, -1)
        return tensor.unflatten(self.axis, sizes).movedim(self.axis + self.inner, 0)


BATCH_FIRST = Arrangement()


class Arrangements:
    """Where the examples are in the calls of layers, found by comparison with a single example.

    A call is a usage, and the number of the call in this way.
    """

    def __init__(self) -> None:
        self._single: dict[Any, Tensor] = {}
        self._found: dict[Any, Arrangement] = {}
        self._unverified: set[Any] = set()
        self._refused: set[Any] = set()
        self._ignored = False

    def learn(self, single: dict[Any, Tensor]) -> None:
        """Take the inputs of calls for a single example."""
        self._single.update({k: x for k, x in single.items() if k not in self._found})

    def of(self, usage: Any, index: int, x: Tensor, n: int) -> Arrangement:
        """Return where n examples are in the input of a call, and in its output."""
        if n == 1 or self._ignored:
            return BATCH_FIRST
        call = (usage, index)
        where = self._found.get(call)
        if where is None:
            if call not in self._single:
                return BATCH_FIRST
            where = self._found[call] = find_arrangement(self._single.pop(call), x, n)
            if where.axis is None:
                self._unverified.add(call)
        return where

    def unverified(self) -> list[Any]:
        """Return the calls with inputs that are the same for all examples, once."""
        calls, self._unverified = sorted(self._unverified, key=str), set()
        return calls

    def refuse(self, calls: Iterable[Any]) -> None:
        """Note calls whose output must not be made one for each example."""
        self._refused.update(calls)

    def refuses(self, usage: Any, index: int) -> bool:
        """Return whether a call is one of these."""
        return bool(self._refused) and (usage, index) in self._refused

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Take all examples to be in the first axis inside."""
        self._ignored = True
        try:
            yield
        finally:
            self._ignored = False


def spread(tensor: Tensor, n: int) -> Tensor:
    """Return a tensor that is the same for all examples with an axis for them: the first one."""
    if tensor.ndim > 1 and tensor.shape[0] == 1:
        return tensor.expand(n, *tensor.shape[1:])
    return tensor.unsqueeze(0).expand(n, *tensor.shape)


def find_arrangement(one: Tensor, many: Tensor, n: int) -> Arrangement:
    """Return where examples are in a tensor.

    Args:
        one: The tensor for the first example alone.
        many: The tensor for n examples.
        n: Their number.
    """
    if one.ndim != many.ndim:
        return BATCH_FIRST
    sizes = zip(one.shape, many.shape, strict=True)
    changed = [k for k, (size, other) in enumerate(sizes) if size != other]
    if not changed:
        return Arrangement(None)
    axis = changed[0]
    positions = one.shape[axis]
    if len(changed) > 1 or many.shape[axis] != n * positions:
        return BATCH_FIRST
    if positions == 1:
        return Arrangement(axis)
    outer = many.narrow(axis, 0, positions)
    inner = many.unflatten(axis, (positions, n)).select(axis + 1, 0)
    if _distance(outer, one) <= _distance(inner, one):
        return Arrangement(axis)
    return Arrangement(axis, inner=True)


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the squared distance of two tensors."""
    return float((a.double() - b.double()).square().sum())


__all__ = ["BATCH_FIRST", "Arrangement", "Arrangements", "find_arrangement", "spread"]
