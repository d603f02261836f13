"""KFAC's factors, gathered with hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops.computers._base import KFACComputer, Statistic
from curvlinops.computers.hooks import HooksCollector
from curvlinops.computers.usages import Usage
from curvlinops.risk import Batch


class HooksKFACComputer(KFACComputer):
    """Computes KFAC's factors layer by layer, with hooks on an ``nn.Module``.

    Inputs are turned into their second moment in the forward pass, output gradients in the backward
    pass, as soon as they exist; none is kept, and no gradient of a weight is computed.
    """

    def _check_model(self, model_func: Any) -> None:
        """Raise if the backend cannot run the model."""
        if not isinstance(model_func, nn.Module):
            raise ValueError(
                f"The backend 'hooks' needs an nn.Module, got {type(model_func).__name__}: pass "
                "the module, and the values of its parameters in params; or use "
                "backend='make_fx'."
            )

    def _observe(self, X: Any, n: int, on_call: Any) -> tuple[Tensor, Iterable[Usage], Any]:
        """Evaluate the model; see the base class."""
        collector = HooksCollector(self._arrangements, on_call)
        prediction = self._listen(collector, X, n)
        return prediction.detach(), collector.calls, {**collector.other_uses, **self._scripted()}

    def _scripted(self) -> dict[str, str]:
        """Return the parameters of scripted modules, whose functions cannot be seen."""
        assert self.risk.model is not None
        owners = {
            id(p): type(layer).__name__
            for layer in self.risk.model.modules()
            if isinstance(layer, torch.jit.ScriptModule)
            for p in layer.parameters()
        }
        tensors = dict(self.risk.model.named_parameters(remove_duplicate=False))
        return {
            name: f"used by {owners[id(tensors[name])]}"
            for name in self.risk.params
            if id(tensors[name]) in owners
        }

    def _listen(self, collector: HooksCollector, X: Any, n: int) -> Tensor:
        """Evaluate the model while a collector listens."""
        params = {name: p.detach() for name, p in self.risk.params.items()}
        with self.risk.watching(), collector.listening(params, n):
            return self.risk.predict(params, X)

    def _gather(self, statistic: Statistic, what: str, signs: str) -> Tensor | float:
        """Pass over the data; see the base class."""
        collector = HooksCollector(
            self._arrangements, on_input=statistic.on_input, on_gradient=statistic.on_gradient
        )
        counter = self.risk.term_counter()

        def visit(batch: Batch) -> Tensor | float:
            self._look(batch)
            prediction = self._listen(collector, batch.X, batch.n)
            self._note(collector.calls, {**collector.other_uses, **self._scripted()})
            self._verify_shared(batch)
            statistic.end_of_forward()
            F, targets = self.loss.terms(prediction, batch.y)
            for vector, last in _mark_last(self._vectors(batch, F, targets, counter, signs)):
                collector.backward(F, vector, last)
                statistic.end_of_backward()
            statistic.end_of_batch()
            with torch.no_grad():
                return self.loss.normalizer(F.detach(), targets, batch.n)

        return self.risk.for_each_batch(visit, what)


def _mark_last(items: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield (item, whether it is the last one)."""
    iterator = iter(items)
    try:
        current = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield current, False
        current = following
    yield current, True
