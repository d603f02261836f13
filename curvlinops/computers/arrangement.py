"""Where the examples of a batch are in the tensors inside of a model.

Layers see examples along the first axis, along another one (attention puts positions first), inside
of an axis (positions and examples flattened together), or not at all (an embedding of positions is
the same for all examples). A look at two small batches tells.
"""

from __future__ import annotations

from collections.abc import Mapping
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

#: Where the examples are in the calls of layers: by usage, and number of the call.
Arrangements = Mapping[Any, Arrangement]


def spread(tensor: Tensor, n: int) -> Tensor:
    """Return a tensor that is the same for all examples with an axis for them: the first one."""
    if tensor.ndim > 1 and tensor.shape[0] == 1:
        return tensor.expand(n, *tensor.shape[1:])
    return tensor.unsqueeze(0).expand(n, *tensor.shape)


def find_arrangement(one: Tensor, two: Tensor) -> Arrangement:
    """Return where examples are in a tensor.

    Args:
        one: The tensor for one example.
        two: The same for this example and another one.
    """
    if one.ndim != two.ndim:
        return BATCH_FIRST
    changed = [
        k for k, sizes in enumerate(zip(one.shape, two.shape, strict=True)) if len({*sizes}) > 1
    ]
    if not changed:
        return Arrangement(None)
    axis = changed[0]
    positions = one.shape[axis]
    if len(changed) > 1 or two.shape[axis] != 2 * positions:
        return BATCH_FIRST
    if positions == 1:
        return Arrangement(axis)
    outer = two.narrow(axis, 0, positions)
    inner = two.unflatten(axis, (positions, 2)).select(axis + 1, 0)
    if _distance(outer, one) <= _distance(inner, one):
        return Arrangement(axis)
    return Arrangement(axis, inner=True)


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the squared distance of two tensors."""
    return float((a.double() - b.double()).square().sum())


__all__ = ["BATCH_FIRST", "Arrangement", "Arrangements", "find_arrangement", "spread"]
