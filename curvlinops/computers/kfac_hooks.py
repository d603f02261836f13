"""KFAC's factors, gathered with hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from curvlinops.computers._base import Key, KFACComputer
from curvlinops.computers.hooks import HooksCollector
from curvlinops.computers.plan import GroupPlan, plan_groups
from curvlinops.computers.statistics import CovarianceStatistic
from curvlinops.kfac_utils import FisherType, ParamGroup
from curvlinops.risk import Batch


class HooksKFACComputer(KFACComputer):
    """Computes KFAC's factors layer by layer, with hooks on an ``nn.Module``.

    Inputs are turned into their second moment in the forward pass, output gradients in the backward
    pass, as soon as they exist; none is kept, and no gradient of a weight is computed.
    """

    def _make_plans(self, model_func: Any, params: dict[str, Tensor]) -> list[GroupPlan]:
        """Find the layers of the parameters."""
        if not isinstance(model_func, nn.Module):
            raise ValueError(
                f"The backend 'hooks' needs an nn.Module, got {type(model_func).__name__}: pass "
                "the module, and the values of its parameters in params."
            )
        plans, self._layers = plan_groups(model_func, params, self.separate_weight_and_bias)
        return plans

    def compute(self) -> tuple[dict[Key, Any], dict[Key, Any], list[ParamGroup]]:
        """Compute the factors in one pass over the data; see the base class."""
        statistic = CovarianceStatistic(self._plans, self.kfac_approx, self.max_factor_size)
        collector = HooksCollector(self._layers, statistic.on_input, statistic.on_gradient)
        counter = self.risk.term_counter()

        def visit(batch: Batch) -> Tensor | float:
            params = {name: p.detach() for name, p in self.risk.params.items()}
            with self.risk.watching(), collector.listening(params, batch.n):
                prediction = self.risk.predict(params, batch.X)
            statistic.end_of_forward()
            F, targets = self.loss.terms(prediction, batch.y)
            vectors = self._vectors(batch, F, targets, counter)
            for vector, last in _mark_last(vectors):
                collector.backward(F, vector, last)
                statistic.end_of_backward()
            with torch.no_grad():
                return self.loss.normalizer(F.detach(), targets, batch.n)

        scale = self.risk.for_each_batch(visit, "KFAC factors")
        like = next(iter(self.risk.params.values())).detach()
        inputs, gradients = statistic.finish(scale, like)
        if self.fisher_type is FisherType.FORWARD_ONLY:
            gradients = statistic.identities(like)
        return inputs, gradients, self.mapping


def _mark_last(items: Any) -> Any:
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
