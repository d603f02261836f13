"""What processes that share a data set say to one another, through one small interface."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Collective:
    """What processes that each hold a part of the data need from one another.

    This class is the single process: each method is the identity, and nothing is sent. A
    distributed collective, such as :class:`~curvlinops.distributed.ProcessGroupCollective`,
    implements :meth:`all_reduce`, :meth:`exchange` and :meth:`gather`, which the others are made
    of. All ranks make the same calls in the same order.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        alone: Whether there is no communication.
        device: Where the tensors are that are communicated.
        process_group: The process group; None for the single process.
        room: For how many numbers :func:`~curvlinops.distributed.add_shares` has room in its first
            all-reduce, the same on all ranks; it notes how many its last call had.

    Example:
        >>> collective = Collective()
        >>> collective.prefix(7), collective.any(False)
        (0, False)
    """

    rank: int = 0
    size: int = 1
    alone: bool = True
    device: torch.device = torch.device("cpu")
    process_group: Any = None
    room: int = 0

    # ---- what a distributed collective implements ------------------------------------------------
    def all_reduce(self, buffer: Tensor) -> Tensor:
        """Add one tensor elementwise over the ranks, in place, by one all-reduce.

        Args:
            buffer: The summand of this rank: of the same shape and dtype on all ranks.

        Returns:
            The sum.
        """
        return buffer

    def exchange(self, values: list[int]) -> list[list[int]]:
        """Give every rank the integers of all ranks.

        Args:
            values: The integers of this rank (64 bits, with sign): as many on all ranks.

        Returns:
            The integers of each rank.
        """
        return [values]

    def gather(self, value: Any) -> list[Any]:
        """Give every rank the objects of all ranks; slow, and for small objects.

        Args:
            value: The object of this rank, which can be pickled.

        Returns:
            The object of each rank.
        """
        return [value]

    def name(self, rank: int) -> int:
        """Return the number by which users know a rank (of all processes, not of a group)."""
        return rank

    # ---- what follows ----------------------------------------------------------------------------
    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Add tensors elementwise over the ranks; every rank gets the sums.

        Shapes are compared first. Where they are known in advance, :meth:`all_reduce` is faster.

        Args:
            tensors: The summands of this rank. A rank that has no data does not know their shapes:
                it passes an empty list where the others pass tensors, and gets the others' sums.

        Returns:
            The sums, in the same order. On several ranks, half precision is widened to float32;
            integers and booleans are summed exactly, in int64.

        Raises:
            RuntimeError: If shapes or dtypes differ between ranks; on all of them.
        """
        if self.alone:
            return tensors
        own = [(tuple(t.shape), t.dtype) for t in tensors]
        known = [(r, described) for r, described in enumerate(self.gather(own)) if described]
        if not known:
            return []
        (first, layout), *others = known
        for r, described in others:
            if described != layout:
                raise RuntimeError(
                    f"The tensors to sum differ between ranks: {layout} on rank "
                    f"{self.name(first)}, but {described} on rank {self.name(r)}. They must be "
                    "the same."
                )
        sums: list[Tensor] = [torch.empty(0)] * len(layout)
        for dtype in sorted({summed_as(dtype) for _, dtype in layout}, key=str):
            places = [i for i, (_, own) in enumerate(layout) if summed_as(own) is dtype]
            shapes = [torch.Size(layout[i][0]) for i in places]
            if tensors:
                parts = flattened([tensors[i] for i in places], dtype, self.device)
            else:
                length = sum(shape.numel() for shape in shapes)
                parts = [torch.zeros(length, dtype=dtype, device=self.device)]
            total = self.all_reduce(torch.cat(parts))
            for i, part in zip(places, split(total, shapes), strict=True):
                sums[i] = part.to(tensors[i].device) if tensors else part
        return sums

    def prefix(self, value: int) -> int:
        """Add the values of all ranks before this one (the exclusive prefix sum).

        Args:
            value: The value of this rank.

        Returns:
            The sum; 0 on the first rank.
        """
        return sum(other for (other,) in self.exchange([value])[: self.rank])

    def any(self, flag: bool) -> bool:
        """Tell every rank whether a flag is set on at least one of them.

        Args:
            flag: The flag of this rank.

        Returns:
            Whether any rank's flag is set.
        """
        return any(other for (other,) in self.exchange([int(flag)]))

    @contextmanager
    def together(self, size: int = 0) -> Iterator[None]:
        """Make an exception on one rank one on all ranks, at the end of a ``with`` block.

        Inside, there is no communication. Only an ``Exception`` is told: after a
        ``KeyboardInterrupt``, or the death of a process, the others wait until the process group
        finds out, at the latest after its timeout.

        Args:
            size: How many numbers are sent next, which is compared, too.

        Raises:
            RuntimeError: If the block raised on other ranks only, naming them; or if sizes differ,
                on all ranks.
        """
        if self.alone:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        everybody = self.exchange([int(error is not None), size])
        self.raise_failures([r for r, (flag, _) in enumerate(everybody) if flag], error)
        self.check_same("What ranks send", [other for _, other in everybody])

    def raise_failures(self, failed: Iterable[int], error: Exception | None) -> None:
        """Raise if there are ranks that failed.

        Args:
            failed: The ranks.
            error: What was raised on this rank, which is raised again.

        Raises:
            RuntimeError: If others failed only.
        """
        if error is not None:
            raise error
        numbers = ", ".join(str(self.name(r)) for r in failed)
        if numbers:
            raise RuntimeError(f"Rank(s) {numbers} failed: the cause is the error raised there.")

    def check_same(self, what: str, sizes: list[int]) -> None:
        """Raise if ranks have different sizes.

        Args:
            what: What has a size, for the message.
            sizes: The sizes on all ranks, which every rank knows.

        Raises:
            RuntimeError: If they differ, naming the ranks.
        """
        if len(set(sizes)) == 1:
            return
        ranks_with: dict[int, list[str]] = {}
        for r, size in enumerate(sizes):
            ranks_with.setdefault(size, []).append(str(self.name(r)))
        listing = "; ".join(
            f"{size:,} numbers on rank(s) {', '.join(ranks)}" for size, ranks in ranks_with.items()
        )
        raise RuntimeError(
            f"{what} differs in size: {listing}. All ranks of a process group must make the same "
            "calls in the same order: multiply matrices with the same number of columns everywhere."
        )


def summed_as(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that tensors of a dtype are summed in: float32 at least, or int64."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.promote_types(dtype, torch.float32)
    return torch.int64


def flattened(tensors: list[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return tensors as vectors of one dtype on one device."""
    return [t.detach().reshape(-1).to(device, dtype) for t in tensors]


def split(buffer: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """Cut a vector into tensors, which share its memory."""
    parts = buffer.split([shape.numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


__all__ = ["Collective", "flattened", "split", "summed_as"]
