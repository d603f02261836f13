"""Statistics of layer inputs and output gradients, gathered from a collector's events.

A statistic keeps raw sums and counts, so that batches, and later ranks, only add.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from curvlinops.computers.plan import GroupPlan
from curvlinops.computers.positions import Moment, Positions, widened
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.kfac_utils import KFACType

Key = tuple[str, ...]


class CovarianceStatistic:
    """Second moments of inputs and output gradients: the Kronecker factors of KFAC.

    expand: all positions of all usages count. reduce: inputs are averaged and gradients summed over
    an example's positions and usages first, so they are held until a batch's pass is over.

    Args:
        plans: The groups.
        kfac_approx: expand or reduce.
        max_factor_size: Wider factors keep their diagonal only.
    """

    def __init__(self, plans: Iterable[GroupPlan], kfac_approx: KFACType, max_factor_size: int):
        self._plans = list(plans)
        self._reduce = kfac_approx is KFACType.REDUCE
        self._inputs = {
            plan.key: Moment(plan.d_in > max_factor_size) for plan in self._plans if plan.d_in
        }
        # groups of the same layers, such as a layer's weight and bias, have the same gradients
        self._gradients = {
            plan.layers: Moment(plan.d_out > max_factor_size) for plan in self._plans
        }
        self._pooled_inputs: dict[Key, tuple[Tensor, float, int]] = {}
        self._pooled_gradients: dict[Key, Tensor] = {}

    # ---- events ----------------------------------------------------------------------------------
    def on_input(self, layer: str, usage: int, positions: Positions) -> None:
        """A layer was called, for the ``usage``-th time in this batch."""
        plans = [plan for plan in self._plans if layer in plan.layers and plan.d_in]
        if not plans:
            return
        if not self._reduce:
            rows = positions.expanded().flatten(0, 1)  # [n S, d_in]
            for plan in plans:
                self._inputs[plan.key].update(rows, _ones(plan, layer))
            return
        mean, num_positions = widened(positions.mean()), positions.num_positions
        for plan in plans:
            ones = _ones(plan, layer)
            total, total_ones, count = self._pooled_inputs.get(plan.key, (0, 0.0, 0))
            self._pooled_inputs[plan.key] = (
                total + num_positions * mean,
                total_ones + num_positions * (ones or 0.0),
                count + num_positions,
            )

    def end_of_forward(self) -> None:
        """All layers of a batch were called."""
        for plan in self._plans:
            pooled = self._pooled_inputs.pop(plan.key, None)
            if pooled is not None:
                total, ones, count = pooled
                constant = ones / count if "b" in plan.group else None
                self._inputs[plan.key].update(total / count, constant)

    def on_gradient(self, layer: str, usage: int, gradient: Tensor) -> None:
        """The gradients ``[V, n, S, d_out]`` of V loss vectors at a layer's output exist."""
        for layers, moment in self._gradients.items():
            if layer not in layers:
                continue
            if self._reduce:
                summed = widened(gradient).sum(2)  # [V, n, d_out]
                before = self._pooled_gradients.get(layers)
                self._pooled_gradients[layers] = summed if before is None else before + summed
            else:
                moment.update(gradient.flatten(0, 2))

    def end_of_backward(self) -> None:
        """All gradients of a back-propagation were computed."""
        for layers, pooled in self._pooled_gradients.items():
            self._gradients[layers].update(pooled.flatten(0, 1))
        self._pooled_gradients = {}

    # ---- results ---------------------------------------------------------------------------------
    def finish(self, scale: Tensor | float, like: Tensor) -> tuple[dict[Key, Any], dict[Key, Any]]:
        """Return the input and gradient factors.

        Args:
            scale: The scale c of the loss, for the gradient factors.
            like: A tensor of the factors' dtype and device.
        """
        widths = {plan.layers: plan.d_out for plan in self._plans}
        shared = {
            layers: _factor(moment, scale, widths[layers], like)
            for layers, moment in self._gradients.items()
        }
        inputs = {}
        for plan in self._plans:
            if plan.key in self._inputs:
                moment = self._inputs[plan.key]
                inputs[plan.key] = _factor(moment, 1 / max(moment.count, 1), plan.d_in, like)
        return inputs, {plan.key: shared[plan.layers] for plan in self._plans}

    def identities(self, like: Tensor) -> dict[Key, Any]:
        """Return identities in place of gradient factors; ``like`` as in :meth:`finish`."""
        identities: dict[Key, Any] = {}
        for plan in self._plans:
            ones = like.new_ones(plan.d_out)
            diagonal = self._gradients[plan.layers].diagonal
            identities[plan.key] = DiagonalLinearOperator([ones]) if diagonal else ones.diag()
        return identities


def _ones(plan: GroupPlan, layer: str) -> float | None:
    """Return the constant input of a joint group's bias: 0 in a layer that has no bias."""
    if "b" not in plan.group:
        return None
    return 1.0 if layer in plan.biased else 0.0


def _factor(moment: Moment, scale: Tensor | float, width: int, like: Tensor) -> Any:
    """Return a scaled moment as a Kronecker factor: zeros if the layer was never called."""
    if moment.total is None:
        total = like.new_zeros([width] if moment.diagonal else [width, width])
    else:
        total = (moment.total * scale).to(like.dtype)
    return DiagonalLinearOperator([total]) if moment.diagonal else total


__all__ = ["CovarianceStatistic"]
