"""Where the examples of a batch are in the tensors inside of a model.

Layers see examples along the first axis, along another one (attention puts positions first), inside
of an axis (positions and examples flattened together), or not at all (an embedding of positions is
the same for all examples). The inputs of a batch tell, compared with those of a few of its examples
alone. Where entries of tensors may decide which rows a layer gets, those of the same batch with its
examples in another order have to be the same, in that order. If examples are not found, all are
taken as one: sums over all positions are right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from math import isfinite
from operator import mul
from random import Random
from typing import Any

import torch
from torch import Tensor

from curvlinops.computers.selection import may_select
from curvlinops.computers.usages import Parameters

# How far entries of the same example may be off, relative to the largest: what rounding errors of
# bfloat16, of float32 and of float64 become in a model. And how many times farther others are.
_COARSE, _SINGLE, _DOUBLE = 2**-5, 1e-3, 1e-5
_FARTHER = 10


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

    def divides(self, tensor: Tensor, n: int) -> bool:
        """Return whether the axis can be divided among n examples."""
        assert self.axis is not None
        return tensor.ndim > self.axis and tensor.shape[self.axis] % n == 0

    def owners(self, tensor: Tensor, n: int) -> Tensor:
        """Return the number of the example that each entry of a tensor is of, in its shape."""
        assert self.axis is not None
        size = tensor.shape[self.axis]
        index = torch.arange(size, device=tensor.device)
        index = index % n if self.inner else index // (size // n)
        shape = [size if axis == self.axis else 1 for axis in range(tensor.ndim)]
        return index.reshape(shape).expand(tensor.shape)

    def examples_of(self, tensor: Tensor, n: int) -> Tensor:
        """Return the tensor with an axis for n examples, which is the first one."""
        assert self.axis is not None
        sizes = (-1, n) if self.inner else (n, -1)
        return tensor.unflatten(self.axis, sizes).movedim(self.axis + self.inner, 0)

    def examples_first(self, tensor: Tensor, n: int) -> Tensor:
        """Bring the n examples to the first axis; the same tensor for each where there are none."""
        if self.axis is None:
            return spread(tensor, n)
        if not self.known or (self.axis == 0 and not self.inner):
            return tensor
        if not self.divides(tensor, n):
            return tensor  # an error follows
        found = self.examples_of(tensor, n)
        # Positions stay a part of the first axis, if they were: layers may need the other axes.
        return found.flatten(0, 1) if self.axis == 0 else found


BATCH_FIRST = Arrangement()
UNKNOWN = Arrangement(known=False)


class Arrangements:
    """Where the examples are in the calls of layers, found by comparison with a few examples.

    A call is a usage, and the number of the call in this way. Batches of another structure may have
    their examples elsewhere.

    Attributes:
        entries_matter: Whether entries of tensors may decide which rows layers get.
        tolerance: How far the same entries may be off, relative to the largest.
    """

    def __init__(self) -> None:
        self.entries_matter = False
        self.tolerance = 0.0
        self._structure: Any = None
        self._plain = True
        self._constants = Parameters({})
        self._few: dict[Any, Tensor] = {}
        self._numbers: dict[Any, list[int]] = {}  # of the few examples, by structure
        self._found: dict[Any, Arrangement] = {}
        self._positions: dict[Any, int] = {}  # of one example, in the axis that was found
        self._reordered: dict[Any, Tensor | None] | None = None
        self._calls: list[Any] = []  # of this evaluation of the model
        self._spreading = False  # whether it has an axis for examples that the few had not
        self._missing: list[Any] = []  # calls that were not made for a few examples
        self._sought: set[Any] = set()  # of those, calls for which there was another look
        self._unverified: dict[Any, Tensor] = {}  # calls with inputs for all examples, and these
        self._unknown: dict[Any, None] = {}  # in order
        self._refused: set[Any] = set()
        self._not_shared: set[Any] = set()
        self._ignored = False
        self._disturbed: int | None = None

    def begin(self, structure: Any, plain: bool, may_differ: bool, constants: Parameters) -> None:
        """Take what follows to be about batches of a structure.

        Args:
            structure: The structure.
            plain: Whether it is certain which tensors of the input have examples.
            may_differ: Whether a layer may get something else of an example each time.
            constants: Parameters of the model that are constants.
        """
        self._structure, self._plain, self._constants = structure, plain, constants
        self._reordered = None
        if may_differ:
            self.tolerance = float("inf")

    def begin_forward(self) -> None:
        """Begin with an evaluation of the model."""
        self._calls, self._spreading = [], False

    def note_function(self, name: str, args: Any, kwargs: Any, n: int) -> None:
        """Note that the model calls a function on n examples; see :func:`may_select`."""
        if name == "embedding" and self._constants.involved(args, kwargs):
            return  # a table has no examples, and a row for each index
        if may_select(name, args, kwargs, n):
            self.entries_matter = True

    def learn(self, inputs: dict[Any, Tensor], numbers: list[int]) -> None:
        """Take the inputs of calls for a few examples alone, of these numbers in the batch."""
        self._numbers[self._structure] = numbers
        self.allow_rounding(inputs.values())
        for call, x in inputs.items():
            key = (self._structure, *call)
            if key not in self._found:
                self._few[key] = x

    def allow_rounding(self, tensors: Iterable[Tensor]) -> None:
        """Let the same entries be off by the rounding errors of tensors inside of the model."""
        self.tolerance = max([self.tolerance, *map(_rounding, tensors)])

    def expect(self, inputs: dict[Any, Tensor] | None) -> None:
        """Take the inputs of calls for the next batch in :func:`another_order`, if known."""
        self._reordered = None if inputs is None else dict(inputs)
        self.allow_rounding(() if inputs is None else inputs.values())

    def of(self, usage: Any, index: int, x: Tensor, n: int) -> Arrangement:
        """Return where n examples are in the input of a call, and in its output."""
        if x.is_nested:
            raise NotImplementedError(
                f"{usage.label} gets a nested tensor, and these are not supported: pad it."
            )
        if n == 1 or self._ignored:
            return BATCH_FIRST
        self._calls.append((usage, index))
        call = (self._structure, usage, index)
        where = self._found.get(call)
        if where is None:
            where = self._found[call] = self._find(call, x, n)
            if where.axis is None:
                self._unverified[usage, index] = x
        if where.known and where.axis is not None:
            where = self._found[call] = self._verified(call, x, n, where)
        if not where.known:
            self._unknown[usage, index] = None
        return where

    def _find(self, call: Any, x: Tensor, n: int) -> Arrangement:
        """Return where n examples are in the input of a call that is new."""
        _, usage, _ = call
        few, numbers = self._few.pop(call, None), self._numbers.get(self._structure)
        if few is None or numbers is None:
            if numbers is not None and call not in self._sought:
                self._missing.append(call)
                return UNKNOWN
            unverified = self.entries_matter and self._reordered is None
            if not self._plain or (numbers is not None and unverified):
                return UNKNOWN
            leading = x.shape if usage.format.is_embedding else x.shape[:-1]
            return BATCH_FIRST if n in accumulate(leading, mul) else UNKNOWN
        if self._spreading and _without_examples(few, x, n):
            return BATCH_FIRST
        if len(numbers) == 1 and x.shape == (n, *few.shape):  # which the model had squeezed
            few = few.unsqueeze(0)
        if few.ndim != x.ndim:
            return UNKNOWN
        where = find_arrangement(few, x, numbers, n, self.tolerance)
        if where.axis is None and (self._structure, call[1:]) in self._not_shared:
            return UNKNOWN
        if where.known and where.axis is not None:
            own, alone = where.examples_of(x, n), where.examples_of(few, len(numbers))
            if not near(alone, own[numbers], self.tolerance):
                if any(near(alone[0], one, self.tolerance) for one in own):
                    return UNKNOWN  # examples have changed places
                if not self.entries_matter:  # what they are depends on others: look again
                    self.entries_matter = True
                    self._missing.append(call)
                    return UNKNOWN
            self._positions[call] = x.shape[where.axis] // n
        return where

    def _verified(self, call: Any, x: Tensor, n: int, where: Arrangement) -> Arrangement:
        """Return where examples are, if they have as many rows as before, and each its own."""
        assert where.axis is not None
        positions = self._positions.get(call)
        if positions is not None and x.shape[where.axis] != n * positions:
            return UNKNOWN
        if self._reordered is None:
            return where
        if call[1:] not in self._reordered or x.shape[where.axis] % n:
            return UNKNOWN
        other = self._reordered[call[1:]]
        if other is None:  # compared before
            return where
        self._reordered[call[1:]] = None  # lest it is held while others are computed
        if self._spreading and _without_examples(other, x, n):
            return where
        return where if self.reordered(where, x, other, n) else UNKNOWN

    def reordered(self, where: Arrangement, x: Tensor, other: Tensor, n: int) -> bool:
        """Return whether a tensor has the same examples as another one in another order."""
        if other.shape != x.shape or not where.divides(x, n):
            return False
        own = where.examples_of(x, n)[another_order(n)]
        return near(own, where.examples_of(other, n), self.tolerance)

    def seek(self) -> bool:
        """Return whether to look at a few examples again, for calls that others did not make."""
        missing, self._missing = self._missing, []
        self._sought.update(missing)
        for call in missing:
            self._found.pop(call, None)
            self._unknown.pop(call[1:], None)
        return bool(missing)

    def unknown(self) -> list[Any]:
        """Return the calls whose examples cannot be told apart, once."""
        calls, self._unknown = list(self._unknown), {}
        return calls

    @property
    def calls(self) -> list[Any]:
        """The calls of the last evaluation."""
        return list(self._calls)

    def unverified(self) -> dict[Any, Tensor]:
        """Return the calls with inputs that are the same for all examples, and these, once."""
        calls, self._unverified = self._unverified, {}
        return calls

    def not_shared(self, calls: Iterable[Any]) -> None:
        """Note calls whose inputs are not for all examples, in batches of this structure."""
        self._not_shared.update((self._structure, call) for call in calls)
        self.forget()

    def refuse(self, calls: Iterable[Any]) -> None:
        """Note calls that are left alone; without them, all others may see something else."""
        self._refused.update(calls)
        self.forget()

    def forget(self) -> None:
        """Forget what was found of calls, but for those that are left alone."""
        self._few, self._found, self._positions, self._unknown = {}, {}, {}, {}
        self._numbers, self._calls, self._missing = {}, [], []
        self._unverified, self._reordered = {}, None

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
        self._spreading = True
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


@cache
def another_order(n: int) -> list[int]:
    """Return an irregular order of n numbers, at least 2, in which none follows the one before it.

    What is not divided between examples where they end, or is in some order of its own, is another
    thing then.
    """
    numbers, random = list(range(n)), Random(20 * n)
    while any(after == before + 1 for before, after in pairwise(numbers)):
        random.shuffle(numbers)
    return numbers


def find_arrangement(
    few: Tensor,
    many: Tensor,
    numbers: list[int],
    n: int,
    tolerance: float,
    any_order: bool = False,
) -> Arrangement:
    """Return where examples are in a tensor.

    Args:
        few: The tensor for a few examples, fewer than n.
        many: The tensor for n examples, with as many axes.
        numbers: The numbers of the few among them.
        n: Their number.
        tolerance: How far the same entries may be off, relative to the largest.
        any_order: Whether the model may have brought them into another order.
    """
    k = len(numbers)
    sizes = zip(few.shape, many.shape, strict=True)
    changed = [axis for axis, (size, other) in enumerate(sizes) if size != other]
    if not changed:  # or those of the few were all, by chance
        return Arrangement(None) if few.numel() and near(few, many, tolerance) else UNKNOWN
    axis = changed[0]
    if (few.shape[axis], many.shape[axis]) == (k, n):
        return Arrangement(axis)
    if len(changed) > 1 or many.shape[axis] % n or few.shape[axis] * n != many.shape[axis] * k:
        return UNKNOWN
    return _find_in(axis, few, many, numbers, n, min(tolerance, _COARSE), any_order)


def _find_in(
    axis: int,
    few: Tensor,
    many: Tensor,
    numbers: list[int],
    n: int,
    tolerance: float,
    any_order: bool,
) -> Arrangement:
    """Return how examples and positions are arranged in an axis that has both."""
    largest = _largest(few)
    if not isfinite(largest):  # an error follows
        return Arrangement(axis)
    readings = [Arrangement(axis), Arrangement(axis, inner=True)]
    pairs = [(r.examples_of(few, len(numbers)), r.examples_of(many, n)) for r in readings]
    distances = [_distance(few, many[numbers]) for few, many in pairs]
    limit = _limit(few, tolerance)
    if any_order and min(distances) > limit:
        distances = [max(min(_distance(x, one) for x in xs) for one in ones) for ones, xs in pairs]
    nearest, other = sorted(distances)
    if not (nearest <= limit and _FARTHER * nearest < other):
        return UNKNOWN
    return Arrangement(axis, inner=nearest == distances[1])


def near(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether entries are the same up to rounding errors, if they are finite."""
    if actual.shape != expected.shape:
        return False
    return not _distance(actual, expected) > _limit(expected, tolerance)


def _limit(tensor: Tensor, tolerance: float) -> float:
    """Return how far the entries of a tensor may be off: integers are exact."""
    exact = not (tensor.is_floating_point() or tensor.is_complex()) and isfinite(tolerance)
    return 0.0 if exact else tolerance * _largest(tensor)


def _rounding(tensor: Tensor) -> float:
    """Return by how much a model's rounding errors may change a tensor, relative to all of it."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    size = tensor.itemsize // (2 if tensor.is_complex() else 1)
    kind = tensor.device.type
    if size == 8:
        return _DOUBLE
    # other devices may compute products of float32 with fewer digits
    exact = kind == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return _SINGLE if size == 4 and exact and not torch.is_autocast_enabled(kind) else _COARSE


def _without_examples(few: Tensor, x: Tensor, n: int) -> bool:
    """Return whether a tensor is another one with an axis for n examples."""
    return x.ndim > 0 and len(x) == n and few.shape in (x.shape[1:], (1, *x.shape[1:]))


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
    "another_order",
    "find_arrangement",
    "near",
    "of_owners",
    "spread",
]
