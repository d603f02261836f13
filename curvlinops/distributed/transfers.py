"""Tensors that go from one rank to others, and sums that only one of them needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curvlinops.distributed.collective import Collective, split

#: Bytes that are communicated at once: enough for the bandwidth, and little beside what is held.
BUCKET = 2**25


def broadcast(collective: Collective, tensor: Tensor, source: int) -> Tensor:
    """Give every rank the tensor of one of them, in place.

    Args:
        collective: The ranks.
        tensor: What is sent, and elsewhere a tensor of this shape and dtype.
        source: The rank that sends.
    """
    if collective.alone:
        return tensor
    wide = tensor.contiguous() if tensor.itemsize >= 4 else tensor.float()
    with torch.no_grad():
        dist.broadcast(wide, src=collective.name(source), group=collective.process_group)
        return tensor if wide is tensor else tensor.copy_(wide)


def reduce(collective: Collective, tensor: Tensor, owner: int | None) -> Tensor:
    """Add a tensor over the ranks, in place.

    Args:
        collective: The ranks.
        tensor: The summand, contiguous; of the same shape and dtype on all ranks.
        owner: The only rank that gets the sum, or None if all do.
    """
    if collective.alone:
        return tensor
    if owner is None:
        return collective.all_reduce(tensor)
    with torch.no_grad():
        dist.reduce(tensor, dst=collective.name(owner), group=collective.process_group)
    return tensor


def share(collective: Collective, items: dict[int, Any], owners: list[int]) -> dict[int, Any]:
    """Give every rank all items.

    Args:
        collective: The ranks.
        items: Those of this rank, by their numbers: tensors and plain values, nested in lists,
            tuples and dicts.
        owners: The rank that has each.

    Returns:
        All items. Those of this rank are made of contiguous tensors, too, as those of others are:
        products with them have the same bits on all ranks.
    """
    if collective.alone:
        return items
    own: dict[int, list[Tensor]] = {i: [] for i in items}
    described = collective.gather({i: describe(item, own[i]) for i, item in items.items()})
    result: dict[int, Any] = {}
    for rank, descriptions in enumerate(described):
        numbers = [i for i in descriptions if owners[i] == rank]
        tensors: dict[int, list[Tensor]] = {}
        for i in numbers:
            layout = list(_layout(descriptions[i]))
            if rank == collective.rank:
                tensors[i] = [t.contiguous() for t in own[i]]
            else:
                device = collective.device
                tensors[i] = [torch.empty(s, dtype=d, device=device) for s, d in layout]
        for bucket in _buckets([t for i in numbers for t in tensors[i]]):
            buffer = torch.cat([t.detach().reshape(-1) for t in bucket])
            buffer = broadcast(collective, buffer, rank)
            if rank != collective.rank:
                for t, part in zip(bucket, split(buffer, [t.shape for t in bucket]), strict=True):
                    t.copy_(part)
        for i in numbers:
            result[i] = restore(descriptions[i], iter(tensors[i]))
    return result


# ---- descriptions: what is sent as an object, while tensors are sent as such ---------------------
def describe(item: Any, tensors: list[Tensor]) -> Any:
    """Return plain values for nested lists, tuples and dicts; append the tensors in them."""
    if isinstance(item, Tensor):
        tensors.append(item)
        return ("tensor", tuple(item.shape), item.dtype)
    if type(item) in (list, tuple):
        return (type(item).__name__, [describe(value, tensors) for value in item])
    if type(item) is dict:
        keys, values = list(item), [describe(value, tensors) for value in item.values()]
        return ("dict", values, keys)
    return ("value", item)


def restore(description: Any, tensors: Iterator[Tensor]) -> Any:
    """Return what was described."""
    kind, inner, *keys = description
    if kind == "tensor":
        return next(tensors)
    if kind == "value":
        return inner
    values = [restore(value, tensors) for value in inner]
    if kind == "dict":
        return dict(zip(keys[0], values, strict=True))
    return values if kind == "list" else tuple(values)


def _layout(description: Any) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """Iterate over the shapes and dtypes of the tensors in a description."""
    kind, inner, *rest = description
    if kind == "tensor":
        yield inner, rest[0]
    elif kind != "value":
        for value in inner:
            yield from _layout(value)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors of one dtype, so that each group has about as many bytes as a bucket."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        by_dtype.setdefault(t.dtype, []).append(t)
    for same in by_dtype.values():
        bucket: list[Tensor] = []
        for t in same:
            if bucket and sum(other.nbytes for other in bucket) + t.nbytes > BUCKET:
                yield bucket
                bucket = []
            bucket.append(t)
        yield bucket


# ---- sums of symmetric matrices ------------------------------------------------------------------
class BucketedSums:
    """Tensors that are added over the ranks in buckets; of symmetric matrices, only one half.

    All ranks add tensors of the same shapes and dtypes in the same order.

    Args:
        collective: The ranks.
    """

    def __init__(self, collective: Collective):
        self._collective = collective
        self._waiting: dict[tuple[int | None, torch.dtype], list[Tensor]] = {}
        self._halves: list[Tensor] = []

    def add(self, tensor: Tensor, owner: int | None, symmetric: bool = False) -> None:
        """Add a tensor, which has become the sum after :meth:`finish` (where it is wanted).

        Args:
            tensor: A tensor, ``[..., d, d]`` if it is symmetric; then only what is on and above the
                diagonal is read and sent, and what is below is set.
            owner: The only rank that wants the sum, or None for all.
            symmetric: Whether it is a symmetric matrix, or a stack of some.
        """
        waiting = self._waiting.setdefault((owner, tensor.dtype), [])
        waiting += _strips(tensor) if symmetric else [tensor]
        if symmetric:
            self._halves.append(tensor)
        if sum(part.nbytes for part in waiting) >= BUCKET:
            self._send(owner, tensor.dtype)

    def finish(self) -> None:
        """Send what was not sent yet, and complete the symmetric matrices."""
        for owner, dtype in self._waiting:
            self._send(owner, dtype)
        for tensor in self._halves:
            _mirror(tensor)
        self._halves = []

    def _send(self, owner: int | None, dtype: torch.dtype) -> None:
        """Add what waits for an owner."""
        parts = self._waiting[owner, dtype]
        if not parts:
            return
        buffer = torch.cat([part.reshape(-1) for part in parts])
        buffer = reduce(self._collective, buffer, owner)
        if owner in (None, self._collective.rank):
            for part, total in zip(parts, split(buffer, [p.shape for p in parts]), strict=True):
                part.copy_(total)
        self._waiting[owner, dtype] = []


def _height(d: int) -> int:
    """Return the height of strips: few of them, of which little is below the diagonal."""
    return -(-d // 32)


def _strips(matrix: Tensor) -> list[Tensor]:
    """Return views of what is on and above the diagonal of ``[..., d, d]``, and a little more."""
    d = matrix.shape[-1]
    height = _height(d)
    return [matrix[..., s : s + height, s:] for s in range(0, d, height)]


def _mirror(matrix: Tensor) -> None:
    """Set what is below the diagonal of ``[..., d, d]`` to what is above, in place."""
    d = matrix.shape[-1]
    height = _height(d)
    for s in range(0, d, height):
        stop = min(s + height, d)
        matrix[..., stop:, s:stop] = matrix[..., s:stop, stop:].mT
        square = matrix[..., s:stop, s:stop]
        square.copy_(square.triu() + square.triu(1).mT)


__all__ = ["BucketedSums", "broadcast", "reduce", "share"]
