"""How a model uses its parameters, which is found by evaluating it on a few examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from curvlinops.computers.arrangement import Arrangements
from curvlinops.computers.layers import LAYERS
from curvlinops.computers.per_example import first_examples, structure
from curvlinops.computers.plan import GroupPlan, MisfitError, plan_groups
from curvlinops.computers.usages import Usage
from curvlinops.distributed import Collective
from curvlinops.risk import Batch, EmpiricalRisk


class Looking:
    """What a computer of Kronecker factors knows of a model, and how it finds out.

    A subclass implements :meth:`_observe`.

    Args:
        separate_weight_and_bias: Whether weights and biases get blocks of their own.
        unsupported: What becomes of parameters that no supported layer uses.
    """

    risk: EmpiricalRisk
    collective: Collective

    def __init__(self, separate_weight_and_bias: bool, unsupported: str):
        if unsupported not in ("raise", "diagonal"):
            raise ValueError(f"unsupported must be 'raise' or 'diagonal', got {unsupported!r}.")
        self.separate_weight_and_bias = separate_weight_and_bias
        self.unsupported = unsupported
        self._usages: dict[Usage, None] = {}
        self._diagonal: set[str] = set()  # parameters that get a diagonal block
        self._arrangements = Arrangements()
        self._seen: set[Any] = set()  # structures of batches
        self._recording = False  # whether a statistic has got events
        self._outdated = False  # whether they were others if it was known what is known now
        self._planned: tuple[Any, list[GroupPlan]] = (None, [])  # for how many of both, and plans

    def _observe(
        self, X: Any, n: int, on_call: Callable[[Usage, int, Tensor], None]
    ) -> tuple[Tensor, Iterable[Usage], dict[str, str]]:
        """Evaluate the model on n examples without derivatives.

        Args:
            X: Their input.
            n: Their number.
            on_call: Called with the input of each layer: usage, number of the call in this way, and
                the input.

        Returns:
            The prediction, how the model uses its parameters in layers, and the other uses: names
            of parameters, and by which function.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement _observe.")

    def _look_anew(self, batch: Batch) -> None:
        """Find out how the model uses its parameters from the first batch of each structure."""
        if self._any_rank(not self._usages or structure(batch.X) not in self._seen):
            self._look_first(batch)

    def _look_first(self, batch: Batch) -> None:
        """Find out how the model uses its parameters, from at most two examples."""
        X, n = first_examples(batch.X, batch.n, 2), min(batch.n, 2)
        self._look(batch)
        try:
            _, usages, other_uses = self._observe(X, n, _ignore)
        except Exception:  # whatever a model does with few examples
            _, usages, other_uses = self._observe(batch.X, batch.n, _ignore)
        self._note(usages, other_uses)
        self._verify_shared(batch)

    def _look(self, batch: Batch) -> None:
        """Find out from a single example where the examples are inside of the model.

        This is done for the first batch of each structure.
        """
        signature = structure(batch.X)
        needed = batch.n > 1 and signature not in self._seen
        if self._any_rank(needed):
            one = first_examples(batch.X, batch.n, 1)
            self._look_at(one, learn=needed)
        if needed:
            self._seen.add(signature)
        self._recording = True

    def _any_rank(self, wanted: bool) -> bool:
        """Return whether to evaluate the model: all ranks do if it is sharded, or none."""
        return self.collective.any(wanted) if self.risk.sharded else wanted

    def _look_at(self, one: Any, learn: bool) -> None:
        """Find out from a single example where the examples are; None if it cannot be had."""
        if one is None:  # the examples are not in the first axis of any tensor
            return
        inputs: dict[tuple[Usage, int], Tensor] = {}

        def on_call(usage: Usage, index: int, x: Tensor) -> None:
            inputs[usage, index] = x

        try:
            _, usages, other_uses = self._observe(one, 1, on_call)
        except Exception:  # whatever a model does with a single example
            return
        self._note(usages, other_uses)
        if learn:
            self._arrangements.learn(inputs)

    def _verify_shared(self, batch: Batch) -> bool:
        """Refuse layers of inputs without examples if the model cannot do with one for each.

        Returns:
            Whether there were some: what was computed with one for each is wrong then.
        """
        shared = self._arrangements.unverified()
        if not self._any_rank(bool(shared)):
            return False
        X, n = first_examples(batch.X, batch.n, 2), min(batch.n, 2)
        try:
            with self._arrangements.ignored():
                expected, *_ = self._observe(X, n, _ignore)
            actual, *_ = self._observe(X, n, _ignore)
            same = actual.shape == expected.shape
            same = same and torch.allclose(actual, expected, rtol=1e-3, atol=1e-5)
        except Exception:  # whatever a model does with another shape
            same = False
        if not same:
            self._arrangements.refuse(shared)
            parts = [part for usage, _ in shared for part in (usage.weight, usage.bias)]
            reason = "its layer's input is the same for all examples"
            self._note([], {part.name: reason for part in parts if part is not None})
            self._outdated = self._recording  # also if they had been refused for another reason
        return not same

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
            supported = ", ".join(layer.name for layer in LAYERS)
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


def _ignore(usage: Usage, index: int, x: Tensor) -> None:
    """Do nothing about a call."""


__all__ = ["Looking"]
