"""How a model was seen to use its parameters, and how they are treated therefore."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch

from curvlinops.computers.layers import LAYERS
from curvlinops.computers.plan import GroupPlan, MisfitError, plan_groups
from curvlinops.computers.usages import Usage
from curvlinops.risk import EmpiricalRisk


class Planning:
    """What a computer of Kronecker factors knows of a model's parameters.

    Args:
        separate_weight_and_bias: Whether weights and biases get blocks of their own.
        unsupported: What becomes of parameters that no supported layer uses: ``"raise"``, or
            ``"diagonal"``.
    """

    risk: EmpiricalRisk

    def __init__(self, separate_weight_and_bias: bool, unsupported: str):
        if unsupported not in ("raise", "diagonal"):
            raise ValueError(f"unsupported must be 'raise' or 'diagonal', got {unsupported!r}.")
        self.separate_weight_and_bias = separate_weight_and_bias
        self.unsupported = unsupported
        self._usages: dict[Usage, None] = {}
        self._diagonal: set[str] = set()  # parameters that get a diagonal block
        self._planned: tuple[Any, list[GroupPlan]] = (None, [])  # for how many of both, and plans
        self._recording = False  # whether a statistic has got events
        self._outdated = False  # whether they were others if it was known what is known now

    @cached_property
    def _scripted(self) -> dict[str, str]:
        """Return the parameters of scripted modules, whose functions cannot be seen."""
        if self.risk.model is None:
            return {}
        owners = {
            id(p): type(layer).__name__
            for layer in self.risk.model.modules()
            if isinstance(layer, torch.jit.ScriptModule)
            for p in layer.parameters()
        }
        if not owners:
            return {}
        tensors = dict(self.risk.model.named_parameters(remove_duplicate=False))
        return {
            name: f"used by {owners[id(tensors[name])]}"
            for name in self.risk.params
            if id(tensors[name]) in owners
        }

    def _note(self, usages: Iterable[Usage], other_uses: dict[str, str]) -> None:
        """Note how the model uses its parameters; raise if that is not supported."""
        new = [usage for usage in usages if usage not in self._usages]
        if not new and self._diagonal.issuperset(other_uses):
            return
        self._usages.update(dict.fromkeys(new))
        self._refuse(other_uses)
        self._check_plans()

    def _check_plans(self) -> None:
        """Raise if parameters are used in ways that do not fit together; or as the user wants."""
        while True:
            try:
                self._make_plans()
                return
            except MisfitError as error:
                self._refuse(error.problems)

    def _refuse(self, reasons: dict[str, str]) -> None:
        """Raise, or let the parameters have a diagonal block, as the user wants."""
        reasons = {name: why for name, why in reasons.items() if name not in self._diagonal}
        if not reasons:
            return
        if self.unsupported == "raise":
            ordered = sorted(reasons, key=list(self.risk.params).index)
            listing = ", ".join(f"{name!r} ({reasons[name]})" for name in ordered)
            supported = ", ".join(dict.fromkeys(layer.name for layer in LAYERS))
            raise NotImplementedError(
                f"These parameters are not in supported layers: {listing}. Supported: {supported}. "
                "Leave them out of params to treat them as constants, or use "
                "unsupported='diagonal'."
            )
        self._diagonal.update(reasons)
        self._outdated = self._recording

    def _make_plans(self) -> list[GroupPlan]:
        """Return how each group of parameters is treated, as far as is known."""
        known = len(self._usages), len(self._diagonal)  # both only grow
        if known != self._planned[0]:
            plans = plan_groups(
                self._usages, self.risk.params, self.separate_weight_and_bias, self._diagonal
            )
            self._planned = known, plans
        return list(self._planned[1])

    @property
    def plans(self) -> list[GroupPlan]:
        """How each group is treated, in the order of :attr:`mapping`; complete after a pass."""
        return self._make_plans()

    @property
    def usages(self) -> list[Usage]:
        """How the model was seen to use its parameters in layers."""
        return list(self._usages)

    @property
    def diagonal(self) -> list[str]:
        """The parameters that were seen to be used in other ways, too."""
        return sorted(self._diagonal)

    def know(self, usages: Iterable[Usage], diagonal: Iterable[str]) -> None:
        """Take over what another computer has seen."""
        self._usages.update(dict.fromkeys(usages))
        self._diagonal.update(diagonal)


__all__ = ["Planning"]
