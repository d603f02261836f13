"""Statistics around another one: in full precision, for some groups only, or to measure memory."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from curvlinops.computers.events import Statistic
from curvlinops.computers.positions import Positions
from curvlinops.computers.usages import Usage


class Precise(Statistic):
    """Lets a statistic compute without autocast, from gradients of a wider dtype.

    Args:
        statistic: The statistic.
        dtype: The gradients' dtype, None for their own.
        device_type: Where autocast is disabled.
    """

    def __init__(self, statistic: Statistic, dtype: torch.dtype | None, device_type: str):
        self._statistic = statistic
        self._dtype = dtype
        self._device_type = device_type

    def _plain(self) -> torch.autocast:
        return torch.autocast(self._device_type, enabled=False)

    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """Pass on."""
        with self._plain():
            self._statistic.on_input(usage, index, positions)

    def end_of_forward(self) -> None:
        """Pass on."""
        with self._plain():
            self._statistic.end_of_forward()

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Pass on, in the dtype."""
        with self._plain():
            gradient = gradient if self._dtype is None else gradient.to(self._dtype)
            self._statistic.on_gradient(usage, index, gradient)

    def end_of_backward(self) -> None:
        """Pass on."""
        with self._plain():
            self._statistic.end_of_backward()

    def end_of_batch(self) -> None:
        """Pass on."""
        with self._plain():
            self._statistic.end_of_batch()


class Selected(Statistic):
    """Lets a statistic hear of some usages only.

    Args:
        statistic: The statistic.
        usages: Those.
    """

    def __init__(self, statistic: Statistic, usages: Set[Usage]):
        self._statistic = statistic
        self._usages = usages

    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """Pass on what is selected."""
        if usage in self._usages:
            self._statistic.on_input(usage, index, positions)

    def end_of_forward(self) -> None:
        """Pass on."""
        self._statistic.end_of_forward()

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Pass on what is selected."""
        if usage in self._usages:
            self._statistic.on_gradient(usage, index, gradient)

    def end_of_backward(self) -> None:
        """Pass on."""
        self._statistic.end_of_backward()

    def end_of_batch(self) -> None:
        """Pass on."""
        self._statistic.end_of_batch()


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

    def end_of_forward(self) -> None:
        """Do nothing."""

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Do nothing."""

    def end_of_backward(self) -> None:
        """Do nothing."""

    def end_of_batch(self) -> None:
        """Do nothing."""


__all__ = ["Measure", "Precise", "Selected"]
