"""Inputs and output gradients of a layer in weight-sharing format.

A layer multiplies the same weight at S positions of each of n examples: inputs are ``[n, S, d_in]``
and output gradients ``[n, S, d_out]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


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
            f"{layer} sees a tensor of shape {list(tensor.shape)} for {n} examples: its first axis "
            "must be a multiple of them, with the positions of each example next to each other "
            "(batch first). Check batch_size_fn."
        )
    return tensor.reshape(n, num_rows // n, tensor.shape[-1])


def flat_rows(tensor: Tensor) -> Tensor:
    """Return ``[..., d]`` as rows ``[r, d]``; what has to be copied is, line by line."""
    if tensor.ndim > 1 and tensor.stride(-1) != 1 == tensor.stride(-2):
        return tensor.movedim(-1, 0).flatten(1).T
    return tensor.flatten(0, -2)


def widened(tensor: Tensor) -> Tensor:
    """Return half precision in float32, lest sums overflow or lose small terms."""
    return tensor.float() if tensor.itemsize < 4 else tensor


class Positions:
    """The inputs of a layer at all positions of a batch.

    Args:
        num_positions: The number S of positions of each example.
        make_rows: Returns the inputs ``[n, S, d]``; channel groups one after the other in d.
        make_mean: Returns their mean over positions ``[n, d]``; default: from ``make_rows``.
        make_parts: Yields the inputs of all examples, as rows ``[r, d]`` of a few of them at once;
            default: from ``make_rows``.
        sources: The tensors from which all of these make them; None if this is not known.
        layer: What errors call the layer.

    Attributes:
        num_positions: S.
        sources: As above.
    """

    def __init__(
        self,
        num_positions: int,
        make_rows: Callable[[], Tensor],
        make_mean: Callable[[], Tensor] | None = None,
        make_parts: Callable[[], Iterable[Tensor]] | None = None,
        *,
        sources: Sequence[Tensor] | None = None,
        layer: str = "A layer",
    ):
        self.num_positions = num_positions
        self.sources = sources
        self._versions = _versions(sources)
        self._layer = layer
        self._make_rows = make_rows
        self._make_mean = make_mean
        self._make_parts = make_parts

    def expanded(self) -> Tensor:
        """Return the inputs ``[n, S, d]``; raise if they were changed in place."""
        self._check()
        return self._make_rows()

    def unchanged(self) -> bool:
        """Return whether the inputs are still those of the layer's call, as far as is known."""
        return _versions(self.sources) == self._versions

    def _check(self) -> None:
        """Raise if the inputs were changed in place since the layer was called."""
        if not self.unchanged():
            raise RuntimeError(
                f"{self._layer} was called with a tensor that was changed in place afterwards, but "
                "the gradients of its weight depend on that input. Let the model change a copy: "
                "x = x + y in place of x += y, or inplace=False."
            )

    def mean(self) -> Tensor:
        """Return the mean input of each example ``[n, d]``; raise if they were changed in place."""
        self._check()
        return self._make_rows().mean(1) if self._make_mean is None else self._make_mean()

    def add_to(self, moment: Moment, ones: float | None) -> None:
        """Add the second moment of all positions; ``ones`` as in :meth:`Moment.update`."""
        parts = [flat_rows(self.expanded())] if self._make_parts is None else self._make_parts()
        for rows in parts:
            moment.update(rows, ones)


def _versions(tensors: Sequence[Tensor] | None) -> list[int]:
    """Return how often tensors were changed; this is not counted in inference mode."""
    return [0 if t.is_inference() else t._version for t in tensors or ()]


class Tokens(Positions):
    """One-hot inputs, given by the places of their ones.

    Args:
        indices: The places ``[n, S]``, between 0 and V - 1.
        weights: 1, or 0 for a position whose input is zero, ``[n, S]``.
        size: V.
        layer: What errors call the layer.
    """

    def __init__(self, indices: Tensor, weights: Tensor, size: int, layer: str = "A layer"):
        sources = [indices, weights]
        super().__init__(
            indices.shape[1], self._one_hot, self._frequencies, sources=sources, layer=layer
        )
        self._indices = indices
        self.weights = weights
        self.size = size

    @property
    def indices(self) -> Tensor:
        """The places ``[n, S]``; an error if they were changed in place."""
        self._check()
        return self._indices

    def _one_hot(self) -> Tensor:
        """Return ``[n, S, V]``."""
        rows = self.weights.new_zeros(*self.indices.shape, self.size)
        return rows.scatter_(2, self.indices.unsqueeze(-1), self.weights.unsqueeze(-1))

    def _frequencies(self) -> Tensor:
        """Return the means of one-hot inputs ``[n, V]``."""
        weights = widened(self.weights)
        counts = weights.new_zeros(self.indices.shape[0], self.size)
        return counts.scatter_add_(1, self.indices, weights) / self.num_positions

    def add_to(self, moment: Moment, ones: float | None) -> None:
        """Add counts, the diagonal of the second moment."""
        if not moment.diagonal:
            return super().add_to(moment, ones)
        weights = widened(self.weights)
        counts = weights.new_zeros(self.size)
        counts.scatter_add_(0, self.indices.flatten(), weights.flatten())
        moment.add(counts, self.indices.numel())
        return None


class Moment:
    """A raw second moment ``Σ a aᵀ``, and how many terms it has.

    Sums of half precision are kept in float32: small terms would be lost in a large sum.

    Args:
        diagonal: Whether only the diagonal is kept.
        groups: Number of parts of the rows whose moments are kept, without those between them.
        dtype: The dtype of the sums, if not that of the rows (or float32).

    Attributes:
        total: The sum ``[d, d]``, or ``[groups, d, d]`` for more than one, or the diagonals
            ``[d]``, ``[groups, d]``; None before the first update. Of ``[d, d]`` what is below the
            diagonal may be missing, see :meth:`symmetric`.
        count: The number of terms, for the mean.
        summed: Whether all of it was summed here, rather than set by somebody.
    """

    def __init__(self, diagonal: bool = False, groups: int = 1, dtype: torch.dtype | None = None):
        self.diagonal = diagonal
        self.groups = groups
        self.dtype = dtype
        self.total: Tensor | None = None
        self.count = 0.0
        self.summed = True
        self._size = 0  # of the blocks on the diagonal, if entries below them are missing

    def update(self, rows: Tensor, ones: float | None = None) -> None:
        """Add rows ``[..., groups * d]``, with a constant column appended unless ones is None."""
        rows = widened(rows) if self.dtype is None else rows.to(self.dtype)
        if self.groups == 1 and not self.diagonal:
            if ones is None and _has_short_columns(rows):
                self._accumulate_columns(rows)
            else:
                self._accumulate(flat_rows(rows), ones)
            return
        rows = flat_rows(rows)
        if self.groups > 1:
            rows = rows.reshape(len(rows), self.groups, -1).transpose(0, 1)  # [groups, r, d]
        if not self.diagonal:
            self._accumulate_groups(rows, ones)
            return
        new, num_rows = (rows**2).sum(-2), rows.shape[-2]
        if ones is not None:
            corner = new.new_full((*new.shape[:-1], 1), num_rows * ones**2)
            new = torch.cat([new, corner], dim=-1)
        self._include(new, num_rows)

    def _accumulate(self, rows: Tensor, ones: float | None) -> None:
        """Add ``[r, d]`` where the sum is, as d² may be more than all else that is held."""
        num_rows, d = rows.shape
        self.count += num_rows
        beta = float(self.total is not None)
        if self.total is None:
            self.total = _empty_square(rows, d + (ones is not None))
            if ones is not None:
                self.total[:, d].zero_()
        self._size = self._size or _block_size(d, rows.device)
        for start in range(0, d, self._size):
            stop = min(start + self._size, d)
            block = self.total[start:stop, start:d]
            _add_product(block, rows[:, start:stop].T, rows[:, start:], beta)
        if ones is not None:
            self.total[:d, d].add_(rows.sum(0), alpha=ones)
            self.total[d, d].add_(num_rows * ones**2)

    def _accumulate_columns(self, rows: Tensor) -> None:
        """Add ``[..., S, d]`` that are stored by columns, without a copy by rows."""
        columns = rows.flatten(0, -3).mT  # [n, d, S]
        total = torch.bmm(columns, columns.mT).sum(0)
        self.count += rows.shape[:-1].numel()
        self.total = total if self.total is None else self.total.add_(total)

    def _accumulate_groups(self, rows: Tensor, ones: float | None) -> None:
        """Add ``[groups, r, d]`` where the sums are."""
        num_groups, num_rows, d = rows.shape
        self.count += num_rows
        if self.total is None:
            width = d + (ones is not None)
            self.total = rows.new_zeros(num_groups, width, width)
        self.total[:, :d, :d].baddbmm_(rows.mT, rows)
        if ones is not None:
            sums = rows.sum(1)
            self.total[:, :d, d].add_(sums, alpha=ones)
            self.total[:, d, :d].add_(sums, alpha=ones)
            self.total[:, d, d].add_(num_rows * ones**2)

    def symmetric(self) -> Tensor | None:
        """Return the sum with what is below its diagonal, in place."""
        if self.total is not None and self._size:
            _mirror(self.total, self._size)
        return self.total

    def taken(self, scale: Tensor | float) -> Tensor | None:
        """Return a multiple of the sum with what is below its diagonal, in the sum's memory.

        The moment is empty afterwards.
        """
        total, self.total = self.total, None
        if total is None or total.is_contiguous() or total.ndim > 2:
            total = None if total is None else total.mul_(scale)
        else:
            total = _packed(total, scale)
        if total is not None and self._size:
            _mirror(total, self._size)
        return total

    def merge(self, other: Moment) -> None:
        """Add another moment of the same rows, which must not be used any more."""
        if other.total is None:
            return
        self.summed &= other.summed
        if self.total is None:
            self._size = other._size
        elif not self._size:
            other.symmetric()
        self._include(other.total, other.count)

    def complete(self) -> None:
        """Take what is below the diagonal for right: somebody has set it."""
        self._size, self.summed = 0, False

    def state(self) -> dict[str, Any]:
        """Return a copy of all there is, as tensors and plain values."""
        total = self.symmetric()
        return {
            "diagonal": self.diagonal,
            "groups": self.groups,
            "count": self.count,
            "total": None if total is None else total.clone(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Moment:
        """Return what :meth:`state` was called of, on a device."""
        moment = cls(state["diagonal"], state["groups"])
        moment.summed = False
        if state["total"] is not None:
            moment.add(state["total"].to(device), state["count"])
        return moment

    def scale(self, factor: float) -> None:
        """Multiply sum and count, in place."""
        self.count *= factor
        if self.total is not None:
            self.total.mul_(factor)

    def add(self, total: Tensor, count: float) -> None:
        """Add a sum of so many terms."""
        self._include(total.clone() if self.total is None else total, count)

    def _include(self, total: Tensor, count: float) -> None:
        """Add a sum of so many terms; if it is the first, it becomes the total itself."""
        self.count += count
        total = total if self.dtype is None else total.to(self.dtype)
        self.total = total if self.total is None else self.total.add_(total)


def _has_short_columns(rows: Tensor) -> bool:
    """Whether rows ``[..., S, d]`` are stored by columns, and small products with them pay."""
    if rows.ndim < 3:
        return False
    S, d = rows.shape[-2:]
    return rows.stride(-1) != 1 == rows.stride(-2) and d <= S and d < 128


def _add_product(total: Tensor, left: Tensor, right: Tensor, beta: float) -> None:
    """Add ``left @ right`` to beta (0: whatever it is) times a part of a matrix."""
    if get_proxy_mode() is None:
        torch.addmm(total, left, right, beta=beta, out=total)
    else:  # torch.compile refuses that of a part in the trace
        total.copy_(torch.addmm(total, left, right, beta=beta))


def _block_size(d: int, device: torch.device) -> int:
    """Return the size of blocks, of which only those on and above the diagonal are computed.

    Four of them save three eighths of the products; small products, or odd sizes, save no time. On
    a CPU more of them save more, up to a half.
    """
    quarter = -(-d // 128) * 32
    return d if d < 128 else min(max(quarter, 64), 128) if device.type == "cpu" else quarter


def _empty_square(rows: Tensor, width: int) -> Tensor:
    """Return ``[width, width]`` without values; rows begin where a line of a cache does.

    Products that are added to rows with other distances take up to twice as long.
    """
    if get_proxy_mode() is not None or width < 128:
        return rows.new_zeros(width, width)
    line = 64 // rows.itemsize
    return rows.new_empty(width, -(-width // line) * line)[:, :width]


def _packed(matrix: Tensor, scale: Tensor | float) -> Tensor:
    """Multiply ``[d, d]``, and move its rows to where there is no room between them."""
    num_rows, width = matrix.shape
    whole = matrix.as_strided((num_rows, width), (width, 1))
    step = max(2**15 // max(width, 1), 32)  # rows that are copied at once, as both may overlap
    for start in range(0, num_rows, step):
        whole[start : start + step] = matrix[start : start + step] * scale
    return whole


def _mirror(matrix: Tensor, size: int) -> None:
    """Copy what is right of blocks on the diagonal of a size to below them."""
    for stop in range(size, len(matrix), size):
        matrix[stop:, stop - size : stop].copy_(matrix[stop - size : stop, stop:].T)
    d = len(matrix) - 1
    matrix[d, :d] = matrix[:d, d]
