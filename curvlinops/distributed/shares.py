"""The sums over the data of all ranks, and what must be known of them, in one all-reduce.

Backends do not compare what ranks add: a buffer of another size ends a process, hangs, or gives
wrong numbers. So the first all-reduce of a call has a size that ranks agree on beforehand: it has
room for a header, which says how many numbers each rank adds, and for as many numbers as the call
before had (or the operator has parameters, or a few, see ``_ROOM``). What does not fit follows in a
second all-reduce, once all ranks know that they add the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Size, Tensor

from curvlinops.distributed.collective import Collective, flattened, split, summed_as
from curvlinops.distributed.exact import (
    INTEGER_DIGITS,
    float_digits,
    float_of,
    integer_digits,
    integer_of,
)

#: Numbers for which there always is room in the first all-reduce.
_ROOM = 1024
#: Entries of a header are a multiple of it, so that what follows is aligned.
_ALIGNED = 64
#: Integers below it are exact in float32.
_EXACT = 2**24


@dataclass
class Share:
    """What one rank has found in a pass over its data, or all ranks together.

    Attributes:
        tensors: Sums. Empty on a rank that has no data or failed: it adds zeros.
        num_examples: Number of examples.
        normalizer: Denominator of the loss's mean.
        error: Why the rank failed.
    """

    tensors: list[Tensor] = field(default_factory=list)
    num_examples: int = 0
    normalizer: float = 0.0
    error: Exception | None = None


def add_shares(
    collective: Collective,
    share: Share,
    shapes: Sequence[Size],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> Share:
    """Add what all ranks have found, by one all-reduce of one buffer, or sometimes two.

    The buffer has the widest of the dtypes, and float32 at least. It begins with a header: for each
    rank, whether it failed and how many numbers it adds; and the digits of the two other numbers.

    Args:
        collective: Communication with the other ranks.
        share: What this rank has found.
        shapes: The shapes of the sums. ``dtypes`` must be equal on all ranks.
        dtypes: Their dtypes.
        device: Where they are.

    Returns:
        The sums; tensors are parts of one buffer.

    Raises:
        Exception: If this rank failed: its own error.
        RuntimeError: If only other ranks failed, or ranks have sums of different size; on all of
            them. More can be added afterwards.
    """
    dtype = torch.float32
    for other in dtypes:
        dtype = torch.promote_types(dtype, summed_as(other))
    size = sum(shape.numel() for shape in shapes)
    slots = [0.0] * (3 * collective.size)
    own = slice(3 * collective.rank, 3 * collective.rank + 3)
    slots[own] = [float(share.error is not None), size % _EXACT, size // _EXACT]
    numbers = [*slots, *integer_digits(share.num_examples), *float_digits(share.normalizer)]
    length = -(-len(numbers) // _ALIGNED) * _ALIGNED
    room = max(collective.room, _ROOM)
    first = length + room
    buffer = torch.zeros(max(first, length + size), dtype=dtype, device=device)
    buffer[: len(numbers)] = torch.tensor(numbers, dtype=dtype, device=device)
    if share.error is None and share.tensors:
        torch.cat(flattened(share.tensors, dtype, device), out=buffer[length : length + size])
    share.tensors.clear()  # large, and not needed any more
    buffer = _added(collective, buffer, 0, first)
    numbers = buffer[: len(numbers)].tolist()  # on a GPU, this waits for the sum
    slots, digits = numbers[: len(slots)], numbers[len(slots) :]
    collective.raise_failures([r for r, flag in enumerate(slots[::3]) if flag], share.error)
    pairs = zip(slots[1::3], slots[2::3], strict=True)
    collective.check_same("What ranks add", [int(low) + _EXACT * int(high) for low, high in pairs])
    if length + size > first:
        buffer = _added(collective, buffer, first, len(buffer))
    collective.room = size
    return Share(
        split(buffer[length : length + size], list(shapes)),
        integer_of(digits[:INTEGER_DIGITS]),
        float_of(digits[INTEGER_DIGITS:]),
    )


def _added(collective: Collective, buffer: Tensor, start: int, stop: int) -> Tensor:
    """Return a buffer of which a part was added over the ranks; in place, if they do so."""
    part = buffer[start:stop]
    total = collective.all_reduce(part)
    return buffer if total is part else torch.cat([buffer[:start], total, buffer[stop:]])


__all__ = ["Share", "add_shares"]
