"""Where the examples of a batch are in the tensors inside of a model.

Layers see examples along the first axis, along another one (attention puts positions first), inside
of an axis (positions and examples flattened together), or not at all (an embedding of positions is
the same for all examples). The inputs of a batch tell, compared with those of its first and last
example alone. If they do not, all examples are taken as one: sums over all positions are right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite
from operator import mul
from typing import Any

import torch
from torch import Tensor

from curvlinops.computers.selection import unevenly_selected

# How far entries of the same example may be off, relative to the largest: products may be those of
# bfloat16. And how many times farther those of others are at least.
_SLACK, _FARTHER = 2**-5, 10


@dataclass(frozen=True)
class Arrangement:
    """Where the examples are in a layer's input and output.

    Attributes:
        axis: The axis; None if the tensor is the same for all examples.
        inner: Whether they run fastest in it: positions are slower.
        known: Whether examples can be told apart.
    """

    axis: int | None = 0
    inner: bool = False
    known: bool = True

    def number(self, n: int) -> int:
        """Return into how many examples the tensor can be divided."""
        return n if self.known else 1

    def owners(self, tensor: Tensor, n: int) -> Tensor:
        """Return the number of the example that each entry of a tensor is of, in its shape."""
        assert self.axis is not None
        size = tensor.shape[self.axis]
        index = torch.arange(size, device=tensor.device)
        index = index % n if self.inner else index // (size // n)
        shape = [size if axis == self.axis else 1 for axis in range(tensor.ndim)]
        return index.reshape(shape).expand(tensor.shape)

    def examples_first(self, tensor: Tensor, n: int) -> Tensor:
        """Bring the n examples to the first axis; the same tensor for each where there are none."""
        if self.axis is None:
            return spread(tensor, n)
        if not self.known or (self.axis == 0 and not self.inner):
            return tensor
        if tensor.ndim <= self.axis or tensor.shape[self.axis] % n:
            return tensor  # an error follows
        sizes = (-1, n) if self.inner else (n, -1)
        found = tensor.unflatten(self.axis, sizes).movedim(self.axis + self.inner, 0)
        # Positions stay a part of the first axis, if they were: layers may need the other axes.
        return found.flatten(0, 1) if self.axis == 0 else found


BATCH_FIRST = Arrangement()
UNKNOWN = Arrangement(known=False)


class Arrangements:
    """Where the examples are in the calls of layers, found by comparison with single examples.

    A call is a usage, and the number of the call in this way. Batches of another structure may have
    their examples elsewhere.
    """

    def __init__(self) -> None:
        self._structure: Any = None
        self._single: dict[Any, list[Tensor]] = {}
        self._found: dict[Any, Arrangement] = {}
        self._positions: dict[Any, int] = {}  # of one example, in the axis that was found
        self._unverified: set[Any] = set()
        self._unknown: dict[Any, None] = {}  # in order
        self._refused: set[Any] = set()
        self._ignored = False
        self._disturbed: int | None = None
        self._uneven: set[int] = set()

    def begin_forward(self) -> None:
        """Begin with an evaluation of the model."""
        self._uneven = set()

    def on_function(self, name: str, args: Any, kwargs: Any, result: Any, n: int) -> None:
        """Note the rows that one of the functions of ``SELECTING`` selects of n examples.

        If examples have different numbers of them, they cannot be told apart afterwards, even if
        there are as many rows as if the numbers were the same.
        """
        if n > 1:
            self._uneven |= unevenly_selected(name, args, kwargs, result, n)

    def uneven(self, size: int) -> bool:
        """Return whether examples may have different numbers of rows in an axis of a size."""
        return size in self._uneven

    def begin(self, structure: Any) -> None:
        """Take what follows to be about batches of a structure."""
        self._structure = structure

    def learn(self, inputs: list[dict[Any, Tensor]]) -> None:
        """Take the inputs of calls for the first example alone; and those for the last one."""
        for call in inputs[0]:
            key = (self._structure, *call)
            if key not in self._found:
                self._single[key] = [alone[call] for alone in inputs if call in alone]

    def of(self, usage: Any, index: int, x: Tensor, n: int) -> Arrangement:
        """Return where n examples are in the input of a call, and in its output."""
        if x.is_nested:
            raise NotImplementedError(
                f"{usage.label} gets a nested tensor, and these are not supported: pad it."
            )
        if n == 1 or self._ignored:
            return BATCH_FIRST
        call = (self._structure, usage, index)
        where = self._found.get(call)
        if where is None:
            alone = self._single.pop(call, None)
            if alone is not None and alone[0].ndim == x.ndim:
                where = self._found[call] = find_arrangement(alone, x, n)
                if where.axis is not None and where.known:
                    self._positions[call] = alone[0].shape[where.axis]
            else:  # there is nothing to compare with
                leading = x.shape if usage.format.is_embedding else x.shape[:-1]
                where = BATCH_FIRST if n in accumulate(leading, mul) else UNKNOWN
            if where.axis is None:
                self._unverified.add((usage, index))
        if where.known and where.axis is not None:
            size, positions = x.shape[where.axis], self._positions.get(call)
            if self.uneven(size) or (positions is not None and size != n * positions):
                # not as many as before, or not as many of each: they depend on what is in them
                self._positions.pop(call, None)
                where = self._found[call] = UNKNOWN
        if not where.known:
            self._unknown[usage, index] = None
        return where

    def unknown(self) -> list[Any]:
        """Return the calls whose examples cannot be told apart, once."""
        calls, self._unknown = list(self._unknown), {}
        return calls

    def unverified(self) -> list[Any]:
        """Return the calls with inputs that are the same for all examples, once."""
        calls, self._unverified = sorted(self._unverified, key=str), set()
        return calls

    def refuse(self, calls: Iterable[Any]) -> None:
        """Note calls that are left alone; without them, all others may see something else."""
        self._refused.update(calls)
        self._single, self._found, self._positions, self._unknown = {}, {}, {}, {}
        self._unverified = set()

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

    @contextmanager
    def disturbed(self, example: int) -> Iterator[None]:
        """Change what an example gets of layers whose input is the same for all examples inside."""
        self._disturbed = example
        try:
            yield
        finally:
            self._disturbed = None

    def spread(self, output: Tensor, n: int) -> Tensor:
        """Return the output of such a layer, one for each example, in memory of its own."""
        outputs = spread(output, n).clone()
        if self._disturbed is not None:
            numbers = torch.arange(output.numel(), device=output.device)
            noise = numbers.float().square().cos().to(output.dtype)  # irregular
            with torch.no_grad():
                outputs[self._disturbed] += noise.reshape(outputs.shape[1:])
        return outputs


def spread(tensor: Tensor, n: int) -> Tensor:
    """Return a tensor that is the same for all examples with an axis for them: the first one."""
    if tensor.ndim > 1 and tensor.shape[0] == 1:
        return tensor.expand(n, *tensor.shape[1:])
    return tensor.unsqueeze(0).expand(n, *tensor.shape)


def find_arrangement(alone: list[Tensor], many: Tensor, n: int) -> Arrangement:
    """Return where examples are in a tensor.

    Args:
        alone: The tensor for the first example alone; and that for the last one.
        many: The tensor for n examples, with as many axes.
        n: Their number.
    """
    one = alone[0]
    sizes = zip(one.shape, many.shape, strict=True)
    changed = [k for k, (size, other) in enumerate(sizes) if size != other]
    if not changed:
        return Arrangement(None)
    axis = changed[0]
    positions = one.shape[axis]
    if positions == 1 and many.shape[axis] == n:
        return Arrangement(axis)
    if len(changed) > 1 or many.shape[axis] != n * positions:
        return UNKNOWN
    if len(alone) < 2 or alone[1].shape != one.shape:
        return UNKNOWN
    return _find_in(axis, alone, many, n)


def _find_in(axis: int, alone: list[Tensor], many: Tensor, n: int) -> Arrangement:
    """Return how examples and positions are arranged in an axis that has both."""
    largest = max(_largest(x) for x in alone)
    if not isfinite(largest):  # an error follows
        return Arrangement(axis)
    outer = many.unflatten(axis, (n, -1)).movedim(axis, 0)
    inner = many.unflatten(axis, (-1, n)).movedim(axis + 1, 0)
    limit = _SLACK * largest
    distances = [max(map(_distance, alone, (xs[0], xs[-1]))) for xs in (outer, inner)]
    if min(distances) > limit:  # the model may have brought examples into another order
        distances = [
            max(min(_distance(x, one) for x in xs) for one in alone) for xs in (outer, inner)
        ]
    nearest, other = sorted(distances)
    if not (nearest <= limit and _FARTHER * nearest < other):
        return UNKNOWN
    return Arrangement(axis, inner=nearest == distances[1])


def of_owners(values: Tensor, owners: Tensor | None) -> Tensor:
    """Return values ``[m]`` of items that are sorted by owner for items of these owners, in order.

    Args:
        values: The values, first all those of the first owner.
        owners: The owners' numbers ``[m]``; None if items are sorted.
    """
    return values if owners is None else values[owners.argsort(stable=True).argsort()]


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in double precision."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors' entries."""
    return _largest(_wide(a) - _wide(b))


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value of the entries."""
    return float(_wide(tensor).abs().max()) if tensor.numel() else 0.0


__all__ = [
    "BATCH_FIRST",
    "UNKNOWN",
    "Arrangement",
    "Arrangements",
    "find_arrangement",
    "of_owners",
    "spread",
]
