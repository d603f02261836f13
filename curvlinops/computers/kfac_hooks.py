"""KFAC's factors, gathered with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvlinops.computers._base import Increment, KFACComputer, Statistic
from curvlinops.computers.events import Sums
from curvlinops.computers.hooks import HooksCollector
from curvlinops.computers.hooks_looking import HooksLooking
from curvlinops.computers.listeners import Selected
from curvlinops.computers.training_step import TrainingStep
from curvlinops.computers.usages import Usage
from curvlinops.computers.vectors import check_terms
from curvlinops.risk import Batch

S = TypeVar("S", bound=Sums)


class HooksKFACComputer(HooksLooking, KFACComputer):
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

    def _run(self, statistic: Statistic, batch: Batch) -> tuple[Tensor, HooksCollector]:
        """Evaluate the model on a batch; see the base class."""
        collector = HooksCollector(
            self._arrangements,
            on_input=statistic.on_input,
            on_gradient=statistic.on_gradient,
            unviews=not self.risk.sharded,  # FSDP has hooks on outputs
        )
        return self._listen(collector, batch.X, batch.n, self._constants()), collector

    @contextmanager
    def step(
        self, make: Callable[[], S], X: Any, y: Any, loss_scale: float
    ) -> Iterator[list[tuple[S, Increment]]]:
        """Give the events of the user's own passes to a new statistic, which happen inside.

        Args:
            make: Makes the statistic, once it is known how the model uses its parameters.
            X: The inputs.
            y: The targets.
            loss_scale: By what the user multiplies the loss.

        Returns:
            A list that in the end has the statistic, and what else the batch adds.
        """
        module = self.risk.inner_module
        assert module is not None
        found: list[tuple[S, Increment]] = []
        batches: list[Batch] = []

        def look(batch: Batch) -> None:
            self._look_anew(batch)
            batches.append(batch)

        self.risk.visit((X, y), look)
        batch, normalizers = batches[0], []

        def on_prediction(output: Any, collector: HooksCollector) -> None:
            known = set(self.diagonal)
            new = [usage for usage in collector.calls if usage not in self._usages]
            self._note(collector.calls, {**collector.other_uses, **self._scripted})
            self._refuse_unseen(new)
            self._refuse_unknown()
            if set(self.diagonal) != known:
                raise RuntimeError(
                    f"The parameters {sorted(set(self.diagonal) - known)} are used in other ways "
                    "than by a single example: use update(X, y)."
                )
            F, targets = self.loss.terms(output.detach(), batch.y)
            if check_terms(len(F), batch.n, self._num_per_example_loss_terms) > 1:
                raise ValueError(
                    "Examples have several loss terms, and a single backward pass mixes them: use "
                    "update(X, y), which keeps them apart."
                )
            with torch.no_grad():
                normalizers.append(self.loss.normalizer(F, targets, batch.n))

        self._num_vectors = 1
        statistic = make()
        params = self._seen_as(self.risk.params)
        step = TrainingStep(
            module, params, self._arrangements, batch.n, on_prediction, not self.risk.sharded
        )
        try:
            with step.listening(self._precise(Selected(statistic, set(self._usages)))):
                yield found
        except BaseException:
            self._seen.clear()  # not all calls were seen
            self._arrangements.forget()
            raise
        (normalizer,) = normalizers
        factor = normalizer if self.risk.reduction == "mean" else 1.0
        statistic.scale(1.0, float(factor / loss_scale) ** 2)
        found.append((statistic, Increment(batch.n, 0, normalizer)))

    def _refuse_unseen(self, new: list[Usage]) -> None:
        """Raise if calls would have to be looked at, and the pass repeated."""
        shared = [usage for usage, _ in self._arrangements.unverified()]
        if self._arrangements.seek() or new or shared:
            layer = (*new, *shared)[0].label if new or shared else "A layer"
            raise RuntimeError(
                f"{layer} is called in a way that was not seen for the examples that were looked "
                "at, and a training step cannot be repeated: use update(X, y) for this batch."
            )
