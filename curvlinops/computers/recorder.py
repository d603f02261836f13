"""The events of a short pass over the data, kept so that they need not be computed twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from curvlinops.computers.containers import flattened, mapped, signature
from curvlinops.computers.events import Statistic
from curvlinops.computers.listeners import Passing
from curvlinops.computers.positions import Positions
from curvlinops.computers.usages import Usage


@dataclass
class _Recording:
    """The events of a batch.

    Attributes:
        inputs: The arguments of ``on_input``.
        gradients: The arguments of ``on_gradient``; None where a back-propagation ends.
        num_vectors: How many vectors were back-propagated.
    """

    inputs: list[tuple[Usage, int, Positions]] = field(default_factory=list)
    gradients: deque[tuple[Usage, int, Tensor] | None] = field(default_factory=deque)
    num_vectors: int = 1


class Recorder(Passing):
    """Passes events on, and keeps them while their tensors fit into 64 MiB.

    If they do not, all of them are forgotten.

    Args:
        statistic: What they are passed on to.

    Attributes:
        scale: The scale c of the loss in the pass, once it is over.
    """

    _BYTES = 2**26

    def __init__(self, statistic: Statistic):
        super().__init__(statistic)
        self.scale: Tensor | float = 1.0
        self._batches: deque[_Recording] = deque()
        self._storages: set[int] = set()  # of what is kept
        self._room = self._BYTES
        self._gave_up = False

    @property
    def complete(self) -> bool:
        """Whether all events were kept, and are what they were."""
        positions = [each for batch in self._batches for _, _, each in batch.inputs]
        return not self._gave_up and all(each.unchanged() for each in positions)

    def give_up(self) -> None:
        """Keep nothing, of this pass."""
        self._gave_up = True
        self._batches.clear()

    # ---- recording -------------------------------------------------------------------------------
    def begin(self, X: Any) -> Any:
        """Begin with a batch; return its inputs in memory that nobody else will write to."""
        tensors = flattened(X)
        # a container without signature may hold tensors that cannot be found
        plain = signature(X) is not None and all(map(_is_plain, tensors))
        if not plain or sum(tensor.nbytes for tensor in tensors) > self._room:
            self.give_up()
        if self._gave_up:
            return X
        self._batches.append(_Recording())
        return mapped(X, _own)

    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """Keep and pass on."""
        if positions.sources is None:
            self.give_up()
        elif self._keep(positions.sources):
            self._batches[-1].inputs.append((usage, index, positions))
        super().on_input(usage, index, positions)

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Keep and pass on."""
        if self._keep([gradient]):
            self._batches[-1].gradients.append((usage, index, gradient))
        super().on_gradient(usage, index, gradient)

    def end_of_backward(self) -> None:
        """Keep and pass on."""
        if not self._gave_up:
            self._batches[-1].gradients.append(None)
        super().end_of_backward()

    def end(self, num_vectors: int) -> None:
        """End with a batch, of which so many vectors were back-propagated."""
        if not self._gave_up:
            self._batches[-1].num_vectors = num_vectors

    def _keep(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether there is room for tensors, which will be kept."""
        for tensor in () if self._gave_up else tensors:
            if not _is_plain(tensor):
                self.give_up()
                break
            storage = tensor.untyped_storage()._cdata
            if storage not in self._storages:
                self._storages.add(storage)
                self._room -= _size(tensor)
        if self._room < 0:
            self.give_up()
        return not self._gave_up

    # ---- replaying -------------------------------------------------------------------------------
    def replay(self, statistic: Statistic) -> Iterator[int]:
        """Hand all events to a statistic, and forget them.

        Yields:
            Before each batch: how many vectors were back-propagated for it.
        """
        while self._batches:
            batch = self._batches.popleft()
            yield batch.num_vectors
            for call in batch.inputs:
                statistic.on_input(*call)
            statistic.end_of_forward()
            while batch.gradients:
                event = batch.gradients.popleft()
                if event is None:
                    statistic.end_of_backward()
                else:
                    statistic.on_gradient(*event)
            statistic.end_of_batch()


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor's memory is what it seems to be."""
    return type(tensor) in (Tensor, Parameter) and tensor.layout is torch.strided


def _size(tensor: Tensor) -> int:
    """Return the size of all memory that a tensor keeps from being freed, in bytes."""
    return tensor.untyped_storage().nbytes()


def _own(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor that is no result of an operation."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


__all__ = ["Recorder"]
