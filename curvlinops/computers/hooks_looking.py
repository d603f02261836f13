"""How a module uses its parameters, seen with hooks; and its layers' events for a batch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from curvlinops.computers.hooks import HooksCollector
from curvlinops.computers.look import Looking


class HooksLooking(Looking):
    """Looks at an ``nn.Module`` with hooks; arguments as of the base class."""

    _gathered: dict[str, Tensor] | None = None

    def _observe(self, X: Any, n: int, on_call: Any) -> tuple[Tensor, Iterable[Any], Any]:
        """Evaluate the model; see the base class."""
        collector = HooksCollector(self._arrangements, on_call)
        prediction = self._listen(collector, X, n, self._constants())
        return prediction.detach(), collector.calls, collector.other_uses

    def _listen(
        self, collector: HooksCollector, X: Any, n: int, params: dict[str, Tensor]
    ) -> Tensor:
        """Evaluate the model at parameters while a collector listens."""
        with (
            self.risk.watching(),
            collector.listening(self._seen_as(params), n),
            self._besides(collector, params, n),
        ):
            prediction = self.risk.predict(params, X)
        collector.other_uses |= self._scripted
        return prediction

    def _constants(self) -> dict[str, Tensor]:
        """Return the parameters, without gradients."""
        return {name: p.detach() for name, p in self.risk.params.items()}

    def _seen_as(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that layers see in place of parameters."""
        if not self.risk.sharded:
            return params
        if self._gathered is None:
            self._gathered = self.risk.unsharded()
        return self._gathered

    def _besides(
        self, collector: HooksCollector, params: dict[str, Tensor], n: int
    ) -> AbstractContextManager[Any]:
        """Return a context in which a collector may be told of more than it sees."""
        return nullcontext()


__all__ = ["HooksLooking"]
