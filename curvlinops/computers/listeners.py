"""Statistics around another one: for precision, some groups, bundles of vectors; and memory."""

from __future__ import annotations

from collections.abc import Callable, Set
from math import ceil

import torch
from torch import Tensor

from curvlinops.computers.events import Statistic
from curvlinops.computers.positions import Positions
from curvlinops.computers.usages import Usage


class Passing(Statistic):
    """Passes all events on to another statistic; a subclass changes some.

    Args:
        statistic: The other one.
    """

    def __init__(self, statistic: Statistic):
        self._statistic = statistic

    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """Pass on."""
        self._statistic.on_input(usage, index, positions)

    def end_of_forward(self) -> None:
        """Pass on."""
        self._statistic.end_of_forward()

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Pass on."""
        self._statistic.on_gradient(usage, index, gradient)

    def end_of_backward(self) -> None:
        """Pass on."""
        self._statistic.end_of_backward()

    def end_of_batch(self) -> None:
        """Pass on."""
        self._statistic.end_of_batch()


class Precise(Passing):
    """Lets a statistic compute without autocast, from gradients of a wider dtype.

    Args:
        statistic: The statistic.
        dtype: The gradients' dtype, None for their own.
        device_type: Where autocast is disabled.
    """

    def __init__(self, statistic: Statistic, dtype: torch.dtype | None, device_type: str):
        super().__init__(statistic)
        self._dtype = dtype
        self._device_type = device_type

    def _plain(self) -> torch.autocast:
        return torch.autocast(self._device_type, enabled=False)

    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """Pass on."""
        with self._plain():
            super().on_input(usage, index, positions)

    def end_of_forward(self) -> None:
        """Pass on."""
        with self._plain():
            super().end_of_forward()

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Pass on, in the dtype."""
        with self._plain():
            gradient = gradient if self._dtype is None else gradient.to(self._dtype)
            super().on_gradient(usage, index, gradient)

    def end_of_backward(self) -> None:
        """Pass on."""
        with self._plain():
            super().end_of_backward()

    def end_of_batch(self) -> None:
        """Pass on."""
        with self._plain():
            super().end_of_batch()


class Selected(Passing):
    """Lets a statistic hear of some usages only.

    Args:
        statistic: The statistic.
        usages: Those.
    """

    def __init__(self, statistic: Statistic, usages: Set[Usage]):
        super().__init__(statistic)
        self._usages = usages

    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """Pass on what is selected."""
        if usage in self._usages:
            super().on_input(usage, index, positions)

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Pass on what is selected."""
        if usage in self._usages:
            super().on_gradient(usage, index, gradient)


class Bundled(Passing):
    """Hands small gradients of several loss vectors of a batch to a statistic at once.

    Sums of products of a few rows with themselves cost about as much as those of many rows, and
    rotations are faster for many. At most 2²⁰ numbers are held; gradients that have more, or many
    positions, are passed on at once.

    Args:
        statistic: The statistic.
        num_vectors: Returns how many vectors are back-propagated for the batch.
    """

    _ENTRIES, _ROWS = 2**20, 2**10  # of all layers, and of one layer

    def __init__(self, statistic: Statistic, num_vectors: Callable[[], int]):
        super().__init__(statistic)
        self._total = num_vectors
        self._held: dict[tuple[Usage, int], list[Tensor]] = {}
        self._num_vectors = 0  # that are held completely
        self._entries = self._rows = 0  # of one vector
        self._measuring = True  # whether this is the first vector
        self._waiting = True  # whether gradients are held

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Hold, or pass on what is large."""
        if not self._waiting:
            super().on_gradient(usage, index, gradient)
            return
        held = self._held.setdefault((usage, index), [])
        # a layer that some of the vectors do not reach has no gradients of them
        _fill_up(held, self._num_vectors, gradient)
        held.append(gradient)
        if self._measuring:
            self._entries += gradient.numel()
            self._rows = max(self._rows, gradient.numel() // max(gradient.shape[-1], 1))
            if not self._fit(2):
                self._waiting = False
                self._pass_on()

    def end_of_backward(self) -> None:
        """Pass on, unless there is room for another vector."""
        if not self._waiting:
            super().end_of_backward()
            return
        self._measuring = False
        self._num_vectors += 1
        if not self._fit(self._num_vectors + 1):
            self._flush()

    def end_of_batch(self) -> None:
        """Pass on what is held."""
        if self._num_vectors:
            self._flush()
        super().end_of_batch()

    def _fit(self, num_vectors: int) -> bool:
        """Return whether so many vectors may be held: bundles are few, and about as large."""
        most = min(
            self._ENTRIES // max(self._entries, 1), self._ROWS // max(self._rows, 1), self._total()
        )
        return most > 0 and num_vectors <= ceil(self._total() / ceil(self._total() / most))

    def _flush(self) -> None:
        """Pass on all that is held, as the gradients of one back-propagation."""
        for held in self._held.values():
            _fill_up(held, self._num_vectors, held[0])
        self._num_vectors = 0
        self._pass_on()
        super().end_of_backward()

    def _pass_on(self) -> None:
        """Pass on gradients."""
        held, self._held = self._held, {}
        for (usage, index), gradients in held.items():
            together = torch.cat(gradients) if len(gradients) > 1 else gradients[0]
            super().on_gradient(usage, index, together)


def _fill_up(gradients: list[Tensor], number: int, like: Tensor) -> None:
    """Append zeros, until there is a gradient of each vector."""
    if len(gradients) < number:
        gradients += [torch.zeros_like(like)] * (number - len(gradients))


class Measure(Statistic):
    """Notes how many positions the layers have at most.

    Attributes:
        num_positions: For each usage: the number of positions of an example, in one call.
    """

    def __init__(self) -> None:
        self.num_positions: dict[Usage, int] = {}

    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """Note the number of positions."""
        before = self.num_positions.get(usage, 0)
        self.num_positions[usage] = max(before, positions.num_positions)


__all__ = ["Bundled", "Measure", "Passing", "Precise", "Selected"]
