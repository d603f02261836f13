r"""The diagonal of the GGN from the inputs and output gradients of layers.

For the weight of a layer, example n and loss vector v have the gradient
:math:`\sum_s g_{vns} a_{ns}^\top`, so that the diagonal is
:math:`\sum_{vn} (\sum_s g_{vns} a_{ns}^\top)^{\odot 2}`. For a single position, that is
:math:`\sum_n (\sum_v g_{vn}^{\odot 2}) (a_n^{\odot 2})^\top`: no gradient of an example is formed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from curvlinops.computers.diagonal_by_examples import coarsest
from curvlinops.computers.diagonal_vectors import LossVectors
from curvlinops.computers.eigenvalues import Basis, EigenvalueStatistic
from curvlinops.computers.events import Statistic
from curvlinops.computers.group_statistic import joined
from curvlinops.computers.hooks import HooksCollector
from curvlinops.computers.hooks_looking import HooksLooking
from curvlinops.computers.independence import Independence
from curvlinops.computers.listeners import Precise
from curvlinops.computers.per_example import (
    DependentError,
    Watch,
    check_same,
    first_examples,
    structure,
)
from curvlinops.computers.plan import GroupPlan
from curvlinops.computers.positions import Positions
from curvlinops.computers.shared_operands import SharedOperands
from curvlinops.computers.usages import Usage
from curvlinops.computers.vectors import check_terms
from curvlinops.kfac_utils import Layout
from curvlinops.risk import Batch, EmpiricalRisk


class LayerSquares(NamedTuple):
    """What a batch adds.

    Attributes:
        total: Sums of squares by name, for the parameters of supported layers.
        F: Predictions ``[m, C]`` of the loss terms.
        targets: Their targets.
    """

    total: dict[str, Tensor]
    F: Tensor
    targets: Any


class LayersDiagonal(HooksLooking):
    """Sums squares of gradients for the parameters of supported layers of an ``nn.Module``.

    What this relies on is verified. For the first batch of each structure, the squares of one
    example, with a second one beside it, must be those of its gradient; a parameter for which they
    are not is none of a supported layer. In each batch, one more back-propagation tells whether
    examples depend on each other, see :class:`~curvlinops.computers.independence.Independence`.

    Args:
        risk: The empirical risk.
        names: The parameters; the others are constants.
        vectors: Makes the loss vectors.
    """

    def __init__(self, risk: EmpiricalRisk, names: Iterable[str], vectors: LossVectors) -> None:
        super().__init__(separate_weight_and_bias=True, unsupported="diagonal")
        self.risk = risk
        self.collective = risk.collective
        self._names = frozenset(names)
        self._vectors = vectors
        self._tolerances: dict[Any, float] = {}  # for each structure of batches
        self._given_up: set[Any] = set()

    def squares(self, batch: Batch, first_term: int) -> LayerSquares | None:
        """Sum the squares for all loss vectors of a batch; None if that cannot be done here.

        Args:
            batch: The batch.
            first_term: Index of its first loss term in the whole data.
        """
        key = structure(batch.X), batch.n > 1
        if key in self._given_up:
            return None
        try:
            if key not in self._tolerances:
                self._tolerances[key] = self._verify(batch)
            if not any(plan.all_usages for plan in self._supported):
                return None
            return self._squares(batch, first_term, self._tolerances[key])
        except Exception:  # whatever hooks do to a model
            self._given_up.add(key)
            return None

    # ---- one batch -------------------------------------------------------------------------------
    def _squares(self, batch: Batch, first_term: int, tolerance: float) -> LayerSquares:
        """Sum the squares of a batch."""
        events, prediction = self._evaluate(batch, batch.X, batch.n, self._constants())
        F, targets = self._vectors.loss.terms(prediction, batch.y)
        per_example = check_terms(len(F), batch.n, None)
        statistic = self._statistic(per_example * self._vectors.number(F))
        check = Independence(batch.n, tolerance) if batch.n > 1 else None
        supported = {usage for plan in self._supported for usage in plan.all_usages}
        listener = events.begin(_Listener(statistic, check, supported))
        for vectors in self._vectors.make(F.detach(), targets, first_term):
            for vector in _one_term_each(vectors, per_example):
                if check is not None:
                    check.add(vector)
                events.collector.backward(F, vector, last=False)
                listener.end_of_backward()
        if check is not None:
            events.collector.backward(F, check.last_vector().to(F.dtype), last=True)
            check.verify()
        listener.end_of_batch()
        return LayerSquares(self._totals(statistic), F.detach(), targets)

    def _evaluate(
        self, batch: Batch, X: Any, n: int, params: dict[str, Tensor]
    ) -> tuple[_Events, Tensor]:
        """Evaluate the model on n examples of a batch; note how it uses its parameters."""
        events = _Events(self)
        prediction = self._listen(events.collector, X, n, params)
        self._note(events.collector.calls, events.collector.other_uses)
        if self._refuse_layers(batch):
            self._look(batch)
            return self._evaluate(batch, X, n, params)  # which leaves those layers alone
        return events, prediction

    def _besides(
        self, collector: HooksCollector, params: dict[str, Tensor], n: int
    ) -> AbstractContextManager[Any]:
        """Let parameters that are added to or multiply the examples count as those of layers."""
        return SharedOperands(collector, params, self._names - self._diagonal, n)

    # ---- verification ----------------------------------------------------------------------------
    def _verify(self, batch: Batch) -> float:
        """Verify the squares of an example; return the tolerance for batches of this structure."""
        with warnings.catch_warnings():  # what there is to say is said about the whole batch
            warnings.simplefilter("ignore")
            n = min(batch.n, 2)
            few = first_examples(batch.X, batch.n, n)
            try:
                self._look_again(Batch(few, batch.y, n))
                return self._compare(batch, few, n)
            except Exception:  # whatever a model does with few examples
                self._look_again(batch)
                return self._compare(batch, batch.X, batch.n)

    def _look_again(self, batch: Batch) -> None:
        """Find out anew where examples are in batches of a structure."""
        self._seen.clear()
        self._look(batch)

    @property
    def _wants_examples(self) -> bool:
        """Return False: each batch is verified in other ways."""
        return False

    @property
    def _may_differ(self) -> bool:
        """Return True: examples may depend on one another where no gradient does."""
        return True

    def _compare(self, batch: Batch, X: Any, n: int) -> float:
        """Compare the squares of the last of n examples with those of its gradient."""
        leaves = {name: p.detach().requires_grad_() for name, p in self.risk.params.items()}
        watch = Watch()
        with watch:
            events, prediction = self._evaluate(batch, X, n, leaves)
        tolerance = coarsest(watch, prediction, *leaves.values()) ** 0.5
        statistic = self._statistic(1)
        gradients: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if prediction.requires_grad:
            numbers = torch.arange(prediction.numel(), device=prediction.device)
            u = numbers.float().square().cos().to(prediction.dtype)  # irregular
            u = u.reshape(n, -1).clone()
            u[:-1] = 0
            u = u.reshape(prediction.shape)
            gradients = torch.autograd.grad(
                prediction, list(leaves.values()), u, retain_graph=True, allow_unused=True
            )
            listener = events.begin(_Listener(statistic, None, set()))
            events.collector.backward(prediction, u, last=True)
            listener.end_of_backward()
            listener.end_of_batch()
        expected = {
            name: g.to_dense().to(_wide(g)).square()
            for name, g in zip(leaves, gradients, strict=True)
            if g is not None
        }
        # There is nothing but rounding errors where a parameter does not matter.
        absolute = tolerance**1.5 * sum(float(t.norm()) for t in expected.values())
        for name, total in self._totals(statistic).items():
            reference = expected[name] if name in expected else torch.zeros_like(total)
            limit = tolerance * float(reference.norm()) + absolute
            if float((total - reference).norm()) <= limit < float("inf"):
                continue
            try:  # with values that are not finite
                check_same("square of a gradient", total, reference, tolerance, absolute)
            except DependentError:
                self._note([], {name: "its gradient is not that of its layers"})
        return tolerance

    # ---- sums ------------------------------------------------------------------------------------
    @property
    def _supported(self) -> list[GroupPlan]:
        """Those of the parameters that are in supported layers, or not used at all."""
        return [p for p in self.plans if not p.diagonal and self._names.issuperset(p.key)]

    def _statistic(self, num_vectors: int) -> EigenvalueStatistic:
        """Return a new statistic of squares in the basis of the parameters."""
        shapes = {name: p.shape for name, p in self.risk.params.items()}
        identity: dict[tuple[str, ...], list[Basis]] = {
            plan.key: [(None, None)] * len(plan.sizes) for plan in self._supported
        }
        return EigenvalueStatistic(self.plans, identity, shapes, lambda: num_vectors)

    def _totals(self, statistic: EigenvalueStatistic) -> dict[str, Tensor]:
        """Return the sums of squares in the shapes of the parameters."""
        found = {}
        for plan, blocks in statistic.totals():
            (name,) = plan.key
            p = self.risk.params[name].detach()
            parts = [
                p.new_zeros(sizes, dtype=_wide(p)) if block is None else block.to(_wide(p))
                for block, sizes in zip(blocks, plan.sizes, strict=True)
            ]
            found[name] = _stored(joined(parts, 0), plan.layout, p.shape)
        return found


class _Events:
    """The events of a model's evaluation; inputs are held until it is known who listens.

    Attributes:
        collector: Listens to the model.
        listener: Listens to the collector; None for nobody.
    """

    def __init__(self, looking: HooksLooking) -> None:
        self.listener: Statistic | None = None
        self._inputs: list[tuple[Usage, int, Positions]] = []
        self._device_type = looking.risk.device.type
        self.collector = HooksCollector(
            looking._arrangements,
            on_input=lambda *event: self._inputs.append(event),
            on_gradient=self._on_gradient,
        )

    def _on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Pass on."""
        if self.listener is not None:
            self.listener.on_gradient(usage, index, gradient)

    def begin(self, listener: Statistic) -> Statistic:
        """Hand the inputs to a listener, and what follows; return the one to call on."""
        if torch.is_autocast_enabled(self._device_type):
            listener = Precise(listener, None, self._device_type)
        self.listener = listener
        for event in self._inputs:
            listener.on_input(*event)
        self._inputs.clear()
        listener.end_of_forward()
        return listener


class _Listener(Statistic):
    """Hands events to a statistic; and some to a check, for which the last vector is."""

    def __init__(
        self, statistic: EigenvalueStatistic, check: Independence | None, checked: Set[Usage]
    ) -> None:
        self._statistic = statistic
        self._check = check
        self._checked = checked

    def on_input(self, usage: Usage, index: int, positions: Positions) -> None:
        """Pass on."""
        self._statistic.on_input(usage, index, positions)

    def end_of_forward(self) -> None:
        """Pass on."""
        self._statistic.end_of_forward()

    def on_gradient(self, usage: Usage, index: int, gradient: Tensor) -> None:
        """Pass on."""
        if self._check is None or not self._check.at_last:
            self._statistic.on_gradient(usage, index, gradient)
        if self._check is not None and usage in self._checked:
            self._check.on_gradient(usage, index, gradient)

    def end_of_backward(self) -> None:
        """Pass on."""
        self._statistic.end_of_backward()

    def end_of_batch(self) -> None:
        """Pass on."""
        self._statistic.end_of_batch()


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which squares are added up: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _stored(rows: Tensor, layout: Layout | None, shape: Sequence[int]) -> Tensor:
    """Bring the entries of a parameter's canonical form ``[d_out, d_in]`` to its shape."""
    if layout is None:
        return rows.reshape(shape)
    view, order = layout["view"], layout["order"]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return rows.reshape([view[axis] for axis in order]).permute(inverse).reshape(shape)


def _one_term_each(vectors: Tensor, per_example: int) -> Iterator[Tensor]:
    """Split loss vectors ``[V, m, C]`` into those ``[m, C]`` with one term of each example."""
    if per_example == 1:
        yield from vectors
        return
    for terms in vectors.unflatten(1, (-1, per_example)):  # [n, R, C]
        for index in range(per_example):
            one = torch.zeros_like(terms)
            one[:, index] = terms[:, index]
            yield one.flatten(0, 1)


__all__ = ["LayerSquares", "LayersDiagonal"]
