"""The events of a user's own forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from curvlinops.computers.arrangement import Arrangements
from curvlinops.computers.events import Statistic
from curvlinops.computers.hooks import HooksCollector
from curvlinops.computers.usages import Usage


class TrainingStep:
    """Listens while a user evaluates a module once, and back-propagates a loss once.

    Args:
        module: The module.
        params: Parameters of it, by name.
        arrangements: Where the examples are in the calls of layers.
        n: The number of examples.
        on_prediction: Called with the module's output and the collector, before the backward pass.
        unviews: As for :class:`~curvlinops.computers.hooks.HooksCollector`.
    """

    def __init__(
        self,
        module: nn.Module,
        params: dict[str, Tensor],
        arrangements: Arrangements,
        n: int,
        on_prediction: Callable[[Any, HooksCollector], None],
        unviews: bool = True,
    ):
        self._unviews = unviews
        self._module = module
        self._params = params
        self._arrangements = arrangements
        self._n = n
        self._on_prediction = on_prediction
        self._passes = 0
        self._gradients: set[tuple[Usage, int]] = set()

    @contextmanager
    def listening(self, statistic: Statistic) -> Iterator[None]:
        """Give a statistic the events of the two passes, which happen inside.

        Raises:
            RuntimeError: If there are none, or others than these.
        """

        def on_gradient(usage: Usage, index: int, gradient: Tensor) -> None:
            if (usage, index) in self._gradients:
                raise RuntimeError("There was more than one backward pass: do each step apart.")
            self._gradients.add((usage, index))
            statistic.on_gradient(usage, index, gradient)

        collector = HooksCollector(
            self._arrangements,
            on_input=statistic.on_input,
            on_gradient=on_gradient,
            unviews=self._unviews,
        )
        listening = ExitStack()

        def enter(module: nn.Module, *_: Any) -> None:
            self._passes += 1
            if self._passes > 1:
                raise RuntimeError("The model was evaluated more than once: do each step apart.")
            listening.enter_context(collector.listening(self._params, self._n))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            listening.close()
            if output is not None:  # there was no error
                self._on_prediction(output, collector)
                statistic.end_of_forward()

        handles = [
            self._module.register_forward_pre_hook(enter),
            self._module.register_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            listening.close()  # PyTorch calls no hook after a KeyboardInterrupt
            for handle in handles:
                handle.remove()
        if not collector.calls:
            raise RuntimeError(
                "The model was not evaluated, or its layers cannot be seen: evaluate the module "
                "itself (not a compiled one), once, inside of the context."
            )
        if not self._gradients:
            raise RuntimeError("There was no backward pass: call loss.backward() in the context.")
        statistic.end_of_backward()
        statistic.end_of_batch()


__all__ = ["TrainingStep"]
