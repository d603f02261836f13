"""Inputs and output gradients of a layer in weight-sharing format.

A layer multiplies the same weight at S positions of each of n examples: inputs are ``[n, S, d_in]``
and output gradients ``[n, S, d_out]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul

import torch
from torch import Tensor


def split_examples(tensor: Tensor, n: int, layer: str) -> Tensor:
    """Bring ``[..., d]`` to ``[n, S, d]``; the first axes run over examples, slowest.

    Raises:
        ValueError: If the positions are no multiple of the examples.
    """
    *leading, _ = tensor.shape
    num_rows = prod(leading)
    # the examples are the first axis, a part of it, or (each position its own example) more axes
    batch_first = leading[:1] and leading[0] % n == 0
    if not batch_first and n not in accumulate(leading, mul, initial=1):
        raise ValueError(
            f"Layer {layer!r} sees a tensor of shape {list(tensor.shape)} for {n} examples: its "
            "first axis must be a multiple of them, with the positions of each example next to "
            "each other (batch first). Check batch_size_fn."
        )
    return tensor.reshape(n, num_rows // n, tensor.shape[-1])


def gram(rows: Tensor) -> Tensor:
    """Return ``Σ a aᵀ`` over rows ``[r, d]``."""
    return rows.T @ rows


def widened(tensor: Tensor) -> Tensor:
    """Return half precision in float32, lest sums overflow or lose small terms."""
    return tensor.float() if tensor.itemsize < 4 else tensor


class Positions:
    """The inputs of a layer at all positions of a batch.

    Args:
        num_positions: The number S of positions of each example.
        make_rows: Returns the inputs ``[n, S, d]``.
        make_mean: Returns their mean over positions ``[n, d]``; default: from ``make_rows``.
    """

    def __init__(
        self,
        num_positions: int,
        make_rows: Callable[[], Tensor],
        make_mean: Callable[[], Tensor] | None = None,
    ):
        self.num_positions = num_positions
        self._make_rows = make_rows
        self._make_mean = make_mean

    def expanded(self) -> Tensor:
        """Return the inputs ``[n, S, d]``."""
        return self._make_rows()

    def mean(self) -> Tensor:
        """Return the mean input of each example ``[n, d]``."""
        return self._make_rows().mean(1) if self._make_mean is None else self._make_mean()


@dataclass
class Moment:
    """A raw second moment ``Σ a aᵀ``, and how many terms it has.

    Sums of half precision are kept in float32: small terms would be lost in a large sum.

    Attributes:
        total: The sum ``[d, d]``, or its diagonal ``[d]``; None before the first update.
        count: The number of terms, for the mean.
        diagonal: Whether only the diagonal is kept.
    """

    diagonal: bool
    total: Tensor | None = None
    count: float = 0

    def update(self, rows: Tensor, ones: float | None = None) -> None:
        """Add rows ``[r, d]``, with a constant column appended unless ``ones`` is None."""
        self.count += rows.shape[0]
        rows = widened(rows)
        if self.diagonal:
            new = (rows**2).sum(0)
        else:
            new = gram(rows)
        if ones is not None:
            new = self._append(new, rows, ones)
        self.total = new if self.total is None else self.total.add_(new)

    def _append(self, moment: Tensor, rows: Tensor, ones: float) -> Tensor:
        """Extend a moment by the constant column: a column sum, rather than a copy of the rows."""
        corner = moment.new_tensor([rows.shape[0] * ones**2])
        if self.diagonal:
            return torch.cat([moment, corner])
        column = ones * rows.sum(0)  # [d]
        top = torch.cat([moment, column.unsqueeze(-1)], dim=1)
        return torch.cat([top, torch.cat([column, corner]).unsqueeze(0)])
