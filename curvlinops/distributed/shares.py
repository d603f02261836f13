"""The sums over the data of all ranks, and what must be known of them, in one all-reduce."""

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
    """Add what all ranks have found, by one all-reduce of one buffer.

    The buffer has the widest of the dtypes, and float32 at least. It ends with one flag for each
    rank that failed, and the digits of the numbers.

    Args:
        collective: Communication with the other ranks.
        share: What this rank has found.
        shapes: The shapes of the sums. They must be equal on all ranks, and so must be ``dtypes``.
        dtypes: Their dtypes.
        device: Where they are.

    Returns:
        The sums; tensors are parts of one buffer.

    Raises:
        Exception: If this rank failed: its own error.
        RuntimeError: If only other ranks failed.
    """
    dtype = torch.float32
    for other in dtypes:
        dtype = torch.promote_types(dtype, summed_as(other))
    failed = [
        float(share.error is not None and r == collective.rank) for r in range(collective.size)
    ]
    numbers = [*failed, *integer_digits(share.num_examples), *float_digits(share.normalizer)]
    header = torch.tensor(numbers, dtype=dtype, device=device)
    num_entries = sum(shape.numel() for shape in shapes)
    if share.error is None and share.tensors:
        parts = flattened(share.tensors, dtype, device)
    else:
        parts = [torch.zeros(num_entries, dtype=dtype, device=device)]
    buffer = torch.cat([*parts, header])
    del parts
    share.tensors.clear()  # large, and not needed any more
    sums, header = collective.all_reduce(buffer).split([num_entries, len(numbers)])
    numbers = header.tolist()  # on a GPU, this waits for the sum
    flags, numbers = numbers[: collective.size], numbers[collective.size :]
    collective.raise_failures([r for r, flag in enumerate(flags) if flag], share.error)
    return Share(
        split(sums, list(shapes)),
        integer_of(numbers[:INTEGER_DIGITS]),
        float_of(numbers[INTEGER_DIGITS:]),
    )


__all__ = ["Share", "add_shares"]
